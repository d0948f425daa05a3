"""The partitioned asset ``shard_indexes``: plan, then one mapped step a shard, then collect.

One step a shard means that a failed shard leaves the others built, that *re-execute from failure* runs only that one,
and that each shard's partition turns green as soon as it is sealed. On an engine all shards are one step, which does
the same: it builds all that it can, names those that failed, and finds the others sealed when it is executed again.
"""

from collections.abc import Iterator

import dagster as dg
from dagster._core.definitions.source_asset import SYSTEM_METADATA_KEY_SOURCE_ASSET_OBSERVATION

from sf_pipelines.orchestration.assets import RETRY
from sf_pipelines.orchestration.graph import CODE_VERSION, Graph
from sf_pipelines.orchestration.io_manager import Reference
from sf_pipelines.orchestration.metadata import reference, shard_metadata
from sf_pipelines.orchestration.names import SnapshotNames, shard_partition
from sf_pipelines.orchestration.resources import SnapshotAccess, surfaced
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import ShardReceipt
from sf_pipelines.snapshot.run.tasks import Outcome, Task

_DESCRIPTION = (
    "One index a shard, built from its own rows, sealed: re-opened after the upload, counted, every object digested. "
    "Materializing one partition alone builds that shard anew; the manifest and the pointer follow when they are "
    "materialized."
)


def build_shard_indexes(graph: Graph) -> dg.AssetsDefinition:
    """The asset, partitioned by shard."""
    names = graph.names
    plan, build_one, collect = (
        _plan_op(names, on_engine=graph.options.engine is not None),
        _build_op(graph),
        _collect_op(names),
    )
    settings = graph.asset_settings("shard_indexes", _kinds(graph.config), stages.build_shard)
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


def _plan_op(names: SnapshotNames, *, on_engine: bool) -> dg.OpDefinition:
    @dg.op(
        name=f"{names.scope}_plan_shards",
        out=dg.DynamicOut(dict, io_manager_key=names.io_manager),
        # Dagster looks "io_manager" up for the graph's own output when a run has no other asset, and fails without it.
        required_resource_keys={"io_manager", names.resource},
        description="Which shards this run builds: those of its partitions, or all.",
    )
    def plan_shards(context: dg.OpExecutionContext, routed: Reference) -> Iterator[dg.DynamicOutput[Reference]]:
        again = rebuild_asked(context, names)
        if context.has_partition_key or context.has_partition_key_range:
            shards = sorted(context.partition_keys)
        else:
            access: SnapshotAccess = getattr(context.resources, names.resource)
            with surfaced(), access.build(context.log) as build:
                build.scanned(routed["run_id"])
                shards = [shard_partition(db_id) for db_id in range(build.config.shards)]
        groups = {"shards": shards} if on_engine else {f"shard_{partition}": [partition] for partition in shards}
        for name, group in groups.items():
            task = {
                "run_id": routed["run_id"],
                "routed": routed["digest"],
                "shards": [int(partition) for partition in group],
                "rebuild": again,
            }
            yield dg.DynamicOutput(task, mapping_key=name)

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
        name=f"{names.scope}_build_shard",
        out=dg.Out(list, io_manager_key=names.io_manager),
        required_resource_keys={names.resource},
        retry_policy=RETRY,
        pool=names.pool,
        code_version=CODE_VERSION,
        description="Builds and seals one shard; on an engine, all shards of the run.",
    )
    def build_shard(context: dg.OpExecutionContext, group: Reference) -> list[Reference]:
        access: SnapshotAccess = getattr(context.resources, names.resource)
        built: list[Reference] = []

        with surfaced(), access.build(context.log) as build, access.open_engine() as engine:

            def sealed(task: Task, outcome: Outcome) -> None:
                del task
                built.append(tell_sealed(context, build, graph, group["routed"], outcome))

            def work() -> list[ShardReceipt]:
                return stages.build_shards(
                    build,
                    group["run_id"],
                    group["shards"],
                    engine=engine,
                    rebuild=group["rebuild"],
                    keep_going=True,
                    on_done=sealed,
                )

            graph.execute(context, "build_shard", work)
        return built

    return build_shard


def tell_sealed(context: dg.OpExecutionContext, build: Build, graph: Graph, routed: str, outcome: Outcome) -> Reference:
    """Turns the partition of a sealed shard green now: the only event of it in this run.

    Args:
        context: of the step.
        build: the build.
        graph: of the snapshot.
        routed: digest of the routed rows, which say whether the shard is outdated.
        outcome: of the shard's task.
    """
    receipt = outcome.receipt
    if not isinstance(receipt, ShardReceipt):
        raise TypeError(f"a shard's task gave a {type(receipt).__name__}")
    where = f", on worker {outcome.worker}" if graph.options.engine is not None else ""
    context.log.info("%s%s", f"shard {receipt.db_id}: {receipt.reason}" if receipt.reason else _told(receipt), where)
    before = graph.names.asset("routed_vectors").to_user_string()
    context.log_event(
        dg.AssetMaterialization(
            graph.names.asset("shard_indexes"),
            partition=shard_partition(receipt.db_id),
            metadata=shard_metadata(build, receipt),
            tags={
                "dagster/data_version": receipt.digest,
                "dagster/data_version_is_user_provided": "true",
                "dagster/code_version": CODE_VERSION,
                f"dagster/input_data_version/{before}": routed,
                f"dagster/input_event_pointer/{before}": "NULL",
            },
        )
    )
    return reference(receipt) | {"db_id": receipt.db_id}


def _told(receipt: ShardReceipt) -> str:
    """One line on a shard that is done."""
    verb = "copied" if receipt.reused else "built"
    rate = f" ({receipt.rows / receipt.seconds:,.0f} rows/s)" if receipt.rows and receipt.seconds else ""
    return f"shard {receipt.db_id}: {receipt.rows:,} rows {verb} and sealed in {receipt.seconds:.1f} s{rate}"


def _collect_op(names: SnapshotNames) -> dg.OpDefinition:
    @dg.op(
        name=f"{names.scope}_collect_shards",
        out=dg.Out(dict, io_manager_key=names.io_manager),
        description="All shards of this run are built.",
    )
    def collect_shards(context: dg.OpExecutionContext, built: list[list[Reference]]) -> dg.Output[Reference]:
        del context
        shards = {shard_partition(one["db_id"]): one for group in built for one in group}
        # Each partition has its event since it was sealed. This is how Dagster's own observations keep an output from
        # making a second one; without it nothing breaks, there are two again.
        return dg.Output(shards, metadata={SYSTEM_METADATA_KEY_SOURCE_ASSET_OBSERVATION: True})

    return collect_shards
