"""A rebuild when the source's files change."""

import time
from collections.abc import Sequence
from datetime import timedelta

import dagster as dg

from sf_pipelines.orchestration.graph import Graph
from sf_pipelines.orchestration.options import SourceSensorOptions, sensor_status
from sf_pipelines.orchestration.resources import SnapshotAccess
from sf_pipelines.orchestration.source_watch import Decision, SourceCursor, decide, fingerprint
from sf_pipelines.snapshot.errors import SourceNotFoundError
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import ScanReceipt
from sf_pipelines.snapshot.source.files import find_files
from sf_pipelines.snapshot.store import ObjectInfo

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
# Dagster's default launcher never notices that a run died with its machine: the run counts as started for ever, and
# would hold back every build after it.
SILENCE = timedelta(hours=1)


def build_source_sensor(graph: Graph, options: SourceSensorOptions, own: Sequence[dg.AssetKey]) -> dg.SensorDefinition:
    """The sensor; what it remembers and decides is in ``source_watch``.

    Args:
        graph: of the snapshot.
        options: of the sensor.
        own: keys of the snapshot's assets, without those that write the source.
    """
    names = graph.names

    @dg.sensor(
        name=names.source_sensor,
        job_name=names.job,
        minimum_interval_seconds=options.interval_seconds,
        default_status=sensor_status(options.default_status),
        required_resource_keys={names.resource},
        description=f"Builds the snapshot {names.name!r} when its source changes, {options.settle_seconds:g} s after "
        "the last change.",
    )
    def source_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        access: SnapshotAccess = getattr(context.resources, names.resource)
        # A source or store that cannot be read is an error of this tick: Dagster then keeps the old cursor.
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
            built=_built_from(access, source) if cursor.handled is None else None,
            busy=_is_building(context.instance, graph),
        )
        kept = decision.cursor.model_dump_json()
        if decision.action == "build":
            return dg.SensorResult(run_requests=[_run_request(graph, decision, files, own, 1)], cursor=kept)
        attempt = _next_attempt(context.instance, graph, decision) if decision.action == "unchanged" else None
        if attempt is not None:
            return dg.SensorResult(run_requests=[_run_request(graph, decision, files, own, attempt)], cursor=kept)
        return dg.SensorResult(skip_reason=_why_not(decision, len(files)), cursor=kept)

    return source_sensor


def _built_from(access: SnapshotAccess, source: str) -> str | None:
    """Fingerprint of the files that the current snapshot was built from; None where that is not known."""
    store = access.find_store()
    pointer = read_pointer(store).pointer if store else None
    scanned = Ledger(store, pointer.run_id).find(ScanReceipt) if store and pointer else None
    return None if scanned is None else fingerprint(source, scanned.listing.files)


def _is_building(instance: dg.DagsterInstance, graph: Graph) -> bool:
    """Whether a run of the job, or one of selected assets of the snapshot (also of a backfill), goes on."""
    unfinished = instance.get_run_records(dg.RunsFilter(statuses=_UNFINISHED))
    return any(graph.is_built_by(record.dagster_run) and _is_heard_of(instance, record) for record in unfinished)


def _is_heard_of(instance: dg.DagsterInstance, record: dg.RunRecord) -> bool:
    """Whether a run waits to be started, or has written an event or a line of its log lately."""
    if record.dagster_run.status in _WAITING:
        return True
    last = instance.get_records_for_run(record.dagster_run.run_id, limit=1, ascending=False).records
    heard = last[0].timestamp if last else record.create_timestamp.timestamp()
    return time.time() - heard < SILENCE.total_seconds()


def _next_attempt(instance: dg.DagsterInstance, graph: Graph, decision: Decision) -> int | None:
    """Number of the next run for the same files, where the last one failed for a reason that may pass; else None."""
    wanted = dg.RunsFilter(tags={CHANGE_TAG: _change(graph, decision)})
    runs = [record.dagster_run for record in instance.get_run_records(wanted)]
    if not 0 < len(runs) < _ATTEMPTS or runs[0].status != dg.DagsterRunStatus.FAILURE:
        return None
    found = instance.all_logs(runs[0].run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    events = [entry.dagster_event for entry in found if entry.dagster_event is not None]
    return len(runs) + 1 if events and all(map(_may_pass, events)) else None


def _may_pass(event: dg.DagsterEvent) -> bool:
    """Whether a step failed by a typed error that calls itself retryable."""
    failure = event.step_failure_data.user_failure_data
    said = failure.metadata.get("retryable") if failure else None
    return said is not None and said.value is True


def _change(graph: Graph, decision: Decision) -> str:
    cursor = decision.cursor
    return f"{graph.names.scope}:{cursor.generation}:{cursor.handled}"


def _run_request(
    graph: Graph, decision: Decision, files: list[ObjectInfo], own: Sequence[dg.AssetKey], attempt: int
) -> dg.RunRequest:
    change = _change(graph, decision)
    return dg.RunRequest(
        # A key is good for one run, failed or not.
        run_key=change if attempt == 1 else f"{change}:{attempt}",
        tags=graph.names.run_tags | {FILES_TAG: str(len(files)), CHANGE_TAG: change},
        # The source is there already. If the run wrote it again, its own writing would be the next change.
        asset_selection=list(own) if graph.options.refresh_source else None,
    )


def _why_not(decision: Decision, count: int) -> str:
    files = "1 file" if count == 1 else f"{count:,} files"
    return {
        "adopt": f"The current snapshot was built from exactly these {files}; from now on, changes are built.",
        "unchanged": f"Nothing has changed: the same {files} as when a build was last asked for.",
        "settle": f"The source has changed ({files} now); a build starts when it has stayed the same for another "
        f"{decision.wait:.0f} s.",
        "busy": f"The source has changed ({files} now), but a build is going on; the next one starts after it.",
    }[decision.action]
