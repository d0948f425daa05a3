"""A rebuild when the source's files change.

The sensor remembers one fingerprint of the whole set of files. So it notices deleted files, rewritten files and late
files with an old date, and requests one build for any number of changed files.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Self

import dagster as dg
from pydantic import ValidationError

from sf_pipelines.orchestration.graph import Graph
from sf_pipelines.orchestration.options import SourceSensorOptions
from sf_pipelines.snapshot.config import digest_json
from sf_pipelines.snapshot.errors import ConfigError, SourceNotFoundError
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.model import Model
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import ScanReceipt
from sf_pipelines.snapshot.source.files import SourceFile, find_files
from sf_pipelines.snapshot.store import ObjectInfo, Store

FILES_TAG = "sf_pipelines/source_files"
CHANGE_TAG = "sf_pipelines/source_change"

# Runs for one change of the source, the first one and re-executions by hand included.
_ATTEMPTS = 3

_UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_WAITING = {dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED}
# Dagster's default launcher does not notice a run that died with its machine: such a run must not block builds forever.
SILENCE = timedelta(hours=1)


Action = Literal["adopt", "build", "unchanged", "settle", "busy"]


class SourceCursor(Model):
    """What the sensor remembers.

    Attributes:
        version: of these fields.
        handled: fingerprint of the files of the last requested build, or of those that the first tick found built.
        generation: number of requested builds; makes each run key new, also when old files come back.
        pending: fingerprint of a change that has not settled yet.
        pending_since: when it was first seen, seconds since 1970.
    """

    version: Literal[1] = 1
    handled: str | None = None
    generation: int = 0
    pending: str | None = None
    pending_since: float = 0.0

    @classmethod
    def read(cls, text: str | None) -> Self:
        """The cursor that Dagster kept; refuses one that is not of this sensor."""
        if not text:
            return cls()
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(
                f"the cursor {text!r:.80} is not one of this sensor; clear it in the UI, and the sensor starts again"
            ) from error


@dataclass(frozen=True)
class Decision:
    """What to do, and what to remember.

    Attributes:
        action: ``adopt``: these files are built already; ``build``; ``unchanged``; ``settle``: wait until the files
            stay the same; ``busy``: wait until the running build has ended.
        cursor: to be kept.
        wait: seconds left to settle.
    """

    action: Action
    cursor: SourceCursor
    wait: float = 0.0


def fingerprint(source: str, files: Iterable[ObjectInfo | SourceFile]) -> str:
    """Digest of a set of files: keys, sizes and version tags (S3: etag; local disk: inode, time of writing, size)."""
    return digest_json([source, sorted((file.key, file.size, file.etag or "") for file in files)])


def decide(
    cursor: SourceCursor, found: str, *, now: float, settle_seconds: float, built: str | None, busy: bool
) -> Decision:
    """What to do about the files that are there now."""
    settled = SourceCursor(handled=found, generation=cursor.generation)
    if found == cursor.handled:
        return Decision("unchanged", settled)
    if cursor.handled is None and found == built:
        return Decision("adopt", settled)
    if found != cursor.pending:
        cursor = cursor.model_copy(update={"pending": found, "pending_since": now})
    # A clock that was set back must not prolong the wait.
    wait = min(settle_seconds, cursor.pending_since + settle_seconds - now)
    if wait > 0:
        return Decision("settle", cursor, wait)
    if busy:
        return Decision("busy", cursor)
    return Decision("build", settled.model_copy(update={"generation": cursor.generation + 1}))


def build_source_sensor(graph: Graph, options: SourceSensorOptions, own: Sequence[dg.AssetKey]) -> dg.SensorDefinition:
    """The sensor; ``own`` are the snapshot's assets, without those that write the source."""

    @dg.sensor(
        name=graph.part("source_sensor"),
        job_name=graph.job("build"),
        minimum_interval_seconds=options.interval_seconds,
        default_status=options.dagster_status,
        required_resource_keys={graph.resource},
        description=f"Builds the snapshot {graph.config.name!r} when its source changes, "
        f"{options.settle_seconds:g} s after the last change.",
    )
    def source_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        access = graph.access(context)
        # A source or store that cannot be read fails the tick: Dagster then keeps the old cursor.
        cursor, source = SourceCursor.read(context.cursor), access.config.source
        try:
            _, files = find_files(source, access.config.s3)
        except SourceNotFoundError as error:
            return dg.SensorResult(skip_reason=f"{error}; what is published stays", cursor=context.cursor)
        decision = decide(
            cursor,
            fingerprint(source, files),
            now=time.time(),
            settle_seconds=options.settle_seconds,
            built=_built_from(access.find_store(), source) if cursor.handled is None else None,
            busy=_is_building(context.instance, graph),
        )
        change = f"{graph.scope}:{decision.cursor.generation}:{decision.cursor.handled}"
        attempt = 1 if decision.action == "build" else None
        if decision.action == "unchanged":
            attempt = _next_attempt(context.instance, change)
        kept = decision.cursor.model_dump_json()
        if attempt is None:
            return dg.SensorResult(skip_reason=_skip_reason(decision, len(files)), cursor=kept)
        request = dg.RunRequest(
            # A key is good for one run, failed or not.
            run_key=change if attempt == 1 else f"{change}:{attempt}",
            tags=graph.run_tags | {FILES_TAG: str(len(files)), CHANGE_TAG: change},
            # The source is there already. If the run wrote it again, its own writing would be the next change.
            asset_selection=list(own) if graph.options.refresh_source else None,
        )
        return dg.SensorResult(run_requests=[request], cursor=kept)

    return source_sensor


