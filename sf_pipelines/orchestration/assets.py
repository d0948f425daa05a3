"""The assets of one snapshot. Each calls one stage and turns its receipt into metadata; none touches data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from sf_pipelines.orchestration import metadata as described
from sf_pipelines.orchestration.conditions import freshness_of
from sf_pipelines.orchestration.graph import Graph
from sf_pipelines.orchestration.io_manager import Reference
from sf_pipelines.orchestration.metadata import materialized
from sf_pipelines.orchestration.pointer_sensor import tell_move
from sf_pipelines.orchestration.resources import SnapshotAccess, surfaced
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.errors import ReceiptMissingError
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import Receipt, ScanReceipt

# Only errors that may pass are retried (see resources.surfaced).
RETRY = dg.RetryPolicy(max_retries=2, delay=2, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)


class ScanOptions(dg.Config):
    """Launchpad options of ``source_vectors``.

    Attributes:
        force: build again although nothing is new.
    """

    force: bool = False


@dataclass(frozen=True)
class _Step:
    """A stage that goes on from the reference of one asset before it."""

    noun: str
    after: str
    stage: Callable[[Build, str], Any]
    describe: Callable[[Build, Any], dict[str, Any]]
    kinds: set[str]
    description: str


_SAMPLE = _Step(
    "training_data",
    "source_vectors",
    stages.sample,
    described.sample_metadata,
    {"arrow"},
    "Every row validated against the data contract; rejects with reasons; the training and the query sample.",
)
# What a strategy trains; the graph of one that trains nothing has no such asset.
_TRAINED = {
    "cluster": _Step(
        "centroids",
        "training_data",
        stages.train,
        described.train_metadata,
        {"scikitlearn"},
        "One k-means centre a shard: they say which shard holds which vector.",
    ),
    "lsh": _Step(
        "hyperplanes",
        "training_data",
        stages.train,
        described.train_metadata,
        {"numpy"},
        "Hyperplanes that cut the training data into balanced cells: they say which shard holds which vector.",
    ),
}
_PROMOTE = _Step(
    "current_pointer",
    "manifest",
    stages.promote,
    described.promote_metadata,
    {"json"},
    "The pointer that readers follow. It moves only to a manifest whose required checks have all passed; the verdicts "
    "are read from the store, so launching this asset alone publishes nothing that has not passed.",
)


def steps_of(strategy: str) -> list[_Step]:
    """The stages of a snapshot that each go on from one asset before them."""
    trained = _TRAINED.get(strategy)
    route = _Step(
        "routed_vectors",
        trained.noun if trained else _SAMPLE.noun,
        stages.route,
        described.route_metadata,
        {"arrow"},
        "Every row sent to its shard, with a digest of each shard's rows.",
    )
    return [_SAMPLE, *([trained] if trained else []), route, _PROMOTE]


def build_assets(graph: Graph, source_assets: Sequence[dg.AssetKey]) -> list[dg.AssetsDefinition]:
    """All assets except the partitioned ``shard_indexes``.

    Args:
        graph: of the snapshot.
        source_assets: keys of the assets that write the source.
    """
    return [
        _source_vectors(graph, source_assets),
        *(_step_asset(graph, step) for step in steps_of(graph.config.sharding.strategy)),
        _manifest(graph),
    ]


def _asset(
    graph: Graph,
    noun: str,
    *,
    stage: Callable[..., Any],
    kinds: set[str],
    description: str,
    after: str | None = None,
    deps: Sequence[dg.AssetKey] = (),
) -> Callable[[Callable[..., dg.MaterializeResult]], dg.AssetsDefinition]:
    """A decorator with the settings of all unpartitioned assets; ``before`` is the input from the asset ``after``."""
    names, freshness = graph.names, freshness_of(graph.options.freshness)
    return dg.asset(
        **graph.asset_settings(noun, kinds, stage),
        ins={"before": dg.AssetIn(names.asset(after))} if after else None,
        deps=list(deps),
        description=description,
        io_manager_key=names.io_manager,
        required_resource_keys={names.resource},
        freshness_policy=freshness if noun == _PROMOTE.noun and graph.options.pointer_sensor is None else None,
        retry_policy=RETRY,
    )


def run_stage(
    context: dg.AssetExecutionContext,
    graph: Graph,
    stage: str,
    work: Callable[[Build], Any],
    describe: Callable[[Build, Any], dict[str, Any]],
) -> dg.MaterializeResult:
    """Runs one stage; its receipt becomes the materialization."""
    access: SnapshotAccess = getattr(context.resources, graph.names.resource)
    with surfaced(), access.build(context.log) as build:
        receipt: Receipt = graph.execute(context, stage, lambda: work(build))
        if receipt.reason:
            context.log.info("%s", receipt.reason)
        return materialized(receipt, describe(build, receipt))


def scan_and_tell(
    context: dg.OpExecutionContext | dg.AssetExecutionContext, graph: Graph, build: Build, *, force: bool
) -> ScanReceipt:
    """Pins the source; the instance is told of the shards that the build has chosen."""
    scanned = stages.scan(build, force=force)
    graph.names.tell_shards(context.instance, build.config.shards)
    if scanned.sizing:
        context.log.info("%s", scanned.sizing)
    return scanned


def _source_vectors(graph: Graph, source_assets: Sequence[dg.AssetKey]) -> dg.AssetsDefinition:
    @_asset(
        graph,
        "source_vectors",
        stage=stages.scan,
        deps=source_assets,
        kinds={"parquet"},
        description="The source files, pinned: what a build reads is exactly these versions.",
    )
    def source_vectors(context: dg.AssetExecutionContext, config: ScanOptions) -> dg.MaterializeResult:
        def scan(build: Build) -> Receipt:
            return scan_and_tell(context, graph, build, force=config.force)

        return run_stage(context, graph, "scan", scan, described.scan_metadata)

    return source_vectors


def _step_asset(graph: Graph, step: _Step) -> dg.AssetsDefinition:
    @_asset(graph, step.noun, stage=step.stage, after=step.after, kinds=step.kinds, description=step.description)
    def step_asset(context: dg.AssetExecutionContext, before: Reference) -> dg.MaterializeResult:
        def work(build: Build) -> Receipt:
            if step.stage is not stages.route:
                return step.stage(build, before["run_id"])
            access: SnapshotAccess = getattr(context.resources, graph.names.resource)
            with access.open_engine() as engine:
                return stages.route(build, before["run_id"], engine=engine)

        def describe(build: Build, receipt: Any) -> dict[str, Any]:
            if step is _PROMOTE:
                tell_move(context, graph, build)
            return step.describe(build, receipt)

        return run_stage(context, graph, step.stage.__name__, work, describe)

    return step_asset


def _manifest(graph: Graph) -> dg.AssetsDefinition:
    @_asset(
        graph,
        "manifest",
        stage=stages.assemble,
        after="shard_indexes",
        kinds={"sqlite"},
        description="One manifest that names all shards, staged for the checks, and the measured number of probes.",
    )
    def manifest(context: dg.AssetExecutionContext, before: Reference) -> dg.MaterializeResult:
        def assemble(build: Build) -> Receipt:
            return stages.assemble(build, _common_run(before))

        return run_stage(context, graph, "assemble", assemble, described.manifest_metadata)

    return manifest


def _common_run(shards: Reference) -> str:
    """The one build that all shards are of."""
    runs: dict[str, list[str]] = {}
    for partition, value in shards.items():
        runs.setdefault(value["run_id"], []).append(partition)
    if len(runs) > 1:
        shown = "; ".join(f"{run_id}: {', '.join(parts)}" for run_id, parts in sorted(runs.items()))
        raise ReceiptMissingError(
            f"the shard indexes are of {len(runs)} different builds ({shown}); materialize shard_indexes for all shards"
        )
    return next(iter(runs))
