"""What is wrong with addresses and credentials of stores, as users write them.

An S3 client panics on values that cannot be part of a request, so they are checked before a client sees them. No
message here quotes the value: it may hold a secret.
"""

import ipaddress
import re

_PLACE = re.compile(r"(?:[A-Za-z0-9._-]+|\[(?P<ipv6>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]{1,5}))?")
_REGION = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Of buckets that servers other than AWS allow, too.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f]")


def endpoint_fault(url: str) -> str | None:
    """What is wrong with the address of an S3 server; None where nothing is."""
    scheme, found, rest = url.partition("://")
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    match = _PLACE.fullmatch(place)
    if match is not None and match["ipv6"] is not None and not _is_ipv6(match["ipv6"]):
        match = None
    faults = {
        "has a space, a line break or another character that no address has, or is empty": not _VISIBLE.fullmatch(url),
        "has no scheme; write http:// or https:// before the host, as in http://127.0.0.1:9000": not found,
        "must begin with http:// or https://": scheme.lower() not in {"http", "https"},
        "has a user name or a password in it; give credentials as access_key_id and secret_access_key": "@" in rest,
        "has no host, or a host or a port that is none; write it as in http://127.0.0.1:9000": match is None
        or not 0 < int(match["port"] or 80) < 65_536,
        "has a query or a fragment; write scheme, host and port alone": "?" in rest or "#" in rest,
    }
    return next((fault for fault, holds in faults.items() if holds), None)


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def region_fault(region: str) -> str | None:
    """What is wrong with a region; None where nothing is."""
    if _REGION.fullmatch(region):
        return None
    return "is no region: letters, digits, '-', '_' and '.', as in us-east-1"


def credential_fault(value: str) -> str | None:
    """What is wrong with a key id, a secret or a token; None where nothing is."""
    if _VISIBLE.fullmatch(value):
        return None
    return "is empty, or has a space, a line break or another character that no credential has"


def setting_fault(name: str, value: str) -> str | None:
    """What is wrong with a setting of an S3 client, by its name in either set of options; None where nothing is."""
    looks = {"endpoint": endpoint_fault, "region": region_fault}
    return looks.get(name.removesuffix("_url").removesuffix("_name"), credential_fault)(value)


def location_fault(location: str) -> str | None:
    """What is wrong with the address of a store or a source; None where nothing is."""
    bucket, _, prefix = location.removeprefix("s3://").partition("/")
    segments = prefix.strip("/").split("/") if prefix.strip("/") else []
    faults = {
        "has no bucket; write s3://bucket/prefix": not bucket,
        "has credentials or a port where the bucket belongs; write s3://bucket/prefix, and credentials as s3": "@"
        in bucket
        or ":" in bucket,
        "has a bucket that is none: letters, digits, '.', '-' and '_', as in s3://bucket/prefix": not _BUCKET.fullmatch(
            bucket
        ),
        "has an empty, '.' or '..' segment or a control character in its prefix, which no client can ask for": (
            not {"", ".", ".."}.isdisjoint(segments) or _UNSAFE.search(prefix) is not None
        ),
    }
    if location.startswith("s3://"):
        return next((fault for fault, holds in faults.items() if holds), None)
    return "has a NUL character" if "\0" in location else None
