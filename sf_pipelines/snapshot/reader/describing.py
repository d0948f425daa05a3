"""What readers say of themselves and of the snapshot that they serve."""

import time
from datetime import UTC, datetime, timedelta

from numpy.typing import ArrayLike

from sf_pipelines.snapshot.manifest.models import CurveRecord, JudgedRecord
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.reader.core import ReaderCore
from sf_pipelines.snapshot.reader.plan import Wanted, as_queries, one, plan_for, routable
from sf_pipelines.snapshot.reader.state import SnapshotState
from sf_pipelines.snapshot.reader.types import (
    ExplainedShard,
    Explanation,
    Health,
    ShardDetail,
    SnapshotInfo,
    UnifiedVectorMeta,
)
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.protocol import VectorRouting


def health(core: ReaderCore, staleness_threshold: timedelta | float | None) -> Health:
    """State of the reader; answers after it was closed, too.

    Args:
        core: of the reader.
        staleness_threshold: age (or seconds) of the snapshot from which it counts as degraded.

    Raises:
        ReaderForkedError: the reader belongs to the process that this one was forked from.
    """
    core.check_process()
    served = core.served
    state, handles = served.state, served.handles
    age = (datetime.now(UTC) - (state.published_at or state.manifest.created_at)).total_seconds()
    limit = staleness_threshold.total_seconds() if isinstance(staleness_threshold, timedelta) else staleness_threshold
    trouble = core.failure
    stale = limit is not None and age > limit
    degraded = stale or trouble is not None or core.fallback is not None
    return Health(
        status="unhealthy" if core.closed else "degraded" if degraded else "healthy",
        manifest_ref=core.store.url_of(state.manifest_key),
        manifest_age_seconds=age,
        num_shards=state.manifest.num_dbs,
        is_closed=core.closed,
        last_error=None if trouble is None else trouble.text,
        last_error_age_seconds=None if trouble is None else time.monotonic() - trouble.since,
        fallback=None if core.fallback is None else core.fallback.text,
        open_shards=handles.open_shards,
        memory_bytes=handles.memory_bytes,
    )


def snapshot_info(core: ReaderCore) -> SnapshotInfo:
    """The snapshot that is served.

    Raises:
        ReaderClosedError: the reader was closed.
    """
    with core.serving() as serving:
        state = serving.state
        unified = state.kind == "unified"
        extras, sizes = state.manifest.extras, [shard.bytes for shard in state.shards]
        recall = extras.recall if extras else None
        judged = recall.judged if recall else None
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
            recall=judged.recall if judged else None,
            recall_lower=judged.lower if judged else None,
            recall_k=recall.k if recall and judged else None,
            index_type=state.vector.index_type,
            quantization=state.vector.quantization,
            id_type=extras.id_type if extras else None,
            payload_columns=None if extras is None or extras.payload_columns is None else [*extras.payload_columns],
            filter_columns=dict(extras.filter_columns) if extras else {},
            manifest_ref=core.store.url_of(state.manifest_key),
            total_vectors=state.manifest.row_count,
            total_bytes=None if any(size is None for size in sizes) else sum(size or 0 for size in sizes),
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
                bytes=shard.bytes,
                checkpoint_id=shard.checkpoint_id,
            )
            for shard in serving.state.shards
        ]


def explain(core: ReaderCore, query: ArrayLike, wanted: Wanted) -> Explanation:
    """What a search for one query would do, without searching.

    Args:
        core: of the reader.
        query: shape (dim,).
        wanted: what the caller says of the shards to ask.

    Raises:
        QueryError: an argument is wrong.
        ReaderClosedError: the reader was closed.
    """
    with core.serving() as serving:
        state, loaded = serving.state, serving.handles.in_memory
        rows = as_queries(one(query), state.dim, state.metric)
        asked = plan_for(state, rows, wanted).asked()[0]
        distances: dict[int, float] = {}
        if isinstance(state.routing, VectorRouting):
            order, away = state.routing.probe(routable(state, rows))
            if state.routing.strategy == "cluster" and state.metric is DistanceMetric.DOT_PRODUCT:
                # Routing compares products alone; a distance is what a score would be.
                away = 1.0 + away
            distances = dict(zip(order[0].tolist(), away[0].tolist(), strict=True))
        # A shard that is in both keeps its first place.
        turns = list(dict.fromkeys([*asked, *distances]))
        shards = [
            ExplainedShard(shard, distances.get(shard), state.shards[shard].rows, place < len(asked), shard in loaded)
            for place, shard in enumerate(turns)
        ]
        point = _measured(state, wanted, len(asked))
        extras = state.manifest.extras
    found = sum(shard.rows for shard in shards if shard.asked)
    return Explanation(
        shards=shards,
        num_shards=len(asked),
        rows=found / max(1, state.manifest.row_count),
        recall=None if point is None else point.recall,
        recall_lower=None if point is None else point.lower,
        recall_k=None if point is None or extras is None or extras.recall is None else extras.recall.k,
    )


def _measured(state: SnapshotState, wanted: Wanted, shards: int) -> CurveRecord | JudgedRecord | None:
    """What was measured for searches that ask so many shards: the recall of the default, else that of tuning queries.

    Neither says anything of shards that are named.
    """
    extras = state.manifest.extras
    if extras is None or extras.recall is None or wanted.shard_ids is not None:
        return None
    recall = extras.recall
    if recall.judged is not None and recall.judged.num_probes == shards:
        return recall.judged
    return next((point for point in recall.curve if point.num_probes == shards), None)


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
