"""The assets of one snapshot, their checks, and ``build_now``, which makes all of them in one step.

Each asset runs one stage and turns its receipt into metadata. ``build_now_<name>`` exists because Dagster's UI has no
Launchpad for jobs over partitioned assets. It runs the same stages and writes the same events and references, so
single assets can be materialized after it; a run that failed goes on from the receipts in the store.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import dagster as dg

from sf_pipelines.orchestration.graph import RETRY, Graph, freshness_of
from sf_pipelines.orchestration.io_manager import Reference, keep_latest
from sf_pipelines.orchestration.metadata import (
    data_version,
    event_metadata,
    materialization,
    reference,
    verdict_metadata,
)
from sf_pipelines.orchestration.pointer_sensor import report_move
from sf_pipelines.orchestration.shards import seal_shards
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.errors import GateFailedError, ReceiptMissingError
from sf_pipelines.snapshot.gate.verdicts import CHECKS, RUNNERS, Verdict, required_checks
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import Receipt, ScanReceipt
from sf_pipelines.snapshot.run.tasks import Engine

Events = Iterator[dg.AssetMaterialization | dg.AssetCheckEvaluation | dg.Output[None]]


class ScanOptions(dg.Config):
    """Launchpad options of ``source_vectors``.

    Attributes:
        force: build again although nothing is new.
    """

    force: bool = False


@dataclass(frozen=True)
class Step:
    """An unpartitioned asset: the asset before it and the stage that makes it."""

    noun: str
    after: str
    stage: str
    kind: str
    description: str

    def run(
        self,
        context: dg.OpExecutionContext | dg.AssetExecutionContext,
        graph: Graph,
        build: Build,
        run_id: str,
        *,
        engine: Engine | None,
        force: bool = False,
    ) -> Receipt:
        """Runs the stage; ``run_id`` is empty for the scan, which finds or makes the run."""
        options = {"scan": {"force": force}, "route": {"engine": engine}}.get(self.stage, {})
        work = partial(getattr(stages, self.stage), build, *([run_id] if run_id else []), **options)
        receipt: Receipt = graph.execute(context, self.stage, work)
        if isinstance(receipt, ScanReceipt):
            graph.set_partitions(context.instance, build.config.shards)
            if receipt.sizing:
                context.log.info("%s", receipt.sizing)
        if receipt.reason:
            context.log.info("%s", receipt.reason)
        if self.stage == "promote":
            report_move(context, graph, build)
        return receipt


_BEFORE_TRAINING = (
    Step(
        "source_vectors",
        "",
        "scan",
        "parquet",
        "The source files, pinned: what a build reads is exactly these versions.",
    ),
    Step(
        "training_data",
        "source_vectors",
        "sample",
        "arrow",
        "Every row validated against the data contract; rejects with reasons; the training and the query sample.",
    ),
)
_TRAINED = {
    "cluster": Step(
        "centroids",
        "training_data",
        "train",
        "scikitlearn",
        "One k-means centre a shard: they say which shard holds which vector.",
    ),
    "lsh": Step(
        "hyperplanes",
        "training_data",
        "train",
        "numpy",
        "Hyperplanes that cut the training data into balanced cells: they say which shard holds which vector.",
    ),
}
_AFTER_SHARDS = (
    Step(
        "manifest",
        "shard_indexes",
        "assemble",
        "sqlite",
        "One manifest that names all shards, staged for the checks, and the measured number of probes.",
    ),
    Step(
        "current_pointer",
        "manifest",
        "promote",
        "json",
        "The pointer that readers follow. It moves only to a manifest whose required checks have all passed; the "
        "verdicts are read from the store, so launching this asset alone publishes nothing that has not passed.",
    ),
)


def steps_of(strategy: str) -> list[Step]:
    """The unpartitioned assets in their order; a strategy that trains nothing has one less."""
    begun = [*_BEFORE_TRAINING, *([_TRAINED[strategy]] if strategy in _TRAINED else [])]
    description = "Every row sent to its shard, with a digest of each shard's rows."
    return [*begun, Step("routed_vectors", begun[-1].noun, "route", "arrow", description), *_AFTER_SHARDS]


def build_assets(graph: Graph, source_assets: Sequence[dg.AssetKey]) -> list[dg.AssetsDefinition]:
    """All assets except the partitioned ``shard_indexes``; ``source_assets`` are those that write the source."""
    scan, *later = steps_of(graph.config.sharding.strategy)

    @_asset(graph, scan, deps=list(source_assets))
    def source_vectors(context: dg.AssetExecutionContext, config: ScanOptions) -> dg.MaterializeResult:
        return _materialize(context, graph, scan, force=config.force)

    return [source_vectors, *(_step_asset(graph, step) for step in later)]


def _step_asset(graph: Graph, step: Step) -> dg.AssetsDefinition:
    @_asset(graph, step, ins={"before": dg.AssetIn(graph.asset(step.after))})
    def step_asset(context: dg.AssetExecutionContext, before: Reference) -> dg.MaterializeResult:
        return _materialize(context, graph, step, run_id=_run_of(before))

    return step_asset


def _asset(graph: Graph, step: Step, **inputs: Any) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    fresh = step.noun == "current_pointer" and graph.options.pointer_sensor is None
    return dg.asset(
        **graph.asset_settings(step.noun, {step.kind}, getattr(stages, step.stage)),
        **inputs,
        description=step.description,
        io_manager_key=graph.io_manager,
        required_resource_keys={graph.resource},
        freshness_policy=freshness_of(graph.options.freshness) if fresh else None,
        retry_policy=RETRY,
    )


def _materialize(
    context: dg.AssetExecutionContext, graph: Graph, step: Step, *, run_id: str = "", force: bool = False
) -> dg.MaterializeResult:
    with graph.build(context) as build, graph.access(context).open_engine() as engine:
        receipt = step.run(context, graph, build, run_id, engine=engine, force=force)
        return dg.MaterializeResult(
            value=reference(receipt),
            metadata=event_metadata(build, receipt),
            data_version=dg.DataVersion(data_version(receipt)),
        )


def _run_of(before: Reference) -> str:
    """The build that an asset's reference, or those of all its partitions, are of."""
    if "run_id" in before:
        return before["run_id"]
    runs: dict[str, list[str]] = {}
    for partition, value in before.items():
        runs.setdefault(value["run_id"], []).append(partition)
    if len(runs) > 1:
        shown = "; ".join(f"{run_id}: {', '.join(parts)}" for run_id, parts in sorted(runs.items()))
        raise ReceiptMissingError(
            f"the shard indexes are of {len(runs)} different builds ({shown}); materialize shard_indexes for all shards"
        )
    return next(iter(runs))