def _built_from(store: Store | None, source: str) -> str | None:
    """Fingerprint of the files of the current snapshot; None where that is not known."""
    pointer = read_pointer(store).pointer if store else None
    scanned = Ledger(store, pointer.run_id).find(ScanReceipt) if store and pointer else None
    return None if scanned is None else fingerprint(source, scanned.listing.files)


def _is_building(instance: dg.DagsterInstance, graph: Graph) -> bool:
    """Whether a run of the snapshot, also one of a backfill, is queued or has logged something within ``SILENCE``."""

    def is_alive(record: dg.RunRecord) -> bool:
        if record.dagster_run.status in _WAITING:
            return True
        last = instance.get_records_for_run(record.dagster_run.run_id, limit=1, ascending=False).records
        last_event = last[0].timestamp if last else record.create_timestamp.timestamp()
        return time.time() - last_event < SILENCE.total_seconds()

    unfinished = instance.get_run_records(dg.RunsFilter(statuses=_UNFINISHED))
    return any(graph.is_built_by(record.dagster_run) and is_alive(record) for record in unfinished)


def _next_attempt(instance: dg.DagsterInstance, change: str) -> int | None:
    """Number of the next run for the same files, where the last one failed for a reason that may pass; else None."""
    records = instance.get_run_records(dg.RunsFilter(tags={CHANGE_TAG: change}))
    if not 0 < len(records) < _ATTEMPTS or records[0].dagster_run.status != dg.DagsterRunStatus.FAILURE:
        return None
    logs = instance.all_logs(records[0].dagster_run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    failures = [entry.dagster_event.step_failure_data.user_failure_data for entry in logs if entry.dagster_event]
    # What a typed error says of itself (see resources.surfaced).
    retryable = [failure.metadata.get("retryable") if failure else None for failure in failures]
    may_pass = bool(retryable) and all(flag is not None and flag.value is True for flag in retryable)
    return len(records) + 1 if may_pass else None


def _skip_reason(decision: Decision, count: int) -> str:
    files = "1 file" if count == 1 else f"{count:,} files"
    return {
        "adopt": f"The current snapshot was built from exactly these {files}; from now on, changes are built.",
        "unchanged": f"Nothing has changed: the same {files} as at the last requested build.",
        "settle": f"The source has changed ({files} now); a build starts when it has stayed the same for another "
        f"{decision.wait:.0f} s.",
        "busy": f"The source has changed ({files} now), but a build is running; the next one starts after it.",
    }[decision.action]
