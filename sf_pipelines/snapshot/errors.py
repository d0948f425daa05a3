"""One tree of errors, grouped by what a handler does about them.

Every error carries a stable ``kind`` (append-only: programs and alerts match on it), says whether trying again can
help (``retryable``), and is also the builtin that a Python user would expect (``ValueError``, ``FileNotFoundError``…).
"""

from typing import ClassVar

from sf_pipelines.snapshot.addresses import without_secrets


class SfPipelinesError(Exception):
    """Root of everything that this package raises on purpose. Its message shows no secrets of addresses in it."""

    kind: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_secrets(arg) if isinstance(arg, str) else arg for arg in args))


# Fix the configuration.


class ConfigError(SfPipelinesError, ValueError):
    """A configuration value is wrong; nothing was started."""

    kind = "config"


# Fix the data.


class SourceError(SfPipelinesError):
    """The source table cannot be used."""

    kind = "source"


class SourceNotFoundError(SourceError, FileNotFoundError):
    """No source file matches."""

    kind = "source.not_found"


class SourceEmptyError(SourceError, ValueError):
    """The source has no rows, or none that satisfies the data contract."""

    kind = "source.empty"


class SourceSchemaError(SourceError, TypeError):
    """A column is missing or has a type that cannot be used."""

    kind = "source.schema"


class SourceChangedError(SourceError):
    """A pinned source file is no longer the one that was scanned; a new build will pin the new one."""

    kind = "source.changed"
    retryable = True


class VectorFunctionError(SfPipelinesError, RuntimeError):
    """The user's function that makes vectors failed, or gave something else."""

    kind = "vector_function"


class DataContractError(SfPipelinesError, ValueError):
    """More rows were rejected than ``max_reject_fraction`` allows."""

    kind = "data_contract"


# Look at the store.


class StoreError(SfPipelinesError, OSError):
    """The object store did not do what was asked."""

    kind = "store"


class StoreUnavailableError(StoreError):
    """The store failed in a way that may pass."""

    kind = "store.unavailable"
    retryable = True


class StoreDeniedError(StoreError, PermissionError):
    """The store refused: credentials or permissions."""

    kind = "store.denied"


class ObjectMissingError(StoreError, FileNotFoundError):
    """An object that must be there is not."""

    kind = "store.missing"


class BucketMissingError(StoreError, FileNotFoundError):
    """There is no such bucket."""

    kind = "store.no_bucket"


class DiskFullError(StoreError):
    """A disk of this machine is full: that of scratch files, of copies of shards, or of a local store."""

    kind = "store.disk_full"


class ConditionalWritesError(StoreError):
    """The store ignores conditions on writes, so that two publishers would both win."""

    kind = "store.conditional_writes"


class WriteUncertainError(StoreUnavailableError):
    """A conditional write may or may not have been applied, and reading back did not tell."""

    kind = "store.uncertain"


# Do not trust what is stored.


class IntegrityError(SfPipelinesError):
    """What is stored contradicts what was recorded."""

    kind = "integrity"


class DigestMismatchError(IntegrityError):
    """An object's bytes are not the ones that were sealed."""

    kind = "integrity.digest"


class CountMismatchError(IntegrityError):
    """Rows do not add up."""

    kind = "integrity.count"


class ManifestError(IntegrityError, ValueError):
    """A manifest, pointer or routing artifact cannot be understood or contradicts itself."""

    kind = "integrity.manifest"


class SnapshotDamagedError(IntegrityError):
    """Objects of a published snapshot are gone or changed; the message names them."""

    kind = "integrity.snapshot"


class IndexBuildError(SfPipelinesError):
    """A shard's index could not be built or does not cover its rows."""

    kind = "index.build"


class ReceiptMissingError(SfPipelinesError, LookupError):
    """A stage was asked for before the stage that it builds on."""

    kind = "receipt.missing"


# The gate said no.


class GateError(SfPipelinesError):
    """A snapshot may not be published."""

    kind = "gate"


class GateFailedError(GateError):
    """A required check failed on this manifest."""

    kind = "gate.failed"


