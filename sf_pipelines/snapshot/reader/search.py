"""Searching, for all readers: a query goes to the shards of its plan, their hits become one answer."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sf_pipelines.snapshot.errors import SfPipelinesError
from sf_pipelines.snapshot.index.scan import MemoryScan, scan_all
from sf_pipelines.snapshot.manifest.models import CurvePoint, JudgedRecord
from sf_pipelines.snapshot.metric import DistanceMetric, Float32
from sf_pipelines.snapshot.reader.calls import Call, Steps, each_shard
from sf_pipelines.snapshot.reader.core import ReaderCore, Serving
from sf_pipelines.snapshot.reader.merge import Candidates, Merged, ShardAnswer
from sf_pipelines.snapshot.reader.plan import (
    Plan,
    Queries,
    ShardChoice,
    as_queries,
    asked_shards,
    by_shard,
    columns_of,
    hits_of,
    order_for,
    plan_for,
    routable,
    stock_plan,
)
from sf_pipelines.snapshot.reader.shards import OpenShard
from sf_pipelines.snapshot.reader.state import SnapshotState
from sf_pipelines.snapshot.reader.types import (
    ExplainedShard,
    Explanation,
    SearchArrays,
    SearchResult,
    VectorSearchResponse,
)
from sf_pipelines.snapshot.routing.protocol import Int32, VectorRouting

# Cells (queries x shards x hits) that are merged at a time: 2 million take about 100 MB.
_CELLS = 2_000_000

_in_memory = attrgetter("in_memory")
_Part = tuple[int, NDArray[np.int64], NDArray[np.int64]]


def search_one(
    core: ReaderCore, call: Call, query: ArrayLike, top_k: int, choice: ShardChoice, *, include_vectors: bool
) -> Steps[VectorSearchResponse]:
    """The nearest rows of one query, shape (dim,), with payloads."""
    return (yield from search(core, call, [query], top_k, choice, include_vectors=include_vectors))[0]


def search(
    core: ReaderCore, call: Call, queries: Queries, top_k: int, choice: ShardChoice, *, include_vectors: bool
) -> Steps[list[VectorSearchResponse]]:
    """The nearest rows of many queries, shape (n, dim), with payloads."""
    # A wrong call costs no tokens, and while it waits for them it holds no snapshot.
    known = core.state
    rows = as_queries(queries, known.dim, known.metric)
    k = hits_of(known, top_k)
    if core.rate_limiter is not None:
        # All of it is planned for the errors: contexts may be one for each query.
        for _ in _planned(known, rows, choice, k):
            pass
        yield from core.admitted(len(rows))
    with core.serving() as serving:
        if serving.state is not known:
            rows, k = _rows(serving, queries), hits_of(serving.state, top_k)
        searcher = _Searcher(core, serving, call)
        found: list[tuple[list[list[SearchResult]], Plan, dict[int, SfPipelinesError]]] = []
        for at, part in _planned(serving.state, rows, choice, k):
            results = yield from searcher.results(part, rows[at], k, include_vectors=include_vectors)
            found.append((results, part, dict(call.missing)))
        elapsed = call.elapsed_ms
        answers = [
            _answer(serving, results, asked, top_k, missing, elapsed)
            for per_query, part, missing in found
            for results, asked in zip(per_query, asked_shards(part), strict=True)
        ]
        metrics, kind = core.metrics, {"kind": core.kind}
        metrics.search_queries.add(len(rows), kind)
        metrics.search_shards.record(len({shard for answer in answers for shard in answer.shard_ids}), kind)
        metrics.search_results.record(sum(len(answer.results) for answer in answers), kind)
    return answers


# Measuring.


def search_arrays(
    core: ReaderCore, call: Call, queries: Queries, top_k: int, choice: ShardChoice
) -> Steps[SearchArrays]:
    """Ids and scores of many queries as arrays, without payloads."""
    with core.serving() as serving:
        rows, k = _rows(serving, queries), columns_of(top_k)
        return (yield from _Searcher(core, serving, call).arrays(_planned(serving.state, rows, choice, k), rows, k))


def stock_style(
    core: ReaderCore, call: Call, queries: Queries, top_k: int, num_probes: int, shard_of: Int32 | None
) -> Steps[SearchArrays]:
    """What a stock reader answers: its probe order, default index options, the library's own distance for a score."""
    with core.serving() as serving:
        rows, k = _rows(serving, queries), columns_of(top_k)
        plan = stock_plan(serving.state, rows, num_probes, shard_of)
        return (yield from _Searcher(core, serving, call, stock=True).arrays(_parts(plan, k), rows, k))


def probe_curve(
    core: ReaderCore, call: Call, queries: Queries, top_k: int, shard_of: Int32 | None
) -> Steps[list[SearchArrays]]:
    """Answers for 1, 2, … shards per query, each shard asked once for all queries; one point where all are asked."""
    with core.serving() as serving:
        state, rows, k = serving.state, _rows(serving, queries), columns_of(top_k)
        searcher, plan = _Searcher(core, serving, call), order_for(state, rows, shard_of)
        if not isinstance(state.routing, VectorRouting):
            return [(yield from searcher.arrays(_parts(plan, k), rows, k))]
        parts: list[list[SearchArrays]] = []
        for at, part in _parts(plan, k):
            parts.append(list((yield from searcher.candidates(part, rows[at], k)).curve(k)))
        if not parts:
            return [_joined([], k)] * plan.shape[1]
        return [_joined(list(step), k) for step in zip(*parts, strict=True)]


