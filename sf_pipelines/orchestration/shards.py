"""The partitioned asset ``shard_indexes``: plan, then one mapped step a shard, then collect.

One step a shard means that a failed shard leaves the others built, that *re-execute from failure* runs only that one,
and that each shard's partition is materialized as soon as it is sealed. On an engine all shards are one step, which
builds all that it can, names those that failed, and keeps the sealed ones when it is executed again.
"""

from collections.abc import Iterator
from functools import partial

import dagster as dg
from dagster._core.definitions.source_asset import SYSTEM_METADATA_KEY_SOURCE_ASSET_OBSERVATION

from sf_pipelines.orchestration.graph import CODE_VERSION, RETRY, Graph, shard_partition
from sf_pipelines.orchestration.io_manager import Reference, keep_latest
from sf_pipelines.orchestration.metadata import materialization, reference
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import ShardReceipt
from sf_pipelines.snapshot.run.tasks import Engine, Outcome, Task

_DESCRIPTION = (
    "One index a shard, built from its own rows, sealed: re-opened after the upload, counted, every object digested. "
    "Materializing one partition alone rebuilds that shard; the manifest and the pointer follow when they are "
    "materialized."
)


def build_shard_indexes(graph: Graph) -> dg.AssetsDefinition:
    """The asset, partitioned by shard."""
    config = graph.config
    plan, build_one, collect = _plan_op(graph), _build_op(graph), _collect_op(graph)
    # Dagster takes letters, digits and underscores.
    kinds = {config.vector_spec.backend.replace("-", "_"), *([] if config.key_value is None else ["sqlite"])}
    settings = graph.asset_settings("shard_indexes", kinds, stages.build_shard)
    if graph.options.backfill == "run_per_shard":
        settings["backfill_policy"] = dg.BackfillPolicy.multi_run(max_partitions_per_run=1)

    @dg.graph_asset(
        **settings,
        ins={"routed": dg.AssetIn(graph.asset("routed_vectors"))},
        partitions_def=graph.partitions,
        description=_DESCRIPTION,
    )
    def shard_indexes(routed: Reference) -> Reference:
        return collect(plan(routed).map(build_one).collect())

    return shard_indexes


def _plan_op(graph: Graph) -> dg.OpDefinition:
    @dg.op(
        name=graph.part("plan_shards"),
        out=dg.DynamicOut(dict, io_manager_key=graph.io_manager),
        # Dagster looks "io_manager" up for the graph's own output when a run has no other asset, and fails without it.
        required_resource_keys={"io_manager", graph.resource},
        description="Which shards this run builds: those of its partitions, or all.",
    )
    def plan_shards(context: dg.OpExecutionContext, routed: Reference) -> Iterator[dg.DynamicOutput[Reference]]:
        if context.has_partition_key or context.has_partition_key_range:
            shards = sorted(context.partition_keys)
        else:
            with graph.build(context) as build:
                scanned = build.run(routed["run_id"]).scanned
                shards = [shard_partition(db_id) for db_id in range(scanned.num_dbs or build.config.shards)]
        common = {"run_id": routed["run_id"], "routed": routed["digest"], "rebuild": _is_rebuild(context, graph)}
        on_engine = graph.options.engine is not None
        groups = {"shards": shards} if on_engine else {f"shard_{partition}": [partition] for partition in shards}
        for name, group in groups.items():
            yield dg.DynamicOutput({**common, "shards": list(map(int, group))}, mapping_key=name)

    return plan_shards


def _is_rebuild(context: dg.OpExecutionContext, graph: Graph) -> bool:
    """Whether shards were launched without the asset before them: the user asks for sealed shards to be built again."""
    backfill_id = context.run.tags.get("dagster/backfill")
    backfill = context.instance.get_backfill(backfill_id) if backfill_id else None
    selected = backfill.asset_selection if backfill else context.run.asset_selection
    # A run of everything in its job selects nothing in particular.
    selected = selected or context.job_def.asset_layer.executable_asset_keys
    return graph.asset("routed_vectors") not in selected


def _build_op(graph: Graph) -> dg.OpDefinition:
    @dg.op(
        name=graph.part("build_shard"),
        out=dg.Out(list, io_manager_key=graph.io_manager),
        required_resource_keys={graph.resource},
        retry_policy=RETRY,
        pool=graph.pool,
        code_version=CODE_VERSION,
        description="Builds and seals one shard; on an engine, all shards of the run.",
    )
    def build_shard(context: dg.OpExecutionContext, group: Reference) -> list[Reference]:
        with graph.build(context) as build, graph.access(context).open_engine() as engine:
            return seal_shards(context, graph, build, engine, group)

    return build_shard


def seal_shards(
    context: dg.OpExecutionContext,
    graph: Graph,
    build: Build,
    engine: Engine | None,
    group: Reference,
    *,
    keep: bool = False,
) -> list[Reference]:
    """Builds shards; each partition is materialized as soon as its shard is sealed."""
    built: list[Reference] = []
    key = graph.asset("shard_indexes")
    # A partition is outdated when the digest of the routed rows is another one.
    parents = {graph.asset("routed_vectors").to_user_string(): (str(group["routed"]), "NULL")}

    def on_done(task: Task, outcome: Outcome) -> None:
        del task
        receipt = outcome.receipt
        if not isinstance(receipt, ShardReceipt):
            raise TypeError(f"a shard's task gave a {type(receipt).__name__}")
        where = f", on worker {outcome.worker}" if graph.options.engine is not None else ""
        context.log.info("%s%s", _log_line(receipt), where)
        partition = shard_partition(receipt.db_id)
        context.log_event(materialization(build, receipt, key, parents, partition))
        # A shard that a published run was to rebuild is in its successor, which the next assets find by that run.
        built.append(reference(receipt) | {"db_id": receipt.db_id, "run_id": group["run_id"]})
        if keep:
            keep_latest(build.store, key, built[-1], partition)

    work = partial(stages.build_shards, build, group["run_id"], group["shards"], rebuild=group["rebuild"])
    graph.execute(context, "build_shard", partial(work, engine=engine, keep_going=True, on_done=on_done))
    return built


def _log_line(receipt: ShardReceipt) -> str:
    if receipt.reason:
        return f"shard {receipt.db_id}: {receipt.reason}"
    verb = "copied" if receipt.reused else "built"
    rate = f" ({receipt.rows / receipt.seconds:,.0f} rows/s)" if receipt.rows and receipt.seconds else ""
    return f"shard {receipt.db_id}: {receipt.rows:,} rows {verb} and sealed in {receipt.seconds:.1f} s{rate}"


def _collect_op(graph: Graph) -> dg.OpDefinition:
    @dg.op(
        name=graph.part("collect_shards"),
        out=dg.Out(dict, io_manager_key=graph.io_manager),
        description="All shards of this run are built.",
    )
    def collect_shards(context: dg.OpExecutionContext, built: list[list[Reference]]) -> dg.Output[Reference]:
        del context
        shards = {shard_partition(one["db_id"]): one for group in built for one in group}
        # Each partition has its event already. This key, which Dagster's own observations use, keeps the output from
        # making a second one.
        return dg.Output(shards, metadata={SYSTEM_METADATA_KEY_SOURCE_ASSET_OBSERVATION: True})

    return collect_shards
