"""Operations on a published snapshot as Dagster jobs of one op each.

Each op calls one function of the core and turns its result into metadata. The jobs act on the store; no asset needs to
be materialized.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from sf_pipelines.orchestration.graph import OPERATED_TAG, OPERATION_TAG, RETRY, Graph
from sf_pipelines.orchestration.metadata import Metadata, markdown, readable, table
from sf_pipelines.orchestration.pointer_sensor import report_move
from sf_pipelines.orchestration.resources import SnapshotAccess, log_progress, surfaced
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import OperationError
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.operations.cleanup import CleanupReport, cleanup
from sf_pipelines.snapshot.operations.diff import SnapshotDiff, diff
from sf_pipelines.snapshot.operations.pins import pin, unpin
from sf_pipelines.snapshot.operations.rollback import open_published, release, rollback
from sf_pipelines.snapshot.operations.verify import verify_snapshot

_TABLE_ROWS = 100


class RollbackConfig(dg.Config):
    """Where to roll back to: say ``run_id`` or ``back``."""

    # No nulls: the launchpad fills in only defaults that are not null, and must show both.
    run_id: str = Field(default="", description="Published run to go to, forward too; empty goes by back.")
    back: int = Field(default=0, description="How many snapshots back in what was served; 0 goes by run_id.")
    deep: bool = Field(default=False, description="Read and hash every object of the target first.")


class PinConfig(dg.Config):
    """What to keep."""

    run_id: str = Field(description="Published run that no cleanup may remove.")
    reason: str = Field(description="Why, for those who come later.")


class UnpinConfig(dg.Config):
    """What need not be kept any more."""

    run_id: str = Field(description="Run that is pinned.")


class CleanupConfig(dg.Config):
    """What to keep; as it stands nothing is removed, only shown."""

    keep: int = Field(default=3, description="Published snapshots to keep, the current one included.")
    older_than_days: float | None = Field(default=None, description="Keep all that were built in so many days, too.")
    stale_after_days: float = Field(
        default=7.0, description="Age in days of failed builds, routed rows and left-over files that may go."
    )
    dry_run: bool = Field(default=True, description="Only show what would go, and how many bytes.")


class DiffConfig(dg.Config):
    """Which two snapshots to compare."""

    before: str | None = Field(default=None, description="Run; null is what was served before the current one.")
    after: str | None = Field(default=None, description="Run; null is the current one.")
    ids: bool = Field(default=True, description="Compare rows by id; reads every shard of both.")
    answers: bool = Field(default=True, description="Compare the answers to the newer one's query sample.")


class VerifyConfig(dg.Config):
    """Which snapshot to look at."""

    manifest: str | None = Field(
        default=None, description="Key of a manifest, as diff and history show it; null is the current one."
    )


@dataclass(frozen=True)
class _Run:
    """A run of an operation: the context of its op, the graph, and access to the snapshot."""

    context: dg.OpExecutionContext
    graph: Graph
    access: SnapshotAccess

    @property
    def log(self) -> Any:
        return self.context.log

    @property
    def root(self) -> str:
        return self.access.config.store

    @property
    def s3(self) -> S3Options | None:
        return self.access.config.s3

    @property
    def watched(self) -> dict[str, Any]:
        """Credentials, and progress into the run's log."""
        return {"s3": self.s3, "progress": log_progress(self.log)}

    def observe(self, metadata: Metadata) -> None:
        """Notes figures on the pointer's asset, where they are plotted over time."""
        key = self.graph.asset("current_pointer")
        self.context.log_event(dg.AssetObservation(key, metadata=readable(metadata)))


@dataclass(frozen=True)
class _Operation:
    """One job.

    Attributes:
        noun: first part of its name.
        config: what can be set at launch.
        work: does it; returns what the op's output shows.
        description: shown in the UI.
        reads_shards: whether it takes a place in the pool of the steps that build shards.
        repeatable: whether a retry does the same as the first try.
    """

    noun: str
    config: type[dg.Config] | None
    work: Callable[[_Run, Any], Metadata]
    description: str
    reads_shards: bool = False
    repeatable: bool = True


