"""What readers say of themselves and of the snapshot that they serve."""

from datetime import UTC, datetime, timedelta

from sf_pipelines.snapshot.reader.core import ReaderCore
from sf_pipelines.snapshot.reader.types import Health, ShardDetail, SnapshotInfo, UnifiedVectorMeta
from sf_pipelines.snapshot.routing.cel import CelRouting


def health(core: ReaderCore, staleness_threshold: timedelta | float | None) -> Health:
    """State of the reader; answers after it was closed, too.

    Args:
        core: of the reader.
        staleness_threshold: age (or seconds) of the snapshot from which it counts as degraded.
    """
    state = core.state
    age = (datetime.now(UTC) - (state.published_at or state.manifest.created_at)).total_seconds()
    limit = staleness_threshold.total_seconds() if isinstance(staleness_threshold, timedelta) else staleness_threshold
    degraded = core.last_error is not None or (limit is not None and age > limit)
    return Health(
        status="unhealthy" if core.closed else "degraded" if degraded else "healthy",
        manifest_ref=core.store.url_of(state.manifest_key),
        manifest_age_seconds=age,
        num_shards=state.manifest.num_dbs,
        is_closed=core.closed,
        last_error=core.last_error,
    )


def snapshot_info(core: ReaderCore) -> SnapshotInfo:
    """The snapshot that is served.

    Raises:
        ReaderClosedError: the reader was closed.
    """
    with core.serving() as serving:
        state = serving.state
        unified = state.kind == "unified"
        return SnapshotInfo(
            run_id=state.manifest.run_id,
            num_dbs=state.manifest.num_dbs,
            dim=state.dim,
            metric=state.metric,
            sharding=state.routing.strategy,
            kind=state.kind,
            backend=state.backend,
            key_encoding=state.key_encoding if unified else None,
            cel_columns=dict(state.routing.cel_columns) if isinstance(state.routing, CelRouting) else {},
            num_probes=state.manifest.num_dbs if unified else state.vector.num_probes,
            manifest_ref=core.store.url_of(state.manifest_key),
            total_vectors=state.manifest.row_count,
            created_at=state.manifest.created_at,
            published_at=state.published_at,
        )


def shard_details(core: ReaderCore) -> list[ShardDetail]:
    """Every shard, empty ones included.

    Raises:
        ReaderClosedError: the reader was closed.
    """
    with core.serving() as serving:
        return [
            ShardDetail(
                db_id=shard.db_id,
                db_url=None if shard.key is None else core.store.url_of(shard.key),
                vector_count=shard.rows,
                checkpoint_id=shard.checkpoint_id,
            )
            for shard in serving.state.shards
        ]


def vector_meta(core: ReaderCore) -> UnifiedVectorMeta:
    """How the vectors of a unified snapshot are indexed.

    Raises:
        ReaderClosedError: the reader was closed.
    """
    with core.serving() as serving:
        state, vector = serving.state, serving.state.vector
        return UnifiedVectorMeta(
            dim=vector.dim,
            metric=vector.metric,
            index_type=vector.index_type,
            quantization=vector.quantization,
            index_params=dict(vector.index_params),
            backend=state.backend,
            kv_backend=vector.kv_backend,
        )
