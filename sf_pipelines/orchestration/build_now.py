"""The job ``build_now_<name>``: the whole build as one step, for who wants it now.

Assets with partitions have no Launchpad in Dagster's UI: a job over them asks which partitions. A job of one op has the
usual button, and launches one run. The op executes the same stages, and writes the same events and references, as the
assets do; so the graph shows what it has built, and single assets can be materialized after it. A run that failed goes
on from the receipts in the store when it is executed again.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import dagster as dg

from sf_pipelines.orchestration import metadata as described
from sf_pipelines.orchestration.assets import RETRY, ScanOptions, scan_and_tell, steps_of
from sf_pipelines.orchestration.checks import run_checks
from sf_pipelines.orchestration.graph import CODE_VERSION, Graph
from sf_pipelines.orchestration.io_manager import keep_latest
from sf_pipelines.orchestration.metadata import data_version, reference, told
from sf_pipelines.orchestration.names import shard_partition
from sf_pipelines.orchestration.pointer_sensor import tell_move
from sf_pipelines.orchestration.resources import SnapshotAccess, surfaced
from sf_pipelines.orchestration.shards import tell_sealed
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import Receipt
from sf_pipelines.snapshot.run.tasks import Engine, Outcome, Task

_NOUN = "build_now"
_DESCRIPTION = (
    "Builds the snapshot in one run of one step: open the Launchpad, press Launch Run. Stages, checks and events are "
    "those of the assets."
)

Events = Iterator[dg.AssetMaterialization | dg.AssetCheckEvaluation | dg.Output[None]]


def build_now_job(graph: Graph) -> dg.JobDefinition:
    """The job."""
    names = graph.names

    @dg.op(
        name=names.operation_step(_NOUN),
        out=dg.Out(dg.Nothing),
        required_resource_keys={names.resource},
        description=_DESCRIPTION,
        pool=names.pool,
        retry_policy=RETRY,
    )
    def build_now(context: dg.OpExecutionContext, config: ScanOptions) -> Events:
        access: SnapshotAccess = getattr(context.resources, names.resource)
        with surfaced(), access.build(context.log) as build, access.open_engine() as engine:
            yield from _Whole(context, graph, build, engine).events(force=config.force)
        yield dg.Output(None)

    @dg.job(name=names.operation(_NOUN), description=_DESCRIPTION, tags=names.run_tags, executor_def=graph.executor)
    def job() -> None:
        build_now()

    return job


class _Whole:
    """One run of all stages.

    Args:
        context: of the step.
        graph: of the snapshot.
        build: what is built.
        engine: where rows are routed and shards are built; None is this process.
    """

    def __init__(self, context: dg.OpExecutionContext, graph: Graph, build: Build, engine: Engine | None) -> None:
        self._context, self._graph, self._build, self._engine = context, graph, build, engine

    def events(self, *, force: bool) -> Events:
        """Runs the stages one after the other; what each has done, as Dagster is told of it."""
        build = self._build
        scan = partial(scan_and_tell, self._context, self._graph, build, force=force)
        scanned = self._work("scan", scan)
        upstream = [dg.AssetKey(item.split("/")) for item in self._graph.options.source_assets]
        yield self._told("source_vectors", scanned, described.scan_metadata, upstream)
        *before, promote = steps_of(build.config.sharding.strategy)
        asset, routed = self._graph.names.asset, scanned
        for step in before:
            options = {"engine": self._engine} if step.stage is stages.route else {}
            routed = self._work(step.stage.__name__, partial(step.stage, build, scanned.run_id, **options))
            yield self._told(step.noun, routed, step.describe, [asset(step.after)])
        self._shards(scanned.run_id, routed.digest)
        manifest = self._work("assemble", partial(stages.assemble, build, scanned.run_id))
        yield self._told("manifest", manifest, described.manifest_metadata, [asset("shard_indexes")])
        for result in run_checks(self._context, self._graph, build, manifest.run_id):
            yield dg.AssetCheckEvaluation(
                asset_key=asset("manifest"),
                check_name=str(result.check_name),
                passed=result.passed,
                metadata=result.metadata,
                severity=result.severity,
                description=result.description,
            )
        promoted = self._work(promote.stage.__name__, partial(promote.stage, build, manifest.run_id))
        yield self._told(promote.noun, promoted, promote.describe, [asset(promote.after)])
        tell_move(self._context, self._graph, build)

    def _work(self, stage: str, work: Any) -> Any:
        receipt = self._graph.execute(self._context, stage, work)
        if receipt.reason:
            self._context.log.info("%s", receipt.reason)
        return receipt

    def _told(
        self, noun: str, receipt: Receipt, describe: Any, parents: Sequence[dg.AssetKey]
    ) -> dg.AssetMaterialization:
        """The event of an unpartitioned asset; its reference is kept for runs that start in the middle of the graph."""
        key = self._graph.names.asset(noun)
        keep_latest(self._build.store, key, reference(receipt))
        return dg.AssetMaterialization(
            key,
            metadata=told(receipt, describe(self._build, receipt)),
            tags={
                "dagster/data_version": data_version(receipt),
                "dagster/data_version_is_user_provided": "true",
                "dagster/code_version": CODE_VERSION,
                **self._provenance(parents),
            },
        )

    def _provenance(self, parents: Sequence[dg.AssetKey]) -> dict[str, str]:
        """What Dagster notes of an asset's parents, so that it can tell whether they have changed since."""
        tags: dict[str, str] = {}
        for key in parents:
            records = self._context.instance.fetch_materializations(key, limit=1).records
            event = records[0].asset_materialization if records else None
            # What Dagster takes for an asset that never told anything.
            version = (event.tags or {}).get("dagster/data_version", "INITIAL") if event else "INITIAL"
            name = key.to_user_string()
            tags[f"dagster/input_data_version/{name}"] = version
            tags[f"dagster/input_event_pointer/{name}"] = str(records[0].storage_id) if records else "NULL"
        return tags

    def _shards(self, run_id: str, routed: str) -> None:
        """Builds all shards; the partition of each turns green when it is sealed."""
        build, key = self._build, self._graph.names.asset("shard_indexes")

        def sealed(task: Task, outcome: Outcome) -> None:
            del task
            made = tell_sealed(self._context, build, self._graph, routed, outcome)
            keep_latest(build.store, key, made, shard_partition(made["db_id"]))

        def work() -> Any:
            return stages.build_shards(
                build, run_id, range(build.config.shards), engine=self._engine, keep_going=True, on_done=sealed
            )

        self._graph.execute(self._context, "build_shard", work)
