"""The snapshot as a Dagster resource: its configuration, with credentials filled in when a run starts."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard

import dagster as dg

from sf_pipelines.engines.config import DeferredEngine, Spec, engine_spec
from sf_pipelines.orchestration.options import S3_WORDS, S3ResourceOptions
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
        """The same in the words of the configuration."""
        fields = {name: getattr(self, name) for name in ("type", "address", "workers", "task_cpus")}
        return engine_spec({name: value for name, value in fields.items() if value is not None})


def snapshot_resource(
    config: WriteConfig, s3: "S3Resource | S3ResourceOptions | str | None", engine: Spec | str | None = None
) -> dg.ResourceDefinition:
    """A resource that yields a ``SnapshotAccess``."""
    if s3 is not None and config.s3 is not None:
        raise ConfigError(f"snapshot {config.name!r}: give S3 credentials as s3 or as an S3Resource, not both")

    @dg.resource(
        description=f"The snapshot {config.name!r} at {config.store}.",
        required_resource_keys={key for key in (s3, engine) if isinstance(key, str)},
    )
    def snapshot(context: dg.InitResourceContext) -> SnapshotAccess:
        # Environment variables are read here, in the run. Under its key an S3Resource is a boto3 client, which does
        # not show its credentials.
        found = context.resources.original_resource_dict[s3] if isinstance(s3, str) else s3
        spec = _engine(context, config, engine)
        if found is None:
            return SnapshotAccess(config, spec)
        if isinstance(found, S3ResourceOptions):
            return SnapshotAccess(config.model_copy(update={"s3": found.read()}), spec)
        if not _is_s3_resource(found):
            raise ConfigError(
                f"snapshot {config.name!r}: resource {s3!r} is a {type(found).__name__}; s3_resource must name a "
                "dagster_aws.s3.S3Resource"
            )
        return SnapshotAccess(config.model_copy(update={"s3": _s3_options(found)}), spec)

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


def _s3_options(resource: "S3Resource") -> S3Options:
    """The credentials of a dagster-aws ``S3Resource``; refuses what other S3 clients cannot take over."""
    for field in ("profile_name", "use_unsigned_session"):
        if getattr(resource, field):
            raise ConfigError(
                f"S3Resource.{field} is not supported: set endpoint, region and keys on the resource, or use AWS_*"
            )
    given: dict[str, Any] = {}
    for field, name in S3_WORDS.items():
        setting = getattr(resource, field)
        value = setting.get_value() if isinstance(setting, dg.EnvVar) else setting
        given |= {} if value is None else {name: value}
    return S3Options(**given)


def log_progress(log: logging.Logger) -> Progress:
    """A progress callback: a line every few seconds, and one at the end of each stage.

    The rate counts from the stage's first report, so that a resumed stage does not count what an earlier run did.
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