def route_batch(core: ReaderCore, queries: Queries, shard_of: Int32 | None) -> Int32:
    """All shards that queries may ask, in the order of their turn; shape (n, shards)."""
    with core.serving() as serving:
        return order_for(serving.state, _rows(serving, queries), shard_of)


# Without searching.


def route(core: ReaderCore, query: ArrayLike, choice: ShardChoice) -> list[int]:
    """Shards that a query would ask, in order."""
    with core.serving() as serving:
        return asked_shards(plan_for(serving.state, _rows(serving, [query]), choice))[0]


def explain(core: ReaderCore, query: ArrayLike, choice: ShardChoice) -> Explanation:
    """What a search for one query would do, without searching."""
    with core.serving() as serving:
        state, loaded = serving.state, serving.shards.in_memory
        rows = _rows(serving, [query])
        asked = asked_shards(plan_for(state, rows, choice))[0]
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
        point = _measured(state, choice, len(asked))
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


def _measured(state: SnapshotState, choice: ShardChoice, shards: int) -> CurvePoint | JudgedRecord | None:
    """What was measured for searches that ask so many shards: the recall of the default, else that of tuning queries.

    Neither says anything of shards that are named.
    """
    extras = state.manifest.extras
    if extras is None or extras.recall is None or choice.shard_ids is not None:
        return None
    recall = extras.recall
    if recall.judged is not None and recall.judged.num_probes == shards:
        return recall.judged
    return next((point for point in recall.curve if point.num_probes == shards), None)


class _Searcher:
    """Searches the shards of one snapshot, for one call; with ``stock`` as stock readers do."""

    def __init__(self, core: ReaderCore, serving: Serving, call: Call, *, stock: bool = False) -> None:
        self._core = core
        self._shards = serving.shards
        self._state = serving.state
        self._call = call
        self._stock = stock

    def candidates(self, plan: Plan, queries: Float32, k: int) -> Steps[Candidates]:
        """What the shards of a plan answer, each asked once for all queries that ask it."""
        answers = yield from self._answers(plan, queries, k)
        return self._joined(answers, plan, queries)

    def arrays(self, parts: Iterator[tuple[slice, Plan]], rows: Float32, k: int) -> Steps[SearchArrays]:
        """Ids and scores."""
        found: list[SearchArrays] = []
        for at, part in parts:
            found.append((yield from self.candidates(part, rows[at], k)).merge(k).arrays)
        return _joined(found, k)

    def results(
        self, plan: Plan, queries: Float32, k: int, *, include_vectors: bool
    ) -> Steps[list[list[SearchResult]]]:
        """Hits with payloads. A shard that fails to give its payloads gives no hits either."""
        answers = yield from self._answers(plan, queries, k)
        while True:
            missing = len(self._call.missing)
            usable = [answer for answer in answers if answer.shard not in self._call.missing]
            merged = self._joined(usable, plan, queries).merge(k)
            results = yield from self._with_payloads(merged, include_vectors=include_vectors)
            if len(self._call.missing) == missing:
                return results

    def _answers(self, plan: Plan, queries: Float32, k: int) -> Steps[list[ShardAnswer]]:
        parts = [
            part
            for part in by_shard(plan)
            if self._state.shards[part[0]].key is not None and part[0] not in self._call.missing
        ]
        # What is asked as stock readers do is asked of the library, however many vectors are held.
        scanned, rest = ([], parts) if self._stock else self._scanned(parts, queries, k)
        jobs = {part[0]: self._search_of(part, queries, k) for part in rest}
        found = yield from each_shard(self._shards, jobs, self._call)
        return scanned + [found[shard] for shard in jobs if shard in found]

    def _scanned(self, parts: list[_Part], queries: Float32, k: int) -> tuple[list[ShardAnswer], list[_Part]]:
        """Scans the shards that are in memory, right here and together; what is left is for others to do.

        That takes less than a millisecond a shard and uses idle cores itself: handing it to threads makes it slower.
        """
        ready: list[tuple[_Part, MemoryScan]] = []
        rest: list[_Part] = []
        with ExitStack() as held:
            for part in parts:
                opened = None if self._call.left == 0 else self._shards.take_open(part[0], _in_memory)
                scan = None
                if opened is not None:
                    held.callback(self._shards.give_back, opened)
                    scan = opened.index.scan()
                if scan is None:
                    rest.append(part)
                else:
                    ready.append((part, scan))
            started = time.perf_counter()
            jobs = [(scan, part[1]) for part, scan in ready]
            found = scan_all(queries, jobs, k, self._core.idle_threads) if jobs else []
        if found:
            # They were one piece of work, timed once.
            self._core.metrics.ended("shard_search", self._state.kind, "ok", started, calls=len(found))
        return [ShardAnswer(*part, hits) for (part, _), hits in zip(ready, found, strict=True)], rest

    def _search_of(self, part: _Part, queries: Float32, k: int) -> Callable[[OpenShard], ShardAnswer]:
        _, which, _ = part

        def run(opened: OpenShard) -> ShardAnswer:
            with self._core.metrics.timed("shard_search", self._state.kind):
                index, asked = opened.index, queries if len(which) == len(queries) else queries[which]
                if self._stock:
                    return ShardAnswer(*part, index.search_raw(asked, k))
                # Rows of a shard in memory are scored with those of others.
                scan = index.scan()
                return ShardAnswer(*part, index.search(asked, k) if scan is None else scan.candidates(asked, k))

        return run

    def _joined(self, answers: Sequence[ShardAnswer], plan: Plan, queries: Float32) -> Candidates:
        zero = 0.0 if self._stock else self._state.metric.score_of_zero
        return Candidates(answers, queries, plan.shape[1], unique=self._state.is_ours, score_of_zero=zero)

    def _with_payloads(self, merged: Merged, *, include_vectors: bool) -> Steps[list[list[SearchResult]]]:
        """Fetches payloads, for the final hits only, shard by shard."""
        arrays = merged.arrays
        payloads = np.full(arrays.ids.shape, None, dtype=object)
        vectors = np.full(arrays.ids.shape, None, dtype=object)

        def fetch_of(shard: int) -> Callable[[OpenShard], None]:
            def fetch(opened: OpenShard) -> None:
                at = np.nonzero(merged.shards == shard)
                rows = merged.rows[at]
                payloads[at] = _objects(opened.index.payloads(rows))
                if include_vectors:
                    vectors[at] = _objects(list(opened.index.vectors(rows)))

            return fetch

        hit = [shard for shard in np.unique(merged.shards).tolist() if shard >= 0]
        jobs = {shard: fetch_of(shard) for shard in hit}
        yield from each_shard(self._shards, jobs, self._call, _in_memory, answered=True)
        columns = (arrays.ids.tolist(), arrays.scores.tolist(), vectors.tolist(), payloads.tolist())
        return [
            [SearchResult(*hit) for hit in zip(*(column[query][:count] for column in columns), strict=True)]
            for query, count in enumerate(arrays.counts.tolist())
        ]