def _rollback(run: _Run, config: RollbackConfig) -> Metadata:
    if bool(config.run_id) == bool(config.back):
        raise OperationError("say where to roll back to: run_id (a published run) or back (a number of snapshots)")
    steps = {"back": config.back} if config.back else {}
    done = rollback(run.root, config.run_id or None, deep=config.deep, **steps, **run.watched)
    pointer = read_pointer(open_published(run.root, run.s3)).pointer
    # As a build versions it; unknown where the pointer has moved on already.
    digest = pointer.manifest_digest if pointer and pointer.seq == done.seq else None
    metadata: Metadata = {
        "run_id": done.run_id,
        "previous_run_id": done.previous_run_id or "(none)",
        "seq": done.seq,
        "manifest": done.manifest_key,
        "withdrawn": list(done.withdrawn),
        "held": [hold.build_key for hold in done.holds],
        "objects": done.checked.objects,
        "bytes": done.checked.bytes,
        "hashed": done.checked.hashed,
    }
    event = dg.AssetMaterialization(
        run.graph.asset("current_pointer"),
        description=f"Rolled back to {done.run_id}.",
        metadata=readable({"published": True, "dagster/uri": run.root, **metadata}),
        tags={"dagster/data_version": digest} if digest else None,
    )
    run.context.log_event(event)
    with run.access.build(run.log) as build:
        report_move(run.context, run.graph, build)
    run.log.info("%s is current now; before: %s", done.run_id, done.previous_run_id)
    return metadata


def _release(run: _Run, _config: None) -> Metadata:
    done = release(run.root, s3=run.s3)
    released = [hold.build_key for hold in done.released]
    metadata: Metadata = {"run_id": done.run_id, "released": released}
    metadata |= {} if done.seq is None else {"seq": done.seq}
    run.observe(metadata)
    run.log.info("released: %s; %s stays current", ", ".join(released) or "nothing was held", done.run_id)
    return metadata


def _pin(run: _Run, config: PinConfig) -> Metadata:
    made = pin(run.root, config.run_id, config.reason, s3=run.s3)
    run.log.info("pinned %s: %s", made.run_id, made.reason)
    return {"run_id": made.run_id, "reason": made.reason, "pinned_at": made.pinned_at.isoformat()}


def _unpin(run: _Run, config: UnpinConfig) -> Metadata:
    done = unpin(run.root, config.run_id, s3=run.s3)
    run.log.info("unpinned %s; it was pinned for: %s", done.run_id, done.reason)
    return {"run_id": done.run_id, "reason": done.reason}


def _cleanup(run: _Run, config: CleanupConfig) -> Metadata:
    done = cleanup(
        run.root,
        keep=config.keep,
        older_than=_days(config.older_than_days, "older_than_days"),
        stale_after=_days(config.stale_after_days, "stale_after_days") or timedelta(0),
        dry_run=config.dry_run,
        s3=run.s3,
    )
    metadata = _cleanup_metadata(done)
    if done.applied:
        run.observe(metadata)
        run.log.info("removed %s of %s bytes", f"{done.bytes_freed:,}", f"{done.bytes:,}")
    else:
        run.log.info(
            "would remove %s objects, %s bytes; nothing was changed: dry_run: false does it",
            f"{done.objects:,}",
            f"{done.bytes:,}",
        )
    for group in done.groups:
        if group.refused is not None:
            run.log.warning("%s of %s stays: %s", group.rule, group.run_id or "the root", group.refused)
    return metadata


def _days(count: float | None, field: str) -> timedelta | None:
    try:
        return None if count is None else timedelta(days=count)
    except (OverflowError, ValueError) as error:
        raise OperationError(f"{field} {count!r} is no number of days") from error


def _cleanup_metadata(done: CleanupReport) -> Metadata:
    rows = [
        {
            "rule": group.rule,
            "run_id": group.run_id or "",
            "objects": group.objects,
            "bytes": group.bytes,
            "why": group.refused or group.why,
            "stays": group.refused is not None,
        }
        for group in done.groups[:_TABLE_ROWS]
    ]
    stays = [{"what": what, "why": why} for what, why in (*done.kept.items(), *done.left_alone.items())]
    return {
        "dry_run": not done.applied,
        "objects": done.objects,
        "bytes": done.bytes,
        "freed_bytes": done.bytes_freed,
        "groups_that_stayed": sum(group.refused is not None for group in done.groups),
        "groups": table(rows),
        "stays": table(stays[:_TABLE_ROWS]),
    }


def _diff(run: _Run, config: DiffConfig) -> Metadata:
    found = diff(run.root, config.before, config.after, ids=config.ids, answers=config.answers, **run.watched)
    for note in found.notes:
        run.log.info("not compared: %s", note)
    summary = markdown(_diff_summary(found))
    run.log.info("what differs:\n%s", summary)
    return {"summary": dg.MetadataValue.md(summary), **dict(_diff_metadata(found))}


def _diff_summary(found: SnapshotDiff) -> list[dict[str, Any]]:
    """Both snapshots side by side, one figure a row."""
    sides = (found.before, found.after)
    figures = {
        "run": [side.run_id for side in sides],
        "recall": [side.recall.recall if side.recall else None for side in sides],
        "rows": [side.rows for side in sides],
        "MiB": [(side.bytes or 0) / 2**20 for side in sides],
    }
    rows: list[dict[str, Any]] = [{"": name, "before": old, "after": new} for name, (old, new) in figures.items()]
    if found.ids is not None:
        rows.append({"": "rows of one alone", "before": found.ids.gone, "after": found.ids.added})
    rows += [{"": one.name, "before": str(one.before), "after": str(one.after)} for one in found.config]
    return rows


