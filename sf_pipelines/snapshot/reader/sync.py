"""The blocking reader of vector-only snapshots."""

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import QueryError
from sf_pipelines.snapshot.index.protocol import SCAN_BYTES
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.reader.cache import DEFAULT_BYTES
from sf_pipelines.snapshot.reader.core import DEFAULT_MEMORY, ReaderCore, Serving, as_stock
from sf_pipelines.snapshot.reader.merge import Merged
from sf_pipelines.snapshot.reader.plan import Plan, as_queries, named_shards, positive, probes_of
from sf_pipelines.snapshot.reader.types import (
    Health,
    RefreshOutcome,
    SearchArrays,
    SearchResult,
    ShardDetail,
    SnapshotInfo,
    VectorSearchResponse,
)
from sf_pipelines.snapshot.routing.protocol import Int32

# Cells (queries x shards x hits) that are merged at a time: 2 million take about 100 MB.
_CELLS = 2_000_000


class ShardedVectorReader:
    """Searches the snapshot that a root's current pointer names. Thread-safe.

    Shards are searched from verified local copies. Opening a shard for the first time fetches it; a shard that is not
    what the manifest recorded is an error that names the object, never an answer.

    Args:
        root: ``s3://bucket/prefix`` or a folder.
        s3: credentials and endpoint; None takes the environment's.
        cache_dir: folder for verified local copies, shared by processes; None is ``$SF_PIPELINES_CACHE`` or a folder
            among the temporary files.
        cache_bytes: size that this folder is held to.
        manifest_key: serve exactly this manifest (a key below the root), whatever the pointer says.
        max_cached_shards: shards kept open while nobody searches them; None is all.
        max_memory: bytes of vectors that open shards may keep in memory while nobody searches them.
        scan_bytes: a shard with at most so many bytes of vectors is searched by an exact scan in memory, a larger one
            by its index; 0 asks the index of every shard.
        preload: open every shard now, and at each refresh before the new snapshot is served.

    Raises:
        SnapshotNotFoundError: nothing is published under the root.
        SnapshotKindError: the snapshot is of another kind.
        IntegrityError: manifest or routing artifacts are damaged.
        StoreError: the store cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        s3: S3Options | None = None,
        cache_dir: Path | None = None,
        cache_bytes: int = DEFAULT_BYTES,
        manifest_key: str | None = None,
        max_cached_shards: int | None = None,
        max_memory: int = DEFAULT_MEMORY,
        scan_bytes: int = SCAN_BYTES,
        preload: bool = False,
    ) -> None:
        self._core = ReaderCore(
            root,
            s3=s3,
            cache_dir=cache_dir,
            cache_bytes=cache_bytes,
            manifest_key=manifest_key,
            max_cached_shards=max_cached_shards,
            max_memory=max_memory,
            scan_bytes=scan_bytes,
            preload=preload,
        )

    # Searching.

    def search(
        self,
        query: ArrayLike,
        top_k: int = 10,
        *,
        num_probes: int | None = None,
        shard_ids: Sequence[int] | None = None,
        routing_context: dict[str, Any] | None = None,
        include_vectors: bool = False,
    ) -> VectorSearchResponse:
        """The nearest rows of one query.

        Args:
            query: shape (dim,).
            top_k: results wanted; fewer come back where the searched shards have fewer rows.
            num_probes: shards to ask, nearest first; None is the snapshot's own number, more than there are is all.
            shard_ids: ask exactly these shards.
            routing_context: values that name the shard, for snapshots that are sharded by an expression.
            include_vectors: return the stored vectors too.

        Raises:
            QueryError: an argument is wrong.
            ReaderClosedError: the reader was closed.
            StoreError: a shard cannot be fetched.
            IntegrityError: a shard is damaged.
        """
        if routing_context is not None:
            raise QueryError("routing_context is for snapshots sharded by an expression; this one routes by vector")
        return self.batch_search(
            _one(query), top_k, num_probes=num_probes, shard_ids=shard_ids, include_vectors=include_vectors
        )[0]

    def batch_search(
        self,
        queries: ArrayLike,
        top_k: int = 10,
        *,
        num_probes: int | None = None,
        shard_ids: Sequence[int] | None = None,
        include_vectors: bool = False,
    ) -> list[VectorSearchResponse]:
        """The nearest rows of many queries, shape (n, dim); the same answers as one by one. See ``search``."""
        started = time.perf_counter()
        with self._core.serving() as serving:
            rows = as_queries(queries, serving.state.dim, serving.state.metric)
            plan = _plan(serving, rows, num_probes, shard_ids)
            found: list[tuple[list[list[SearchResult]], Plan]] = [
                (self._results(serving, merged, include_vectors=include_vectors), part)
                for merged, part in self._merged(serving, plan, rows, positive(top_k, "top_k"))
            ]
        elapsed = (time.perf_counter() - started) * 1000
        return [
            VectorSearchResponse(results, len(asked), elapsed, asked)
            for answers, part in found
            for results, asked in zip(answers, part.shards.tolist(), strict=True)
        ]

    def search_arrays(self, queries: ArrayLike, top_k: int, *, num_probes: int | None = None) -> SearchArrays:
        """Ids and scores of many queries as arrays, without payloads. See ``search``."""
        with self._core.serving() as serving:
            rows = as_queries(queries, serving.state.dim, serving.state.metric)
            plan = _plan(serving, rows, num_probes, None)
            k = positive(top_k, "top_k")
            return _joined([merged.arrays for merged, _ in self._merged(serving, plan, rows, k)], k)

    def probe_curve(self, queries: ArrayLike, top_k: int) -> list[SearchArrays]:
        """Answers for 1, 2, … shards per query, asking each shard only once for all queries.

        Returns:
            Item ``i`` is ``search_arrays(queries, top_k, num_probes=i + 1)``.
        """
        k = positive(top_k, "top_k")
        with self._core.serving() as serving:
            rows = as_queries(queries, serving.state.dim, serving.state.metric)
            plan = _plan(serving, rows, serving.state.manifest.num_dbs, None)
            parts = [list(self._core.candidates(serving, part, rows[at], k).curve(k)) for at, part in _parts(plan, k)]
        return [_joined(list(step), k) for step in zip(*parts, strict=True)]

    def stock_style(self, queries: ArrayLike, top_k: int, num_probes: int) -> SearchArrays:
        """What a stock reader would answer: default index options, and the library's own distance for a score."""
        k = positive(top_k, "top_k")
        with self._core.serving() as serving:
            rows = as_queries(queries, serving.state.dim, serving.state.metric)
            plan = _plan(serving, rows, num_probes, None)
            return _joined(
                [
                    self._core.candidates(serving, part, rows[at], k, as_stock).merge(k).arrays
                    for at, part in _parts(plan, k)
                ],
                k,
            )

    # Routing.

    def route_vector(self, query: ArrayLike, num_probes: int | None = None) -> list[int]:
        """Shards that a query would ask, in order.

        Raises:
            QueryError: an argument is wrong.
        """
        with self._core.serving() as serving:
            rows = as_queries(_one(query), serving.state.dim, serving.state.metric)
            return _plan(serving, rows, num_probes, None).shards[0].tolist()

    def route_batch(self, queries: ArrayLike) -> Int32:
        """All shards in the order in which each query would ask them, shape (n, num_dbs)."""
        with self._core.serving() as serving:
            rows = as_queries(queries, serving.state.dim, serving.state.metric)
            return serving.state.routing.probe(rows)[0]

    # The snapshot.

    def refresh(self) -> RefreshOutcome:
        """Serves what the pointer names now; see ``RefreshOutcome``. A failure leaves the old snapshot serving.

        Raises:
            ReaderClosedError: the reader was closed.
        """
        return self._core.refresh()

    def health(self, staleness_threshold: timedelta | float | None = None) -> Health:
        """State of the reader; answers after ``close`` too.

        Args:
            staleness_threshold: age (or seconds) of the snapshot from which it counts as degraded.
        """
        core, state = self._core, self._core.state
        age = (datetime.now(UTC) - (state.published_at or state.manifest.created_at)).total_seconds()
        limit = (
            staleness_threshold.total_seconds() if isinstance(staleness_threshold, timedelta) else staleness_threshold
        )
        degraded = core.last_error is not None or (limit is not None and age > limit)
        return Health(
            status="unhealthy" if core.closed else "degraded" if degraded else "healthy",
            manifest_ref=core.store.url_of(state.manifest_key),
            manifest_age_seconds=age,
            num_shards=state.manifest.num_dbs,
            is_closed=core.closed,
            last_error=core.last_error,
        )

    def snapshot_info(self) -> SnapshotInfo:
        """The snapshot that is served."""
        with self._core.serving() as serving:
            state = serving.state
            return SnapshotInfo(
                run_id=state.manifest.run_id,
                num_dbs=state.manifest.num_dbs,
                dim=state.dim,
                metric=state.metric,
                sharding=state.routing.strategy,
                num_probes=state.vector.num_probes,
                manifest_ref=self._core.store.url_of(state.manifest_key),
                total_vectors=state.manifest.row_count,
                created_at=state.manifest.created_at,
                published_at=state.published_at,
            )

    def shard_details(self) -> list[ShardDetail]:
        """Every shard, empty ones included."""
        with self._core.serving() as serving:
            return [
                ShardDetail(
                    db_id=shard.db_id,
                    db_url=None if shard.key is None else self._core.store.url_of(shard.key),
                    vector_count=shard.rows,
                    checkpoint_id=shard.checkpoint_id,
                )
                for shard in serving.state.shards
            ]

    def close(self) -> None:
        """Ends the reader. Searches that are under way finish."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # How answers are put together.

    def _merged(self, serving: Serving, plan: Plan, queries: Float32, k: int) -> Iterator[tuple[Merged, Plan]]:
        for at, part in _parts(plan, k):
            yield self._core.candidates(serving, part, queries[at], k).merge(k), part

    def _results(self, serving: Serving, merged: Merged, *, include_vectors: bool) -> list[list[SearchResult]]:
        """Fetches payloads, for the final hits only, shard by shard."""
        arrays = merged.arrays
        payloads = np.full(arrays.ids.shape, None, dtype=object)
        vectors = np.full(arrays.ids.shape, None, dtype=object)

        def fetch(shard: int) -> None:
            at = np.nonzero(merged.shards == shard)
            wanted, back = np.unique(merged.rows[at], return_inverse=True)
            with serving.handles.borrow(shard) as index:
                payloads[at] = _objects(index.payloads(wanted))[back]
                if include_vectors:
                    vectors[at] = _objects(list(index.vectors(wanted)))[back]

        self._core.spread(fetch, [shard for shard in np.unique(merged.shards).tolist() if shard >= 0])
        columns = (arrays.ids.tolist(), arrays.scores.tolist(), vectors.tolist(), payloads.tolist())
        return [
            [SearchResult(*hit) for hit in zip(*(column[query][:count] for column in columns), strict=True)]
            for query, count in enumerate(arrays.counts.tolist())
        ]


def _one(query: ArrayLike) -> Any:
    return [query]


def _plan(serving: Serving, queries: Float32, num_probes: int | None, shard_ids: Sequence[int] | None) -> Plan:
    num_dbs = serving.state.manifest.num_dbs
    if shard_ids is not None:
        if num_probes is not None:
            raise QueryError("num_probes and shard_ids exclude each other: shard_ids already says which are asked")
        return named_shards(shard_ids, num_dbs, len(queries))
    probes = probes_of(num_probes, serving.state.vector.num_probes, num_dbs)
    return Plan(serving.state.routing.probe(queries)[0][:, :probes])


def _parts(plan: Plan, k: int) -> Iterator[tuple[slice, Plan]]:
    """The batch in parts that bound the memory of a merge."""
    n, probes = plan.shards.shape
    step = max(1, _CELLS // max(1, probes * k))
    for start in range(0, n, step):
        at = slice(start, start + step)
        yield at, Plan(plan.shards[at])


def _joined(parts: list[SearchArrays], k: int) -> SearchArrays:
    if not parts:
        return SearchArrays(np.empty((0, k), dtype=object), np.empty((0, k)), np.empty(0, dtype=np.int64))
    return SearchArrays(
        ids=np.concatenate([part.ids for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
    )


def _objects(values: list[Any]) -> NDArray[Any]:
    return np.fromiter(values, dtype=object, count=len(values))
