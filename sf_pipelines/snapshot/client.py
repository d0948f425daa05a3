"""The library that talks to object stores: its S3 client made from options and environment, its errors made ours."""

import errno
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import urlsplit

from obstore import exceptions as obstore_errors
from obstore.store import S3Store

from sf_pipelines.snapshot.addresses import cause_of, setting_fault, without_secrets
from sf_pipelines.snapshot.errors import (
    BucketMissingError,
    ConfigError,
    DiskFullError,
    ObjectMissingError,
    StoreDeniedError,
    StoreError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    from obstore.store import S3Config

# Of stores that are opened without options; as the defaults of S3Options.
_TIMEOUT, _RETRIES = 60.0, 4
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
# Where a client that was given no credentials asks the machine's cloud for some.
_CLOUD = ("//169.254.169.254/", "//169.254.170.2/", "//169.254.170.23/", "//[fd00:ec2::254]/")


class Credentials(Protocol):
    """What a store needs to know of S3 options (see ``config.S3Options``)."""

    endpoint_url: str | None
    region: str | None
    access_key_id: str | None
    secret_access_key: Any
    session_token: Any
    timeout: float
    retries: int


def s3_client(bucket: str, prefix: str, s3: Credentials | None) -> S3Store:
    """A client whose every setting was looked at: the library panics on what cannot be part of a request.

    Raises:
        ConfigError: a variable of the environment cannot be used, or a key id or a secret is given alone.
    """
    options = {name: value for name in _SETTINGS if (value := _setting(name, s3)) is not None}
    if ("access_key_id" in options) != ("secret_access_key" in options):
        given, other = ("access_key_id", "secret_access_key")[:: 1 if "access_key_id" in options else -1]
        raise ConfigError(f"S3 credentials: {given} is given without {other}; give both, as s3 or AWS_*, or none")
    endpoint = options.get("endpoint")
    if endpoint:
        options["virtual_hosted_style_request"] = "false"
    options.setdefault("region", "us-east-1")
    timeout = _TIMEOUT if s3 is None else s3.timeout
    try:
        return S3Store(
            bucket,
            prefix=prefix or None,
            config=cast("S3Config", options),
            client_options={
                "allow_http": bool(endpoint and urlsplit(endpoint).scheme == "http"),
                "timeout": timedelta(seconds=timeout),
                "connect_timeout": timedelta(seconds=min(5.0, timeout)),
            },
            retry_config={
                "max_retries": _RETRIES if s3 is None else s3.retries,
                "retry_timeout": timedelta(seconds=timeout),
                "backoff": {
                    "base": 2.0,
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=5),
                },
            },
        )
    except (obstore_errors.BaseError, ValueError) as error:
        # Another one of the many AWS_* variables that the library reads.
        raise ConfigError(
            f"cannot make an S3 client for bucket {bucket}: {first_line(error)}; look at the variables AWS_*"
        ) from cause_of(error)


def _setting(name: str, s3: Credentials | None) -> str | None:
    """From the options, else from the environment, where an empty value counts as none."""
    given = None if s3 is None else getattr(s3, "endpoint_url" if name == "endpoint" else name)
    if given is not None:
        # Options look at their values themselves.
        return given.get_secret_value() if hasattr(given, "get_secret_value") else given
    for variable in _SETTINGS[name]:
        value = os.environ.get(variable)
        if value and (fault := setting_fault(name, value)):
            raise ConfigError(f"environment variable {variable} {fault}")
        if value:
            return value
    return None


def store_error(where: str, error: Exception) -> StoreError:
    """This package's error for one of the library or of the system.

    Args:
        where: what was tried on which object.
        error: why it failed.
    """
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
