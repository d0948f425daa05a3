"""One tree of errors, grouped by what a handler does about them.

Every error has a stable ``kind`` (append-only: programs and alerts match on it), says whether trying again can help
(``retryable``, inherited), and is also the builtin that a Python user expects (``ValueError``, ``FileNotFoundError``…).
"""

import re
from typing import Any, ClassVar

_HIDDEN = "***"
_NAMES = r"[\w.-]*(?:signature|credential|token|secret|passw(?:or)?d|pwd|api_?key|access_?key|authorization)[\w.-]*"
_MASKS = (
    # https://user:password@host; a password may have a slash in it.
    (re.compile(r"(://)(?:[^/?#\s'\"]*:[^\s'\"]*|[^/?#\s'\"]*)@"), rf"\1{_HIDDEN}@"),
    # ?X-Amz-Signature=…, ;token=…
    (re.compile(rf"(?i)\b({_NAMES}=)[^&;,\s'\"<>)]+"), rf"\1{_HIDDEN}"),
    # What S3 quotes of a request that it refuses.
    (
        re.compile(
            r"(?is)<(Token[\w-]*|AWSAccessKeyId|SignatureProvided|StringToSign\w*|CanonicalRequest\w*)>.*?</\1>"
        ),
        rf"<\1>{_HIDDEN}</\1>",
    ),
)


def without_secrets(text: str) -> str:
    """A message with passwords, tokens and signatures of the addresses in it left out."""
    for pattern, masked in _MASKS:
        text = pattern.sub(masked, text)
    return text


def cause_of(error: BaseException) -> BaseException | None:
    """An error as a cause that tracebacks may show; None where it tells a secret."""
    return error if without_secrets(str(error)) == str(error) else None


class SfPipelinesError(Exception):
    """Root of everything that this package raises on purpose. Its message shows no secrets of addresses in it."""

    kind: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init_subclass__(cls, *, kind: str | None = None, retryable: bool | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls.kind, cls.retryable = kind or cls.kind, cls.retryable if retryable is None else retryable

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_secrets(arg) if isinstance(arg, str) else arg for arg in args))


# Fix the configuration.


class ConfigError(SfPipelinesError, ValueError, kind="config"):
    """A configuration value is wrong; nothing was started."""


# Fix the data.


class SourceError(SfPipelinesError, kind="source"):
    """The source table cannot be used."""


class SourceNotFoundError(SourceError, FileNotFoundError, kind="source.not_found"):
    """No source file matches."""


class SourceEmptyError(SourceError, ValueError, kind="source.empty"):
    """The source has no rows, or none that satisfies the data contract."""


class SourceSchemaError(SourceError, TypeError, kind="source.schema"):
    """A column is missing or has a type that cannot be used."""


class SourceChangedError(SourceError, kind="source.changed", retryable=True):
    """A pinned source file is no longer the one that was scanned; a new build will pin the new one."""


class VectorFunctionError(SfPipelinesError, RuntimeError, kind="vector_function"):
    """The user's function that makes vectors failed, or gave something else."""


class DataContractError(SfPipelinesError, ValueError, kind="data_contract"):
    """More rows were rejected than ``max_reject_fraction`` allows."""


# Look at the store.


class StoreError(SfPipelinesError, OSError, kind="store"):
    """The object store did not do what was asked."""


class StoreUnavailableError(StoreError, kind="store.unavailable", retryable=True):
    """The store failed in a way that may pass."""


class StoreDeniedError(StoreError, PermissionError, kind="store.denied"):
    """The store refused: credentials or permissions."""


class ObjectMissingError(StoreError, FileNotFoundError, kind="store.missing"):
    """An object that must be there is not."""


class BucketMissingError(StoreError, FileNotFoundError, kind="store.no_bucket"):
    """There is no such bucket."""


class DiskFullError(StoreError, kind="store.disk_full"):
    """A disk of this machine is full: that of scratch files, of copies of shards, or of a local store."""


class ConditionalWritesError(StoreError, kind="store.conditional_writes"):
    """The store ignores conditions on writes, so that two publishers would both win."""


class WriteUncertainError(StoreUnavailableError, kind="store.uncertain"):
    """A conditional write may or may not have been applied, and reading back did not tell."""


# Do not trust what is stored.


class IntegrityError(SfPipelinesError, kind="integrity"):
    """What is stored contradicts what was recorded."""


class DigestMismatchError(IntegrityError, kind="integrity.digest"):
    """An object's bytes are not the ones that were sealed."""


class CountMismatchError(IntegrityError, kind="integrity.count"):
    """Rows do not add up."""


