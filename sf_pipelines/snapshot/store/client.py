"""The library that talks to object stores: its S3 client made from options and environment, its errors made ours."""

import errno
import os
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast
from urllib.parse import urlsplit

from obstore import exceptions as obstore_errors
from obstore.store import LocalStore, S3Store
from pydantic import Field, SecretStr, ValidationInfo, field_validator

from sf_pipelines.snapshot.errors import (
    BucketMissingError,
    ConfigError,
    DiskFullError,
    ObjectMissingError,
    StoreDeniedError,
    StoreError,
    StoreUnavailableError,
    cause_of,
    without_secrets,
)
from sf_pipelines.snapshot.model import ConfigModel
from sf_pipelines.snapshot.store.addresses import setting_fault

if TYPE_CHECKING:
    from obstore.store import S3Config

# Of each setting of the client: the variables that it is read from, the first that says something.
_SETTINGS = {
    "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "access_key_id": ("AWS_ACCESS_KEY_ID",),
    "secret_access_key": ("AWS_SECRET_ACCESS_KEY",),
    "session_token": ("AWS_SESSION_TOKEN", "AWS_TOKEN"),
}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_SAYS_FULL = ("no space left on device", "disk quota exceeded", "disk is full", "no usable temporary directory")
_NO_KEY = re.compile("[\\x00-\\x1f\\x7f\\ud800-\\udfff]")
# Where a client that was given no credentials asks the machine's cloud for some.
_CLOUD = ("//169.254.169.254/", "//169.254.170.2/", "//169.254.170.23/", "//[fd00:ec2::254]/")


class S3Options(ConfigModel):
    """One set of credentials for every client. What is left out comes from the environment (``AWS_*``).

    A server that does not answer is given up after about ``timeout`` seconds: what may pass is tried again, but not for
    longer than that altogether, from the first request on.

    Attributes:
        endpoint_url: for servers other than AWS, as in ``http://127.0.0.1:9000``; without credentials in it.
        region: bucket's region.
        access_key_id: key id.
        secret_access_key: secret.
        session_token: for temporary credentials.
        timeout: seconds for one request.
        retries: how often a request is repeated that failed in a way that may pass.
    """

    secretive: ClassVar[bool] = True

    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: Annotated[str | None, Field(repr=False)] = None
    secret_access_key: SecretStr | None = None
    session_token: SecretStr | None = None
    timeout: Annotated[float, Field(gt=0, le=3600)] = 60.0
    retries: Annotated[int, Field(ge=0, le=100)] = 4

    @field_validator("endpoint_url", "region", "access_key_id", "secret_access_key", "session_token")
    @classmethod
    def _a_client_can_send_it(cls, value: str | SecretStr | None, info: ValidationInfo) -> str | SecretStr | None:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if text is not None and (fault := setting_fault(str(info.field_name), text)):
            raise ValueError(fault)
        return value


def s3_client(bucket: str, prefix: str, s3: S3Options | None) -> S3Store:
    """A client whose every setting was looked at: the library panics on what cannot be part of a request."""
    given = s3 or S3Options()
    options = {name: value for name in _SETTINGS if (value := _setting(name, given)) is not None}
    if ("access_key_id" in options) != ("secret_access_key" in options):
        here, other = ("access_key_id", "secret_access_key")[:: 1 if "access_key_id" in options else -1]
        raise ConfigError(f"S3 credentials: {here} is given without {other}; give both, as s3 or AWS_*, or none")
    endpoint = options.get("endpoint")
    if endpoint:
        options["virtual_hosted_style_request"] = "false"
    options.setdefault("region", "us-east-1")
    timeout = timedelta(seconds=given.timeout)
    first, longest = timedelta(milliseconds=100), timedelta(seconds=5)
    try:
        return S3Store(
            bucket,
            prefix=prefix or None,
            config=cast("S3Config", options),
            client_options={
                "allow_http": bool(endpoint and urlsplit(endpoint).scheme == "http"),
                "timeout": timeout,
                "connect_timeout": min(timedelta(seconds=5), timeout),
            },
            retry_config={
                "max_retries": given.retries,
                "retry_timeout": timeout,
                "backoff": {"base": 2.0, "init_backoff": first, "max_backoff": longest},
            },
        )
    except (obstore_errors.BaseError, ValueError) as error:
        # Another one of the many AWS_* variables that the library reads.
        raise ConfigError(
            f"cannot make an S3 client for bucket {bucket}: {first_line(error)}; look at the variables AWS_*"
        ) from cause_of(error)


