"""Searching, for all readers: a query goes to the shards of its plan, their hits become one answer."""

import time
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sf_pipelines.snapshot.errors import QueryError
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.reader.core import ReaderCore, Serving, as_stock, exactly
from sf_pipelines.snapshot.reader.merge import Merged
from sf_pipelines.snapshot.reader.plan import Plan, Wanted, as_queries, order_for, plan_for, positive, stock_plan
from sf_pipelines.snapshot.reader.types import SearchArrays, SearchResult, VectorSearchResponse
from sf_pipelines.snapshot.routing.protocol import Int32, VectorRouting

# Cells (queries x shards x hits) that are merged at a time: 2 million take about 100 MB.
_CELLS = 2_000_000
_MOST_HITS = 1_000_000


def search(
    core: ReaderCore, queries: ArrayLike, top_k: int, wanted: Wanted, *, include_vectors: bool
) -> list[VectorSearchResponse]:
    """The nearest rows of many queries, with payloads.

    Args:
        core: of the reader.
        queries: shape (n, dim).
        top_k: results wanted.
        wanted: what the caller says of the shards to ask.
        include_vectors: return the stored vectors too.

    Raises:
        QueryError: an argument is wrong.
        ReaderClosedError: the reader was closed.
        StoreError: a shard cannot be fetched.
        IntegrityError: a shard is damaged.
    """
    started = time.perf_counter()
    with core.serving() as serving:
        k = _wanted_hits(serving, top_k)
        rows = _rows(serving, queries)
        found: list[tuple[list[list[SearchResult]], Plan]] = []
        for at, part in _planned(serving, rows, wanted, k):
            merged = core.candidates(serving, part, rows[at], k).merge(k)
            found.append((_results(core, serving, merged, include_vectors=include_vectors), part))
    elapsed = (time.perf_counter() - started) * 1000
    return [
        VectorSearchResponse(results, len(asked), elapsed, asked)
        for answers, part in found
        for results, asked in zip(answers, part.asked(), strict=True)
    ]


def search_arrays(core: ReaderCore, queries: ArrayLike, top_k: int, wanted: Wanted) -> SearchArrays:
    """Ids and scores of many queries as arrays, without payloads; see ``search``."""
    with core.serving() as serving:
        rows, k = _rows(serving, queries), _columns(top_k)
        parts = _planned(serving, rows, wanted, k)
        return _joined([core.candidates(serving, part, rows[at], k, exactly).merge(k).arrays for at, part in parts], k)


def stock_style(core: ReaderCore, queries: ArrayLike, top_k: int, num_probes: int, homes: Int32 | None) -> SearchArrays:
    """What a stock reader answers: its probe order, default index options, the library's own distance for a score."""
    with core.serving() as serving:
        rows, k = _rows(serving, queries), _columns(top_k)
        plan = stock_plan(serving.state, rows, num_probes, homes)
        return _joined(
            [core.candidates(serving, p, rows[at], k, as_stock).merge(k).arrays for at, p in _parts(plan, k)], k
        )


def probe_curve(core: ReaderCore, queries: ArrayLike, top_k: int, homes: Int32 | None) -> list[SearchArrays]:
    """Answers for 1, 2, … shards per query, each shard asked once for all queries; one point where all are asked."""
    with core.serving() as serving:
        state, rows, k = serving.state, _rows(serving, queries), _columns(top_k)
        plan = Plan(order_for(state, rows, homes))
        if not isinstance(state.routing, VectorRouting):
            return [_asked(core, serving, plan, rows, k)]
        parts = [list(core.candidates(serving, part, rows[at], k).curve(k)) for at, part in _parts(plan, k)]
        if not parts:
            return [_joined([], k)] * plan.shards.shape[1]
    return [_joined(list(step), k) for step in zip(*parts, strict=True)]


def route(core: ReaderCore, queries: ArrayLike, wanted: Wanted) -> list[list[int]]:
    """Shards that queries would ask, in order; see ``search``."""
    with core.serving() as serving:
        return plan_for(serving.state, _rows(serving, queries), wanted).asked()


