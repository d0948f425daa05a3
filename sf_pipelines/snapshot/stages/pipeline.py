"""The whole build without Dagster."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.gate.verdicts import Verdict
from sf_pipelines.snapshot.manifest.models import CurvePoint
from sf_pipelines.snapshot.routing import needs_training
from sf_pipelines.snapshot.run.build import Build, Progress, Stopwatch
from sf_pipelines.snapshot.run.receipts import ShardReceipt
from sf_pipelines.snapshot.run.tasks import Engine

_Done = TypeVar("_Done")


@dataclass(frozen=True)
class BuildResult:
    """What a build did.

    Attributes:
        run_id: the snapshot that is published now.
        manifest_ref: address of its manifest.
        published: whether this build moved the pointer; if not, ``reason`` says why.
        reason: why nothing was done, else empty.
        held: whether nothing was published because a rollback holds this build; then rows, shards and figures are
            those of the build that is held back.
        previous_run_id: snapshot that was served before.
        seq: the pointer's sequence number.
        rows: rows in the snapshot.
        rejected: rows turned away; the scan's staging folder holds the table.
        shards: one receipt per shard, empty ones too.
        num_probes: shards that a reader asks by default.
        recall: recall@k of the judging queries at that number of probes.
        recall_lower: its lower confidence bound.
        curve: recall of the tuning queries at each number of probes.
        verdicts: of all checks.
        durations: seconds of each stage.
        sizing: why there are so many shards, where ``num_dbs`` is ``auto``.
    """

    run_id: str
    manifest_ref: str
    published: bool
    reason: str
    previous_run_id: str | None
    seq: int
    rows: int
    rejected: int
    shards: tuple[ShardReceipt, ...] = field(repr=False)
    num_probes: int
    recall: float
    recall_lower: float
    curve: tuple[CurvePoint, ...] = field(repr=False)
    verdicts: tuple[Verdict, ...] = field(repr=False)
    durations: dict[str, float] = field(repr=False)
    held: bool = False
    sizing: str = ""


def run_build(
    config: WriteConfig,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
    force: bool = False,
    cache_dir: Path | None = None,
    parts: tuple[str, ...] | None = None,
) -> BuildResult:
    """Builds, gates and publishes one snapshot; goes on with an unfinished build of the same source and config.

    Args:
        config: what to build.
        engine: where rows are routed and shards are built; None is this process.
        progress: told how far each stage is.
        force: build and publish again although nothing is new, taking nothing over from the current snapshot. What a
            rollback holds stays held until ``release``.
        cache_dir: folder for verified copies of shards; None is the readers' default.
        parts: keys in the store of what an engine's frame was written to; None reads ``config.source``.

    Returns:
        What is published now, and whether this call published it.

    Raises:
        SfPipelinesError: see its subclasses; the previous snapshot keeps serving.
    """
    with Build(config, progress=progress, cache_dir=cache_dir) as build:
        return _run(build, engine, force=force, parts=parts)


def _run(build: Build, engine: Engine | None, *, force: bool, parts: tuple[str, ...] | None) -> BuildResult:
    durations: dict[str, float] = {}

    def timed(name: str, work: Callable[[], _Done]) -> _Done:
        watch = Stopwatch()
        # Named before it says how far it is: a stage may have libraries to load, or one long piece of work.
        build.report(name, 0, None, "")
        done = work()
        durations[name] = watch.seconds
        return done

    scanned = timed("scan", lambda: stages.scan(build, force=force, parts=parts))
    run_id, every = scanned.run_id, range(build.config.shards)
    sampled = timed("sample", lambda: stages.sample(build, run_id))
    if needs_training(build.config.sharding):
        timed("train", lambda: stages.train(build, run_id))
    timed("route", lambda: stages.route(build, run_id, engine=engine))
    shards = timed("shards", lambda: stages.build_shards(build, run_id, every, engine=engine))
    manifest = timed("assemble", lambda: stages.assemble(build, run_id))
    # A damaged shard of a published run was rebuilt in its successor.
    verdicts = timed("gate", lambda: stages.gate(build, manifest.run_id))
    promoted = timed("promote", lambda: stages.promote(build, manifest.run_id))
    recall = next(verdict for verdict in verdicts if verdict.name == "recall")
    return BuildResult(
        run_id=promoted.run_id,
        manifest_ref=promoted.manifest_ref,
        published=promoted.published,
        reason="" if promoted.published else promoted.reason if promoted.held else scanned.reason,
        previous_run_id=promoted.previous_run_id,
        seq=promoted.seq,
        rows=manifest.rows,
        rejected=sampled.rejected,
        shards=tuple(shards),
        num_probes=manifest.num_probes,
        recall=float(recall.figures["recall"]),
        recall_lower=float(recall.figures["lower_bound"]),
        curve=manifest.curve,
        verdicts=tuple(verdicts),
        durations=durations,
        held=promoted.held,
        sizing=scanned.sizing,
    )
