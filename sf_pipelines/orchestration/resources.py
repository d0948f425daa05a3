"""The snapshot as a Dagster resource: its configuration, with credentials filled in when a run starts."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
from dagster_aws.s3 import S3Resource

from sf_pipelines.snapshot.build import Build, Progress
from sf_pipelines.snapshot.config import S3Options, WriteConfig
from sf_pipelines.snapshot.errors import ConfigError, ObjectMissingError, SfPipelinesError
from sf_pipelines.snapshot.store import Store

# Seconds between two progress lines of one stage in Dagster's log.
_LOG_EVERY = 5.0


class SnapshotAccess:
    """What assets, checks and the IO manager of one snapshot need to work on it.

    Attributes:
        config: the snapshot's configuration, credentials included.
    """

    def __init__(self, config: WriteConfig) -> None:
        self.config = config

    def build(self, log: logging.Logger) -> Build:
        """The build that stage functions work on; its progress goes to a log."""
        return Build(self.config, progress=log_progress(log))

    def open_store(self) -> Store:
        """The snapshot's store."""
        return Store.open(self.config.store, self.config.s3, create=True)

    def find_store(self) -> Store | None:
        """The snapshot's store for a look that leaves nothing behind: a folder that is not there is not made."""
        try:
            return Store.open(self.config.store, self.config.s3)
        except ObjectMissingError:
            return None


def snapshot_resource(config: WriteConfig, s3: S3Resource | str | None) -> dg.ResourceDefinition:
    """A resource that yields a ``SnapshotAccess``.

    Args:
        config: the snapshot.
        s3: credentials for source and store: a resource, or the key of one that the deployment defines; None takes
            ``config.s3`` or the environment's.

    Raises:
        ConfigError: credentials are given twice.
    """
    if s3 is not None and config.s3 is not None:
        raise ConfigError(f"snapshot {config.name!r}: give S3 credentials as s3 or as an S3Resource, not both")

    @dg.resource(
        description=f"The snapshot {config.name!r} at {config.store}.",
        required_resource_keys={s3} if isinstance(s3, str) else None,
    )
    def snapshot(context: dg.InitResourceContext) -> SnapshotAccess:
        # Environment variables are looked up here, where the run is, and not where definitions were loaded.
        # Under its key an S3Resource shows as a boto3 client, which does not tell its credentials.
        found = context.resources.original_resource_dict[s3] if isinstance(s3, str) else s3
        if found is None:
            return SnapshotAccess(config)
        if not isinstance(found, S3Resource):
            raise ConfigError(
                f"snapshot {config.name!r}: resource {s3!r} is a {type(found).__name__}; s3_resource must name a "
                "dagster_aws.s3.S3Resource"
            )
        return SnapshotAccess(config.model_copy(update={"s3": s3_options(found)}))

    return snapshot


def s3_options(resource: S3Resource) -> S3Options:
    """The credentials of a dagster-aws ``S3Resource`` in this package's words.

    Raises:
        ConfigError: the resource uses something that other S3 clients cannot take over.
    """
    for field in ("profile_name", "use_unsigned_session"):
        if getattr(resource, field):
            raise ConfigError(
                f"S3Resource.{field} is not supported: set endpoint, region and keys on the resource, or use AWS_*"
            )
    options: dict[str, Any] = {
        "endpoint_url": _value(resource.endpoint_url),
        "region": _value(resource.region_name),
        "access_key_id": _value(resource.aws_access_key_id),
        "secret_access_key": _value(resource.aws_secret_access_key),
        "session_token": _value(resource.aws_session_token),
    }
    return S3Options(**{name: value for name, value in options.items() if value is not None})


def _value(setting: str | None) -> str | None:
    return setting.get_value() if isinstance(setting, dg.EnvVar) else setting


def log_progress(log: logging.Logger) -> Progress:
    """A progress callback that writes a line at most every few seconds, and one at the end of each stage."""
    last = time.monotonic()

    def progress(stage: str, done: int, total: int | None, unit: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= _LOG_EVERY:
            last = time.monotonic()
            of = "" if total is None else f" of {total:,}"
            log.info("%s: %s%s %s", stage, f"{done:,}", of, unit)

    return progress


@contextmanager
def surfaced() -> Iterator[None]:
    """Turns a typed error into the step's failure, and lets Dagster retry only what may pass."""
    try:
        yield
    except SfPipelinesError as error:
        raise dg.Failure(
            description=f"{type(error).__name__}: {error}",
            metadata={"kind": error.kind, "retryable": error.retryable},
            allow_retries=error.retryable,
        ) from error