class ManifestError(IntegrityError, ValueError, kind="integrity.manifest"):
    """A manifest, pointer or routing artifact cannot be understood or contradicts itself."""


class SnapshotDamagedError(IntegrityError, kind="integrity.snapshot"):
    """Objects of a published snapshot are gone or changed; the message names them."""


class IndexBuildError(SfPipelinesError, kind="index.build"):
    """A shard's index could not be built or does not cover its rows."""


class ReceiptMissingError(SfPipelinesError, LookupError, kind="receipt.missing"):
    """A stage was asked for before the stage that it builds on."""


# The gate said no.


class GateError(SfPipelinesError, kind="gate"):
    """A snapshot may not be published."""


class GateFailedError(GateError, kind="gate.failed"):
    """A required check failed on this manifest."""


class GateMissingError(GateError, kind="gate.missing"):
    """A required check has no verdict for this manifest."""


# Somebody else was first.


class PublishConflictError(SfPipelinesError, kind="publish.conflict"):
    """The current pointer moved since this build was scanned.

    Attributes:
        ours: run id that lost.
        theirs: run id that the pointer names, or None when the pointer is gone.
    """

    def __init__(self, message: str, *, ours: str, theirs: str | None) -> None:
        super().__init__(message)
        self.ours = ours
        self.theirs = theirs

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_conflict, (str(self), self.ours, self.theirs)


def _rebuild_conflict(message: str, ours: str, theirs: str | None) -> PublishConflictError:
    return PublishConflictError(message, ours=ours, theirs=theirs)


# Fix the call.


class OperationError(SfPipelinesError, kind="operation"):
    """An operation on published snapshots cannot do what was asked."""


class RunNotFoundError(OperationError, LookupError, kind="operation.no_run"):
    """No published snapshot is of the run that was named."""


class ReaderError(SfPipelinesError, kind="reader"):
    """A reader cannot do what was asked in its present state."""


class ReaderClosedError(ReaderError, kind="reader.closed"):
    """The reader was closed."""


class SnapshotNotFoundError(ReaderError, FileNotFoundError, kind="reader.no_snapshot"):
    """Nothing has been published under this root."""


class SnapshotKindError(ReaderError, kind="reader.snapshot_kind"):
    """The snapshot is of a kind that this reader does not serve."""


class QueryError(ReaderError, ValueError, kind="reader.query"):
    """A query or search option is wrong."""


class NoShardError(QueryError, kind="reader.query.no_shard"):
    """The values are of the right types, but the sharding expression gives no shard for them."""


class RateLimitError(ReaderError, TimeoutError, kind="reader.rate_limit", retryable=True):
    """The rate limiter would have made the caller wait longer than its timeout; no tokens were taken."""


class DeadlineError(ReaderError, TimeoutError, kind="reader.deadline", retryable=True):
    """The answer was not there when its time was up. Shards that were being opened go on opening."""


class ReaderForkedError(ReaderError, RuntimeError, kind="reader.forked"):
    """The reader, or a library that it needs, was in use when this process was forked; locks and threads are lost."""


# Look at the engine.


class EngineError(SfPipelinesError, RuntimeError, kind="engine"):
    """The engine that the build is spread over cannot be used."""


class MissingExtraError(EngineError, ImportError, kind="engine.missing_extra"):
    """A package that an engine needs is not installed; the message names the extra to install."""


class WorkerLostError(EngineError, kind="engine.worker_lost", retryable=True):
    """A worker was lost in the middle of a task."""


class TaskCrashedError(EngineError, kind="engine.task_crashed"):
    """A task ended in an error that nobody expects."""


class TasksFailedError(EngineError, kind="engine.tasks_failed"):
    """Tasks failed for good, after those failures that may pass were tried again.

    Attributes:
        causes: error of each task that failed, by its label, as in ``shard 3``.
    """

    def __init__(self, message: str, causes: dict[str, Exception]) -> None:
        super().__init__(message)
        self.causes = causes

    def __reduce__(self) -> tuple[object, ...]:
        return TasksFailedError, (str(self), self.causes)


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust met a bug of its own: what Python sees of that is no ``Exception``."""
    return type(error).__name__ == "PanicException"


def error_of_kind(kind: str, message: str) -> SfPipelinesError:
    """A typed error that has come from another process, by its ``kind`` and what it said."""
    classes = [SfPipelinesError]
    for found in classes:
        classes.extend(found.__subclasses__())
        # Those with more to say than a message are raised by no task. Builtin bases have an initialiser each.
        ours = set(found.__mro__).intersection(classes) - {SfPipelinesError}
        if found.kind == kind and not any("__init__" in vars(base) for base in ours):
            return found(message)
    return SfPipelinesError(message)
