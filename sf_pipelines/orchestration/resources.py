"""The snapshot as a Dagster resource: its configuration, with credentials filled in when a run starts."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard

import dagster as dg

from sf_pipelines.engines import engine_spec
from sf_pipelines.engines.opening import DeferredEngine, Spec
from sf_pipelines.orchestration.options import S3ResourceOptions
from sf_pipelines.snapshot.config import S3Options, WriteConfig
from sf_pipelines.snapshot.errors import ConfigError, ObjectMissingError, SfPipelinesError
from sf_pipelines.snapshot.run.build import Build, Progress
from sf_pipelines.snapshot.run.tasks import Engine
from sf_pipelines.snapshot.store import Store

if TYPE_CHECKING:
    from dagster_aws.s3 import S3Resource

# Seconds between two progress lines of one stage in Dagster's log.
_LOG_EVERY = 5.0


class SnapshotAccess:
    """What assets, checks and the IO manager of one snapshot need to work on it.

    Attributes:
        config: the snapshot's configuration, credentials included.
        engine: where rows are routed and shards are built; None is the step's own process.
    """

    def __init__(self, config: WriteConfig, engine: Spec | None = None) -> None:
        self.config = config
        self.engine = engine

    def open_engine(self) -> AbstractContextManager[Engine | None]:
        """The engine, for one step; it is opened when there is something to do."""
        return nullcontext() if self.engine is None else DeferredEngine(self.engine)

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


class EngineResource(dg.ConfigurableResource):
    """An engine that several snapshots share: name its key as their ``engine``.

    Attributes:
        type: ``local``, ``dask``, ``ray`` or ``spark``.
        address: of the cluster; None starts one on the machine of the step.
        workers: of a cluster on the machine of the step.
        task_cpus: cores that one task takes; Ray only.
    """

    type: str
    address: str | None = None
    workers: int | None = None
    task_cpus: float | None = None

    def spec(self) -> Spec:
        """The same in the words of the configuration.

        Raises:
            ConfigError: a field is wrong.
        """
        fields = {name: getattr(self, name) for name in ("type", "address", "workers", "task_cpus")}
        return engine_spec({name: value for name, value in fields.items() if value is not None})


def snapshot_resource(
    config: WriteConfig, s3: "S3Resource | S3ResourceOptions | str | None", engine: Spec | str | None = None
) -> dg.ResourceDefinition:
    """A resource that yields a ``SnapshotAccess``.

    Args:
        config: the snapshot.
        s3: credentials for source and store: a resource, the fields of one, or the key of one that the deployment
            defines; None takes ``config.s3`` or the environment's.
        engine: where rows are routed and shards are built, or the key of an ``EngineResource``.

    Raises:
        ConfigError: credentials are given twice.
    """
    if s3 is not None and config.s3 is not None:
        raise ConfigError(f"snapshot {config.name!r}: give S3 credentials as s3 or as an S3Resource, not both")

    @dg.resource(
        description=f"The snapshot {config.name!r} at {config.store}.",
        required_resource_keys={key for key in (s3, engine) if isinstance(key, str)},
    )
    def snapshot(context: dg.InitResourceContext) -> SnapshotAccess:
        # Environment variables are looked up here, where the run is, and not where definitions were loaded.
        # Under its key an S3Resource shows as a boto3 client, which does not tell its credentials.
        found = context.resources.original_resource_dict[s3] if isinstance(s3, str) else s3
        where = _engine(context, config, engine)
        if found is None:
            return SnapshotAccess(config, where)
        if isinstance(found, S3ResourceOptions):
            return SnapshotAccess(config.model_copy(update={"s3": found.read()}), where)
        if not _is_s3_resource(found):
            raise ConfigError(
                f"snapshot {config.name!r}: resource {s3!r} is a {type(found).__name__}; s3_resource must name a "
                "dagster_aws.s3.S3Resource"
            )
        return SnapshotAccess(config.model_copy(update={"s3": s3_options(found)}), where)

    return snapshot


def _is_s3_resource(found: Any) -> "TypeGuard[S3Resource]":
    # Whoever made one has imported its library: an extra, which takes a second to import.
    library = sys.modules.get("dagster_aws.s3")
    return library is not None and isinstance(found, library.S3Resource)


def _engine(context: dg.InitResourceContext, config: WriteConfig, engine: Spec | str | None) -> Spec | None:
    if not isinstance(engine, str):
        return engine
    found = context.resources.original_resource_dict[engine]
    if not isinstance(found, EngineResource):
        raise ConfigError(
            f"snapshot {config.name!r}: resource {engine!r} is a {type(found).__name__}; engine must name an "
            "EngineResource, or have the fields of an engine"
        )
    return found.spec()


def s3_options(resource: "S3Resource") -> S3Options:
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
    """A progress callback that writes a line at most every few seconds, and one at the end of each stage.

    A line says how much of the whole is done, and how quickly it goes since the stage's first report: a stage that goes
    on where an earlier one was killed does not count that one's rows.
    """
    last = time.monotonic()
    begun: dict[str, tuple[float, int]] = {}

    def progress(stage: str, done: int, total: int | None, unit: str) -> None:
        nonlocal last
        now = time.monotonic()
        started, before = begun.setdefault(stage, (now, done))
        if done != total and now - last < _LOG_EVERY:
            return
        last = now
        of = f" of {total:,}" if total is not None else ""
        share = f" ({100 * done // total} %)" if total else ""
        known = unit == "rows" and now > started and done > before
        rate = f", {(done - before) / (now - started):,.0f} rows/s" if known else ""
        log.info("%s: %s%s %s%s%s", stage, f"{done:,}", of, unit, share, rate)

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