def route_batch(core: ReaderCore, queries: ArrayLike, homes: Int32 | None) -> Int32:
    """All shards that queries may ask, in the order of their turn; shape (n, shards)."""
    with core.serving() as serving:
        return order_for(serving.state, _rows(serving, queries), homes)


def _wanted_hits(serving: Serving, top_k: int) -> int:
    """As many as were asked for, and no more than there can be."""
    state = serving.state
    # Others count keys, and need not give each a vector, or may give it several.
    counted = state.kind == "vector" or state.is_ours
    return min(positive(top_k, "top_k"), max(1, state.manifest.row_count if counted else _MOST_HITS))


def _columns(top_k: int) -> int:
    """Width of a table of answers, which is filled up where a query has fewer.

    Raises:
        QueryError: such a table would fill the memory.
    """
    k = positive(top_k, "top_k")
    if k > _MOST_HITS:
        raise QueryError(f"top_k must be at most {_MOST_HITS} (got {k})")
    return k


def _planned(serving: Serving, rows: Float32, wanted: Wanted, k: int) -> Iterator[tuple[slice, Plan]]:
    """The batch in parts that bound the memory of routing and of merging."""
    step = max(1, _CELLS // serving.state.manifest.num_dbs)
    for start in range(0, max(1, len(rows)), step):
        block = slice(start, min(start + step, len(rows)))
        for at, part in _parts(plan_for(serving.state, rows[block], wanted.of(block, len(rows))), k):
            yield slice(start + at.start, start + at.stop), part


def _rows(serving: Serving, queries: ArrayLike) -> Float32:
    return as_queries(queries, serving.state.dim, serving.state.metric)


def _asked(core: ReaderCore, serving: Serving, plan: Plan, rows: Float32, k: int) -> SearchArrays:
    return _joined(
        [core.candidates(serving, part, rows[at], k, exactly).merge(k).arrays for at, part in _parts(plan, k)], k
    )


def _results(core: ReaderCore, serving: Serving, merged: Merged, *, include_vectors: bool) -> list[list[SearchResult]]:
    """Fetches payloads, for the final hits only, shard by shard."""
    arrays = merged.arrays
    payloads = np.full(arrays.ids.shape, None, dtype=object)
    vectors = np.full(arrays.ids.shape, None, dtype=object)

    def fetch(shard: int) -> None:
        at = np.nonzero(merged.shards == shard)
        wanted, back = np.unique(merged.rows[at], return_inverse=True)
        with serving.handles.borrow(shard) as opened:
            payloads[at] = _objects(_each_its_own(opened.index.payloads(wanted), back.tolist()))
            if include_vectors:
                vectors[at] = _objects(list(opened.index.vectors(wanted)[back]))

    hit = [shard for shard in np.unique(merged.shards).tolist() if shard >= 0]
    core.spread(fetch, hit, serving.handles.in_memory)
    columns = (arrays.ids.tolist(), arrays.scores.tolist(), vectors.tolist(), payloads.tolist())
    return [
        [SearchResult(*hit) for hit in zip(*(column[query][:count] for column in columns), strict=True)]
        for query, count in enumerate(arrays.counts.tolist())
    ]


def _parts(plan: Plan, k: int) -> Iterator[tuple[slice, Plan]]:
    """The batch in parts that bound the memory of a merge."""
    n, probes = plan.shards.shape
    step = max(1, _CELLS // max(1, probes * k))
    for start in range(0, n, step):
        at = slice(start, min(n, start + step))
        yield at, Plan(plan.shards[at])


def _joined(parts: list[SearchArrays], k: int) -> SearchArrays:
    if not parts:
        return SearchArrays(np.empty((0, k), dtype=object), np.empty((0, k)), np.empty(0, dtype=np.int64))
    return SearchArrays(
        ids=np.concatenate([part.ids for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
    )


def _each_its_own(payloads: list[dict[str, Any] | None], back: list[int]) -> list[dict[str, Any] | None]:
    """The payload of each hit; rows that several queries hit give each a copy, so that nobody changes another's."""
    if len(payloads) == len(back):
        return [payloads[place] for place in back]
    return [deepcopy(payloads[place]) for place in back]


def _objects(values: list[Any]) -> NDArray[Any]:
    return np.fromiter(values, dtype=object, count=len(values))
