"""The snapshot as a Dagster resource: its configuration, with credentials filled in when a run starts."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dagster as dg

from sf_pipelines.engines.config import DeferredEngine, Spec, engine_spec
from sf_pipelines.orchestration.options import S3ResourceOptions
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError, ObjectMissingError, SfPipelinesError
from sf_pipelines.snapshot.run.build import Build, Progress
from sf_pipelines.snapshot.run.tasks import Engine
from sf_pipelines.snapshot.store import Store

if TYPE_CHECKING:
    from dagster_aws.s3 import S3Resource

# Seconds between two progress lines of one stage in Dagster's log.
_LOG_EVERY = 5.0


@dataclass(frozen=True)
class SnapshotAccess:
    """What assets, checks and the IO manager of one snapshot need to work on it.

    Attributes:
        config: the snapshot's configuration, credentials included.
        engine: where rows are routed and shards are built; None is the step's own process.
    """

    config: WriteConfig
    engine: Spec | None = None

    def open_engine(self) -> AbstractContextManager[Engine | None]:
        """The engine, for one step; it is opened when there is something to do."""
        return nullcontext() if self.engine is None else DeferredEngine(self.engine)

    def build(self, log: logging.Logger) -> Build:
        """The build that stages work on; its progress goes to a log."""
        return Build(self.config, progress=log_progress(log))

    def open_store(self) -> Store:
        """The snapshot's store."""
        return Store.open(self.config.store, self.config.s3, create=True)

    def find_store(self) -> Store | None:
        """The snapshot's store, or None: a folder that does not exist is not made."""
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
        """The same as the configuration's ``engine``."""
        fields = {name: getattr(self, name) for name in ("type", "address", "workers", "task_cpus")}
        return engine_spec({name: value for name, value in fields.items() if value is not None})


def snapshot_resource(
    config: WriteConfig, s3: "S3Resource | S3ResourceOptions | str | None", engine: Spec | str | None
) -> dg.ResourceDefinition:
    """A resource that yields a ``SnapshotAccess``; ``s3`` and ``engine`` may be keys of the deployment's resources."""

    @dg.resource(
        description=f"The snapshot {config.name!r} at {config.store}.",
        required_resource_keys={key for key in (s3, engine) if isinstance(key, str)},
    )
    def snapshot(context: dg.InitResourceContext) -> SnapshotAccess:
        # Environment variables are read here, in the run.
        # As they were defined: under its key an S3Resource is a boto3 client, which does not show its credentials.
        shared: Any = context.resources.original_resource_dict
        spec = shared[engine] if isinstance(engine, str) else engine
        if isinstance(engine, str):
            if not isinstance(spec, EngineResource):
                raise _wrong_kind(config, engine, spec, "engine must name an EngineResource or have an engine's fields")
            spec = spec.spec()
        if s3 is None:
            return SnapshotAccess(config, spec)
        found = shared[s3] if isinstance(s3, str) else s3
        if not isinstance(found, S3ResourceOptions):
            # Whoever made an S3Resource has imported its library, an extra that takes a second to import.
            library = sys.modules.get("dagster_aws.s3")
            if library is None or not isinstance(found, library.S3Resource):
                raise _wrong_kind(config, s3, found, "s3_resource must name a dagster_aws.s3.S3Resource")
            found = S3ResourceOptions.of(found)
        return SnapshotAccess(config.model_copy(update={"s3": found.read()}), spec)

    return snapshot


def _wrong_kind(config: WriteConfig, key: Any, found: Any, what_to_do: str) -> ConfigError:
    return ConfigError(f"snapshot {config.name!r}: resource {key!r} is a {type(found).__name__}; {what_to_do}")


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