def _diff_metadata(found: SnapshotDiff) -> Iterator[tuple[str, Any]]:
    for side, one in (("before", found.before), ("after", found.after)):
        yield f"{side}", one.run_id
        yield f"{side}_manifest", one.manifest_key
        yield f"{side}_rows", one.rows
        yield f"{side}_bytes", one.bytes
        if one.recall is not None:
            yield f"{side}_recall", one.recall.recall
    if found.ids is not None:
        yield from {"added": found.ids.added, "gone": found.ids.gone, "kept": found.ids.kept}.items()
    if found.overlap is not None:
        yield f"overlap_at_{found.overlap.k}", found.overlap.mean
    if found.routing is not None:
        yield f"{found.routing.artifact}_shift_mean", found.routing.mean
        yield f"{found.routing.artifact}_shift_largest", found.routing.largest
    settings = [{"setting": one.name, "before": str(one.before), "after": str(one.after)} for one in found.config]
    yield "settings_that_differ", table(settings)
    yield "shards", table([vars(shard) for shard in found.shards[:_TABLE_ROWS]])
    yield "notes", list(found.notes)


def _verify(run: _Run, config: VerifyConfig) -> Metadata:
    found = verify_snapshot(run.root, manifest_key=config.manifest, **run.watched)
    metadata: Metadata = {
        "run_id": found.run_id,
        "manifest": found.manifest_key,
        "shards": found.shards,
        "rows": found.rows,
        "objects": found.objects,
        "bytes": found.bytes,
        "faults": len(found.faults),
    }
    if found.recall is not None and found.recall_lower is not None:
        metadata |= {"recall": found.recall, "recall_lower_bound": found.recall_lower}
    run.observe({"verified": found.passed, **metadata})
    if not found.passed:
        raise dg.Failure(
            description=f"run {found.run_id!r}: {len(found.faults)} faults: {'; '.join(found.faults[:5])}",
            metadata={**metadata, "found": table([{"fault": fault} for fault in found.faults[:_TABLE_ROWS]])},
            allow_retries=False,
        )
    run.log.info("%s: all is well", found.run_id)
    return metadata


_OPERATIONS = (
    _Operation(
        "rollback",
        RollbackConfig,
        _rollback,
        "Makes an earlier snapshot current, after looking at all of its objects. What is withdrawn is held: the next "
        "build of the same source and config does not publish it again.",
        # After an answer that was lost, a second try with `back` would go one snapshot too far.
        repeatable=False,
    ),
    _Operation("release", None, _release, "Lifts what rollbacks hold: the next build may publish it again."),
    _Operation("pin", PinConfig, _pin, "Keeps a published snapshot from being cleaned up."),
    _Operation("unpin", UnpinConfig, _unpin, "Lets cleanups remove a snapshot again."),
    _Operation(
        "cleanup",
        CleanupConfig,
        _cleanup,
        "Shows what nobody needs any more, and how many bytes; removes it with dry_run: false. Never the current "
        "snapshot, pinned ones, or running builds.",
    ),
    _Operation(
        "diff",
        DiffConfig,
        _diff,
        "Compares two snapshots: settings, rows, shards, routing, recall, answers.",
        reads_shards=True,
    ),
    _Operation(
        "verify",
        VerifyConfig,
        _verify,
        "Hashes every object again, opens every shard, counts rows, measures recall; fails when anything is off.",
        reads_shards=True,
    ),
)


def build_operation_jobs(graph: Graph) -> list[dg.JobDefinition]:
    """The jobs ``rollback_<name>``, ``release_<name>``, ``pin_<name>`` and so on."""
    return [_job(graph, operation) for operation in _OPERATIONS]


def _job(graph: Graph, operation: _Operation) -> dg.JobDefinition:
    tags = {OPERATION_TAG: operation.noun, OPERATED_TAG: graph.config.name}

    @dg.op(
        # A job and an op must not share a name.
        name=graph.part(operation.noun),
        config_schema=operation.config.to_config_schema() if operation.config else None,
        out=dg.Out(dg.Nothing),
        required_resource_keys={graph.resource},
        description=operation.description,
        tags=tags,
        pool=graph.pool if operation.reads_shards else None,
        retry_policy=RETRY if operation.repeatable else None,
    )
    def operate(context: dg.OpExecutionContext) -> None:
        with surfaced():
            config = operation.config(**context.op_config) if operation.config else None
            context.add_output_metadata(readable(operation.work(_Run(context, graph, graph.access(context)), config)))

    job_name = graph.job(operation.noun)

    @dg.job(name=job_name, description=operation.description, tags=tags, executor_def=graph.executor)
    def job() -> None:
        operate()

    return job