class GateMissingError(GateError):
    """A required check has no verdict for this manifest."""

    kind = "gate.missing"


# Somebody else was first.


class PublishConflictError(SfPipelinesError):
    """The current pointer moved since this build was scanned.

    Attributes:
        ours: run id that lost.
        theirs: run id that the pointer names, or None when the pointer is gone.
    """

    kind = "publish.conflict"

    def __init__(self, message: str, *, ours: str, theirs: str | None) -> None:
        super().__init__(message)
        self.ours = ours
        self.theirs = theirs

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_conflict, (str(self), self.ours, self.theirs)


def _rebuild_conflict(message: str, ours: str, theirs: str | None) -> PublishConflictError:
    return PublishConflictError(message, ours=ours, theirs=theirs)


# Fix the call.


class OperationError(SfPipelinesError):
    """An operation on published snapshots cannot do what was asked."""

    kind = "operation"


class RunNotFoundError(OperationError, LookupError):
    """No published snapshot is of the run that was named."""

    kind = "operation.no_run"


class ReaderError(SfPipelinesError):
    """A reader cannot do what was asked in its present state."""

    kind = "reader"


class ReaderClosedError(ReaderError):
    """The reader was closed."""

    kind = "reader.closed"


class SnapshotNotFoundError(ReaderError, FileNotFoundError):
    """Nothing has been published under this root."""

    kind = "reader.no_snapshot"


class SnapshotKindError(ReaderError):
    """The snapshot is of a kind that this reader does not serve."""

    kind = "reader.snapshot_kind"


class QueryError(ReaderError, ValueError):
    """A query or search option is wrong."""

    kind = "reader.query"


class NoShardError(QueryError):
    """The values are of the right types, but the sharding expression gives no shard for them."""

    kind = "reader.query.no_shard"


class RateLimitError(ReaderError, TimeoutError):
    """The rate limiter would have made the caller wait longer than its timeout; no tokens were taken."""

    kind = "reader.rate_limit"
    retryable = True


class DeadlineError(ReaderError, TimeoutError):
    """The answer was not there when its time was up. Shards that were being opened go on opening."""

    kind = "reader.deadline"
    retryable = True


class ReaderForkedError(ReaderError, RuntimeError):
    """The reader, or a library that it needs, was in use when this process was forked; locks and threads are lost."""

    kind = "reader.forked"


# Look at the engine.


class EngineError(SfPipelinesError, RuntimeError):
    """The engine that the build is spread over cannot be used."""

    kind = "engine"


class MissingExtraError(EngineError, ImportError):
    """A package that an engine needs is not installed; the message names the extra to install."""

    kind = "engine.missing_extra"


class WorkerLostError(EngineError):
    """A worker was lost in the middle of a task."""

    kind = "engine.worker_lost"
    retryable = True


class TaskCrashedError(EngineError):
    """A task ended in an error that nobody expects."""

    kind = "engine.task_crashed"


class TasksFailedError(EngineError):
    """Tasks failed for good, after those failures that may pass were tried again.

    Attributes:
        causes: error of each task that failed, by its label, as in ``shard 3``.
    """

    kind = "engine.tasks_failed"

    def __init__(self, message: str, causes: dict[str, Exception]) -> None:
        super().__init__(message)
        self.causes = causes

    def __reduce__(self) -> tuple[object, ...]:
        return TasksFailedError, (str(self), self.causes)


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust met a bug of its own: what Python sees of that is no ``Exception``."""
    return type(error).__name__ == "PanicException"


def error_of_kind(kind: str, message: str) -> SfPipelinesError:
    """A typed error that has come from another process.

    Args:
        kind: its ``kind``.
        message: what it said.
    """
    classes = [SfPipelinesError]
    for found in classes:
        classes.extend(found.__subclasses__())
        # Those with more to say than a message are raised by no task. Builtin bases have an initialiser each.
        ours = set(found.__mro__).intersection(classes) - {SfPipelinesError}
        if found.kind == kind and not any("__init__" in vars(base) for base in ours):
            return found(message)
    return SfPipelinesError(message)
