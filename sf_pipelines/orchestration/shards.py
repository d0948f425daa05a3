"""The partitioned asset ``shard_indexes``: plan, then one mapped step a shard, then collect.

One step a shard means that a failed shard leaves the others built, that *re-execute from failure* runs only that one,
and that each shard's partition turns green as soon as it is sealed.
"""

from collections.abc import Iterator

import dagster as dg

from sf_pipelines.orchestration.assets import RETRY
from sf_pipelines.orchestration.graph import CODE_VERSION, Graph
from sf_pipelines.orchestration.io_manager import Reference
from sf_pipelines.orchestration.metadata import reference, shard_metadata
from sf_pipelines.orchestration.names import SnapshotNames, shard_partition
from sf_pipelines.orchestration.resources import SnapshotAccess, surfaced
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.config import WriteConfig, digest_json
from sf_pipelines.snapshot.receipts import ShardReceipt

_DESCRIPTION = (
    "One index a shard, built from its own rows, sealed: re-opened after the upload, counted, every object digested. "
    "Materializing one partition alone builds that shard anew; the manifest and the pointer follow when they are "
    "materialized."
)


def build_shard_indexes(graph: Graph) -> dg.AssetsDefinition:
    """The asset, partitioned by shard."""
    names = graph.names
    plan, build_one, collect = _plan_op(names), _build_op(graph), _collect_op(names)
    settings = graph.asset_settings("shard_indexes", _kinds(graph.config))
    if graph.options.backfill == "run_per_shard":
        settings["backfill_policy"] = dg.BackfillPolicy.multi_run(max_partitions_per_run=1)

    @dg.graph_asset(
        **settings,
        ins={"routed": dg.AssetIn(names.asset("routed_vectors"))},
        partitions_def=names.partitions,
        description=_DESCRIPTION,
    )
    def shard_indexes(routed: Reference) -> Reference:
        return collect(plan(routed).map(build_one).collect())

    return shard_indexes


def _kinds(config: WriteConfig) -> set[str]:
    """What a shard is made of; Dagster wants letters, digits and underscores."""
    vectors = config.vector_spec.backend.replace("-", "_")
    return {vectors} if config.key_value is None else {vectors, "sqlite"}


def _plan_op(names: SnapshotNames) -> dg.OpDefinition:
    @dg.op(
        name=f"{names.name}_plan_shards",
        out=dg.DynamicOut(dict, io_manager_key=names.io_manager),
        # Dagster looks this key up for the graph's own output when a run has no other asset, and fails without it.
        required_resource_keys={"io_manager"},
        description="Which shards this run builds.",
    )
    def plan_shards(context: dg.OpExecutionContext, routed: Reference) -> Iterator[dg.DynamicOutput[Reference]]:
        again = rebuild_asked(context, names)
        for partition in sorted(context.partition_keys):
            task = {"run_id": routed["run_id"], "db_id": int(partition), "rebuild": again}
            yield dg.DynamicOutput(task, mapping_key=f"shard_{partition}")

    return plan_shards


def rebuild_asked(context: dg.OpExecutionContext, names: SnapshotNames) -> bool:
    """Whether the user launched shards without the asset before them, that is, wants them made again.

    Where rows are routed by the same run or backfill, shards that are sealed already are left as they are.
    """
    backfill_id = context.run.tags.get("dagster/backfill")
    backfill = context.instance.get_backfill(backfill_id) if backfill_id else None
    selected = backfill.asset_selection if backfill else context.run.asset_selection
    # A run of everything in its job selects nothing in particular.
    selected = selected or context.job_def.asset_layer.executable_asset_keys
    return names.asset("routed_vectors") not in selected


def _build_op(graph: Graph) -> dg.OpDefinition:
    names = graph.names

    @dg.op(
        name=f"{names.name}_build_shard",
        out=dg.Out(dict, io_manager_key=names.io_manager),
        required_resource_keys={names.resource},
        retry_policy=RETRY,
        pool=names.pool,
        code_version=CODE_VERSION,
        description="Builds and seals one shard.",
    )
    def build_shard(context: dg.OpExecutionContext, task: Reference) -> Reference:
        access: SnapshotAccess = getattr(context.resources, names.resource)
        with surfaced(), access.build(context.log) as build:

            def work() -> ShardReceipt:
                return stages.build_shard(build, task["run_id"], task["db_id"], rebuild=task["rebuild"])

            receipt = graph.execute(context, "build_shard", work)
        if receipt.reason:
            context.log.info("%s", receipt.reason)
        metadata = shard_metadata(receipt)
        # Turns the shard's partition green now; the asset's own event comes only when all shards are there.
        context.log_event(
            dg.AssetMaterialization(
                names.asset("shard_indexes"),
                partition=shard_partition(receipt.db_id),
                metadata=metadata,
                tags={"dagster/data_version": receipt.digest},
            )
        )
        return reference(receipt) | {"db_id": receipt.db_id, "rows": receipt.rows, "bytes": receipt.bytes}

    return build_shard


def _collect_op(names: SnapshotNames) -> dg.OpDefinition:
    @dg.op(
        name=f"{names.name}_collect_shards",
        out=dg.Out(dict, io_manager_key=names.io_manager),
        description="All shards of this run are built.",
    )
    def collect_shards(context: dg.AssetExecutionContext, built: list[Reference]) -> dg.Output[Reference]:
        shards = {shard_partition(one["db_id"]): one for one in built}
        for partition, one in shards.items():
            facts = {"dagster/row_count": one["rows"], "bytes": one["bytes"], "receipt": one["key"]}
            context.add_asset_metadata(facts, asset_key=names.asset("shard_indexes"), partition_key=partition)
        digest = digest_json(sorted(one["digest"] for one in built))
        return dg.Output(shards, data_version=dg.DataVersion(digest))

    return collect_shards
