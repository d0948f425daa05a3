"""One snapshot's Dagster definitions from its configuration, without YAML."""

from collections.abc import Sequence

import dagster as dg
from dagster_aws.s3 import S3Resource

from sf_pipelines.orchestration.assets import build_assets
from sf_pipelines.orchestration.checks import build_checks
from sf_pipelines.orchestration.io_manager import ReferenceIOManager
from sf_pipelines.orchestration.names import SnapshotNames
from sf_pipelines.orchestration.resources import snapshot_resource
from sf_pipelines.orchestration.shards import BackfillMode, build_shard_indexes
from sf_pipelines.snapshot.build import Build
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.routing import needs_training


def build_snapshot_defs(
    config: WriteConfig,
    *,
    source_assets: Sequence[dg.AssetKey | str | Sequence[str]] = (),
    refresh_source: bool = False,
    backfill: BackfillMode = "single_run",
    s3: S3Resource | None = None,
) -> dg.Definitions:
    """Assets, checks, job and resources of one snapshot; merge the definitions of several with ``Definitions.merge``.

    Args:
        config: the snapshot.
        source_assets: keys of the assets that write the source; ``source_vectors`` depends on them.
        refresh_source: whether the job ``build_<name>`` materializes ``source_assets`` too. They must then be defined
            in the same code location.
        backfill: a backfill of several shards is a ``single_run`` or ``run_per_shard``.
        s3: credentials for source and store, where they are not in ``config.s3`` or the environment.

    Raises:
        ConfigError: credentials are given twice, or the sharding expression does not compile.
    """
    if not needs_training(config.sharding):
        # An expression that does not compile is told when the definitions are loaded.
        Build(config).routing(None)
    names = SnapshotNames.of(config)
    upstream = [dg.AssetKey.from_coercible(_key(item)) for item in source_assets]
    assets = [*build_assets(names, config.sharding.strategy, upstream), build_shard_indexes(names, config, backfill)]
    snapshot = snapshot_resource(config, s3)
    own = [key for asset in assets for key in asset.keys]
    job = dg.define_asset_job(
        names.job,
        selection=dg.AssetSelection.assets(*own, *(upstream if refresh_source else [])),
        # With the range of all shards on the run, one run does everything, unpartitioned assets and checks included.
        tags=names.range_tags,
        description=f"Builds the snapshot {names.name!r} in one run: source, shards, manifest, checks, pointer.",
    )
    return dg.Definitions(
        assets=assets,
        asset_checks=[build_checks(names, config)],
        jobs=[job],
        resources={names.resource: snapshot, names.io_manager: ReferenceIOManager(snapshot=snapshot)},
    )


def _key(item: dg.AssetKey | str | Sequence[str]) -> dg.AssetKey | Sequence[str]:
    # "lake/products" is how the UI writes a key of two parts.
    return item.split("/") if isinstance(item, str) else item