def _setting(name: str, s3: S3Options) -> str | None:
    """From the options, else from the environment, where an empty value counts as none."""
    given = getattr(s3, "endpoint_url" if name == "endpoint" else name)
    if given is not None:
        # Options look at their values themselves.
        return given.get_secret_value() if isinstance(given, SecretStr) else given
    for variable in _SETTINGS[name]:
        if value := os.environ.get(variable):
            if fault := setting_fault(name, value):
                raise ConfigError(f"environment variable {variable} {fault}")
            return value
    return None


def listed(backend: Any, folder: str) -> Iterator[tuple[str, int, str | None, datetime | None]]:
    """Key, size, version and time of all objects below a folder.

    The library refuses a whole page of a listing for one key that it cannot parse. Then the names are taken from
    others, who tell no version: also of objects that the library cannot ask for (see ``is_plain_key``).
    """
    seen: set[str] = set()
    try:
        for batch in backend.list(folder or None):
            for meta in batch:
                seen.add(meta["path"])
                yield meta["path"], meta["size"], meta["e_tag"], meta["last_modified"]
    except obstore_errors.InvalidPathError:
        if not isinstance(backend, LocalStore | S3Store):
            raise
    else:
        return
    for key, size in _files(backend, folder) if isinstance(backend, LocalStore) else _keys(backend, folder):
        if key not in seen:
            yield key, size, None, None


def _files(backend: LocalStore, folder: str) -> Iterator[tuple[str, int]]:
    root = Path(backend.prefix or "/")
    for path in (root / folder).rglob("*"):
        if path.is_file():
            yield path.relative_to(root).as_posix(), path.stat().st_size


def _keys(backend: S3Store, folder: str) -> Iterator[tuple[str, int]]:
    """By Arrow's client, which takes any key."""
    from pyarrow import fs

    options = cast("dict[str, Any]", backend.config)
    endpoint = urlsplit(options.get("endpoint") or "")
    bucket, lead = options["bucket"], f"{backend.prefix}/" if backend.prefix else ""
    system = fs.S3FileSystem(
        access_key=options.get("access_key_id"),
        secret_key=options.get("secret_access_key"),
        session_token=options.get("session_token"),
        region=options.get("region"),
        endpoint_override=endpoint.netloc or None,
        scheme=endpoint.scheme or "https",
        connect_timeout=5,
    )
    where = f"{bucket}/{lead}{folder}".rstrip("/")
    for found in system.get_file_info(fs.FileSelector(where, recursive=True, allow_not_found=True)):
        if found.type == fs.FileType.File:
            yield found.path.removeprefix(f"{bucket}/{lead}"), found.size


def is_plain_key(key: str) -> bool:
    """Whether the library can ask for an object: no empty or dot segment, no control character, all of it text."""
    return {"", ".", ".."}.isdisjoint(key.split("/")) and _NO_KEY.search(key) is None


def store_error(where: str, error: Exception) -> StoreError:
    """This package's error for one of the library or of the system; ``where`` says what was tried on which object."""
    text = str(error)
    denied = PermissionError | obstore_errors.PermissionDeniedError | obstore_errors.UnauthenticatedError
    if is_disk_full(error):
        found = DiskFullError("the disk is full")
    elif "<Code>NoSuchBucket<" in text:
        found = BucketMissingError("there is no such bucket; make it, or look at the address and the endpoint")
    elif isinstance(error, FileNotFoundError):
        found = ObjectMissingError("it does not exist")
    elif any(address in text for address in _CLOUD):
        found = StoreDeniedError(
            "no S3 credentials were given, and the machine's cloud gives none either; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or s3 in the configuration"
        )
    elif isinstance(error, denied):
        found = StoreDeniedError(first_line(error))
    elif isinstance(error, obstore_errors.InvalidPathError | ValueError):
        found = StoreError(first_line(error))
    else:
        found = StoreUnavailableError(first_line(error))
    return type(found)(f"{where}: {found}")


def is_disk_full(error: BaseException) -> bool:
    """Whether any library's error says that a disk of this machine, or the user's share of it, is full."""
    text = str(error).lower()
    return getattr(error, "errno", None) in _FULL or any(mark in text for mark in _SAYS_FULL)


def first_line(error: BaseException) -> str:
    """What an error says, without its details and without secrets."""
    lines = str(error).strip().splitlines()
    return without_secrets(lines[0] if lines else type(error).__name__)[:400]