def build_checks(graph: Graph) -> dg.AssetChecksDefinition:
    """All checks as one definition; each can be executed alone. Those that the gate requires block the pointer."""
    manifest, required = graph.asset("manifest"), required_checks(Build(graph.config))
    specs = [
        dg.AssetCheckSpec(
            name,
            asset=manifest,
            blocking=name in required,
            description=(inspect.getdoc(check) or "").partition("\n\n")[0],
        )
        for name, check in RUNNERS.items()
    ]

    @dg.multi_asset_check(
        name=graph.part("gate"),
        specs=specs,
        can_subset=True,
        ins={"manifest": manifest},
        required_resource_keys={graph.resource},
    )
    def gate(context: dg.AssetCheckExecutionContext, manifest: Reference) -> Iterator[dg.AssetCheckResult]:
        selected = {key.name for key in context.selected_asset_check_keys}
        with graph.build(context) as build:
            yield from run_checks(context, graph, build, manifest["run_id"], selected)

    return gate


def run_checks(
    context: dg.OpExecutionContext | dg.AssetCheckExecutionContext,
    graph: Graph,
    build: Build,
    run_id: str,
    selected: Collection[str] = CHECKS,
) -> Iterator[dg.AssetCheckResult]:
    """Runs checks on a run's staged manifest, in their order."""
    failed: list[str] = []
    for name in (name for name in CHECKS if name in selected):
        verdict: Verdict = graph.execute(context, "check", partial(stages.check, build, run_id, name))
        log = context.log.info if verdict.passed else context.log.warning
        log("%s: %s", name, verdict.reason or verdict.message)
        if verdict.severity == "ERROR" and not verdict.passed:
            failed.append(f"{name}: {verdict.message}")
        yield dg.AssetCheckResult(
            passed=verdict.passed,
            asset_key=graph.asset("manifest"),
            check_name=name,
            severity=dg.AssetCheckSeverity[verdict.severity],
            metadata=verdict_metadata(verdict),
            description=verdict.message,
        )
    if failed:
        # The pointer waits for these checks: no later step could report this.
        error = GateFailedError(" ".join(failed))
        build.give_up(error)
        raise error