def _answer(
    serving: Serving,
    results: list[SearchResult],
    asked: list[int],
    top_k: int,
    lost: dict[int, SfPipelinesError],
    elapsed_ms: float,
) -> VectorSearchResponse:
    errors = {shard: lost[shard] for shard in asked if shard in lost} if lost else {}
    return VectorSearchResponse(
        results=results,
        num_shards_queried=len(asked),
        latency_ms=elapsed_ms,
        shard_ids=asked,
        missing_shards=list(errors),
        errors=errors,
        shortfall=None if len(results) == top_k else _shortfall(serving, len(results), asked, list(errors), top_k),
    )


def _shortfall(serving: Serving, found: int, asked: list[int], missing: list[int], top_k: int) -> str:
    """Why there are fewer results than asked for."""
    said = f"{found} of {top_k} results: "
    if missing:
        return f"{said}shards {', '.join(map(str, missing))} did not answer"
    shards = serving.state.shards
    rows = sum(shards[shard].rows for shard in asked)
    if rows >= top_k:
        # Of snapshots of others only: what we write has a distance to everything, and no id twice.
        return (
            f"{said}the other rows of the shards that were asked have no distance to the query, or an id that is there"
        )
    text = f"{said}the {len(asked)} shards that were asked hold {rows} rows"
    return text if len(asked) == len(shards) else f"{text}; ask more shards"


def _planned(state: SnapshotState, rows: Float32, choice: ShardChoice, k: int) -> Iterator[tuple[slice, Plan]]:
    """The batch in parts that bound the memory of routing and of merging."""
    step = max(1, _CELLS // state.manifest.num_dbs)
    for start in range(0, max(1, len(rows)), step):
        block = slice(start, min(start + step, len(rows)))
        for at, part in _parts(plan_for(state, rows[block], choice.of(block, len(rows))), k):
            yield slice(start + at.start, start + at.stop), part


def _rows(serving: Serving, queries: Queries) -> Float32:
    return as_queries(queries, serving.state.dim, serving.state.metric)


def _parts(plan: Plan, k: int) -> Iterator[tuple[slice, Plan]]:
    """The batch in parts that bound the memory of a merge."""
    n, probes = plan.shape
    step = max(1, _CELLS // max(1, probes * k))
    for start in range(0, n, step):
        at = slice(start, min(n, start + step))
        yield at, plan[at]


def _joined(parts: list[SearchArrays], k: int) -> SearchArrays:
    if not parts:
        nothing = np.empty((0, k))
        return SearchArrays(nothing.astype(object), nothing, np.empty(0, dtype=np.int64), nothing)
    return SearchArrays(
        ids=np.concatenate([part.ids for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
        distances=np.concatenate([part.distances for part in parts]),
    )


def _objects(values: list[Any]) -> NDArray[Any]:
    return np.fromiter(values, dtype=object, count=len(values))