def build_now_job(graph: Graph) -> dg.JobDefinition:
    """The job ``build_now_<name>``."""
    description = (
        "Builds the snapshot in one run of one step: open the Launchpad, press Launch Run. Stages, checks and events "
        "are those of the assets."
    )

    @dg.op(
        name=graph.part("build_now"),
        out=dg.Out(dg.Nothing),
        required_resource_keys={graph.resource},
        description=description,
        pool=graph.pool,
        retry_policy=RETRY,
    )
    def build_now(context: dg.OpExecutionContext, config: ScanOptions) -> Events:
        with graph.build(context) as build, graph.access(context).open_engine() as engine:
            yield from _build_now(context, graph, build, engine, force=config.force)
        yield dg.Output(None)

    @dg.job(name=graph.job("build_now"), description=description, tags=graph.run_tags, executor_def=graph.executor)
    def job() -> None:
        build_now()

    return job


def _build_now(
    context: dg.OpExecutionContext, graph: Graph, build: Build, engine: Engine | None, *, force: bool
) -> Events:
    """Runs all stages; yields the events of their assets and checks."""
    parents, run_id, routed = [dg.AssetKey(item.split("/")) for item in graph.options.source_assets], "", ""
    for step in steps_of(build.config.sharding.strategy):
        if step.noun == "manifest":
            shards = list(range(build.config.shards))
            task = {"run_id": run_id, "routed": routed, "shards": shards, "rebuild": False}
            seal_shards(context, graph, build, engine, task, keep=True)
        if step.noun == "current_pointer":
            for result in run_checks(context, graph, build, run_id):
                yield dg.AssetCheckEvaluation(
                    asset_key=graph.asset("manifest"),
                    check_name=str(result.check_name),
                    passed=result.passed,
                    metadata=result.metadata,
                    severity=result.severity,
                    description=result.description,
                )
        receipt = step.run(context, graph, build, run_id, engine=engine, force=force)
        run_id, routed = receipt.run_id, receipt.digest
        key, parents = graph.asset(step.noun), [graph.asset(step.after)] if step.after else parents
        keep_latest(build.store, key, reference(receipt))
        yield materialization(build, receipt, key, _versions(context.instance, parents))


def _versions(instance: dg.DagsterInstance, parents: Sequence[dg.AssetKey]) -> dict[str, tuple[str, str]]:
    """Data version and id of the latest event of each asset; in Dagster's words where there is none."""
    found: dict[str, tuple[str, str]] = {}
    for key in parents:
        records = instance.fetch_materializations(key, limit=1).records
        event = records[0].asset_materialization if records else None
        version = (event.tags or {}).get("dagster/data_version", "INITIAL") if event else "INITIAL"
        found[key.to_user_string()] = (version, str(records[0].storage_id) if records else "NULL")
    return found
