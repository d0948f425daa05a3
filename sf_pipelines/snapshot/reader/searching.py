"""Searching, for all readers: a query goes to the shards of its plan, their hits become one answer."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sf_pipelines.snapshot.errors import SfPipelinesError
from sf_pipelines.snapshot.index.protocol import ShardHits, ShardIndex
from sf_pipelines.snapshot.index.scan import MemoryScan, Near, near_all
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.reader.calls import Call, Job, Steps, Terms, each_shard
from sf_pipelines.snapshot.reader.core import ReaderCore, Serving
from sf_pipelines.snapshot.reader.events import SILENT, EventField, EventName, Value
from sf_pipelines.snapshot.reader.handles import OpenShard
from sf_pipelines.snapshot.reader.merge import Candidates, Merged, ShardAnswer
from sf_pipelines.snapshot.reader.plan import (
    Plan,
    Wanted,
    as_queries,
    columns_of,
    hits_of,
    one,
    order_for,
    plan_for,
    stock_plan,
)
from sf_pipelines.snapshot.reader.state import SnapshotState
from sf_pipelines.snapshot.reader.types import SearchArrays, SearchResult, VectorSearchResponse
from sf_pipelines.snapshot.routing.protocol import Int32, VectorRouting

# Cells (queries x shards x hits) that are merged at a time: 2 million take about 100 MB.
_CELLS = 2_000_000

_Part = tuple[int, NDArray[np.int64], NDArray[np.int64]]
Ask = Callable[[ShardIndex, Float32, int], ShardHits | Near]


def exactly(index: ShardIndex, queries: Float32, k: int) -> ShardHits | Near:
    """Nearest rows with exact distances; of a shard in memory those that may be, to be scored with those of others."""
    scan = index.scan()
    return index.search(queries, k) if scan is None else scan.near(queries, k)


def as_stock(index: ShardIndex, queries: Float32, k: int) -> ShardHits:
    """What a stock reader gets."""
    return index.search_raw(queries, k)


def search(
    core: ReaderCore, queries: ArrayLike, top_k: int, wanted: Wanted, terms: Terms, *, include_vectors: bool
) -> Call[list[VectorSearchResponse]]:
    """The nearest rows of many queries, with payloads.

    Args:
        core: of the reader.
        queries: shape (n, dim).
        top_k: results wanted.
        wanted: what the caller says of the shards to ask.
        terms: deadline, and whether partial answers are wanted.
        include_vectors: return the stored vectors too.

    Raises:
        QueryError: an argument is wrong.
        ReaderClosedError: the reader was closed.
        StoreError: a shard cannot be fetched.
        IntegrityError: a shard is damaged.
        DeadlineError: a shard did not answer in time.
        RateLimitError: the rate limiter would have taken longer than that.
    """
    return Call(EventName.SEARCH, terms, _search(core, queries, top_k, wanted, terms, include_vectors))


def search_one(
    core: ReaderCore, query: ArrayLike, top_k: int, wanted: Wanted, terms: Terms, *, include_vectors: bool
) -> Call[VectorSearchResponse]:
    """The same for one query, shape (dim,)."""

    def steps() -> Steps[VectorSearchResponse]:
        return (yield from _search(core, one(query), top_k, wanted, terms, include_vectors))[0]

    return Call(EventName.SEARCH, terms, steps())


def _search(
    core: ReaderCore, queries: ArrayLike, top_k: int, wanted: Wanted, terms: Terms, include_vectors: bool
) -> Steps[list[VectorSearchResponse]]:
    # A wrong call costs no tokens, and while it waits for them it holds no snapshot.
    known = core.state
    rows = as_queries(queries, known.dim, known.metric)
    k = hits_of(known, top_k)
    if core.is_limited:
        # All of it is planned for the errors: contexts may be one for each query.
        deque(_planned(known, rows, wanted, k), maxlen=0)
        yield from core.admitted(len(rows))
    with core.serving() as serving:
        if serving.state is not known:
            rows, k = _rows(serving, queries), hits_of(serving.state, top_k)
        ask = _Asking(core, serving, terms)
        found: list[tuple[list[list[SearchResult]], Plan, dict[int, SfPipelinesError]]] = []
        for at, part in _planned(serving.state, rows, wanted, k):
            results = yield from ask.results(part, rows[at], k, include_vectors=include_vectors)
            found.append((results, part, dict(terms.missing)))
        elapsed = terms.elapsed_ms
        answers = [
            _answer(serving, results, asked, top_k, missing, elapsed)
            for per_query, part, missing in found
            for results, asked in zip(per_query, part.asked(), strict=True)
        ]
        terms.facts = {
            EventField.QUERIES: len(rows),
            EventField.SHARDS: len({shard for answer in answers for shard in answer.shard_ids}),
            EventField.RESULTS: sum(len(answer.results) for answer in answers),
        }
    return answers


def search_arrays(core: ReaderCore, queries: ArrayLike, top_k: int, wanted: Wanted) -> Call[SearchArrays]:
    """Ids and scores of many queries as arrays, without payloads; see ``search``."""

    def steps() -> Steps[SearchArrays]:
        with core.serving() as serving:
            rows, k = _rows(serving, queries), columns_of(top_k)
            return (yield from _Asking(core, serving, terms).arrays(_planned(serving.state, rows, wanted, k), rows, k))

    terms = Terms()
    return Call(None, terms, steps())


def stock_style(
    core: ReaderCore, queries: ArrayLike, top_k: int, num_probes: int, homes: Int32 | None
) -> Call[SearchArrays]:
    """What a stock reader answers: its probe order, default index options, the library's own distance for a score."""

    def steps() -> Steps[SearchArrays]:
        with core.serving() as serving:
            rows, k = _rows(serving, queries), columns_of(top_k)
            plan = stock_plan(serving.state, rows, num_probes, homes)
            return (yield from _Asking(core, serving, terms, as_stock).arrays(_parts(plan, k), rows, k))

    terms = Terms()
    return Call(None, terms, steps())


def probe_curve(core: ReaderCore, queries: ArrayLike, top_k: int, homes: Int32 | None) -> Call[list[SearchArrays]]:
    """Answers for 1, 2, … shards per query, each shard asked once for all queries; one point where all are asked."""

    def steps() -> Steps[list[SearchArrays]]:
        with core.serving() as serving:
            state, rows, k = serving.state, _rows(serving, queries), columns_of(top_k)
            ask, plan = _Asking(core, serving, terms), Plan(order_for(state, rows, homes))
            if not isinstance(state.routing, VectorRouting):
                return [(yield from ask.arrays(_parts(plan, k), rows, k))]
            parts: list[list[SearchArrays]] = []
            for at, part in _parts(plan, k):
                parts.append(list((yield from ask.candidates(part, rows[at], k)).curve(k)))
            if not parts:
                return [_joined([], k)] * plan.shards.shape[1]
            return [_joined(list(step), k) for step in zip(*parts, strict=True)]

    terms = Terms()
    return Call(None, terms, steps())


def route(core: ReaderCore, queries: ArrayLike, wanted: Wanted) -> list[list[int]]:
    """Shards that queries would ask, in order; see ``search``."""
    with core.serving() as serving:
        return plan_for(serving.state, _rows(serving, queries), wanted).asked()


def route_batch(core: ReaderCore, queries: ArrayLike, homes: Int32 | None) -> Int32:
    """All shards that queries may ask, in the order of their turn; shape (n, shards)."""
    with core.serving() as serving:
        return order_for(serving.state, _rows(serving, queries), homes)


class _Asking:
    """Questions to the shards of one snapshot, on one caller's terms."""

    def __init__(self, core: ReaderCore, serving: Serving, terms: Terms, ask: Ask = exactly) -> None:
        self._core = core
        self._handles = serving.handles
        self._state = serving.state
        self._terms = terms
        self._ask = ask

    def candidates(self, plan: Plan, queries: Float32, k: int) -> Steps[Candidates]:
        """What the shards of a plan answer, each asked once for all queries that want it."""
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
            missing = len(self._terms.missing)
            usable = [answer for answer in answers if answer.shard not in self._terms.missing]
            merged = self._joined(usable, plan, queries).merge(k)
            results = yield from self._with_payloads(merged, include_vectors=include_vectors)
            if len(self._terms.missing) == missing:
                return results

    def _answers(self, plan: Plan, queries: Float32, k: int) -> Steps[list[ShardAnswer]]:
        parts = [
            part
            for part in plan.by_shard()
            if self._state.shards[part[0]].key is not None and part[0] not in self._terms.missing
        ]
        # What is asked as stock readers do is asked of the library, however many vectors are held.
        scanned, rest = self._scanned(parts, queries, k) if self._ask is exactly else ([], parts)
        jobs = [Job(part[0], self._search_of(part, queries, k)) for part in rest]
        found = yield from each_shard(self._handles, jobs, self._terms, _never)
        return scanned + [found[job.shard] for job in jobs if job.shard in found]

    def _scanned(self, parts: list[_Part], queries: Float32, k: int) -> tuple[list[ShardAnswer], list[_Part]]:
        """Scans the shards that are in memory, right here and together; what is left is for others to do.

        That takes less than a millisecond a shard and uses idle cores itself: handing it to threads makes it slower.
        """
        ready: list[tuple[_Part, MemoryScan]] = []
        rest: list[_Part] = []
        with ExitStack() as held:
            for part in parts:
                handle = None if self._terms.left == 0 else self._handles.take_open(part[0], _is_in_memory)
                scan = None
                if handle is not None:
                    held.callback(self._handles.give_back, handle)
                    scan = handle.shard.index.scan()
                if scan is None:
                    rest.append(part)
                else:
                    ready.append((part, scan))
            started = time.perf_counter()
            jobs = [(scan, part[1]) for part, scan in ready]
            found = near_all(queries, jobs, k, self._core.idle_threads) if jobs else []
        if self._core.events is not SILENT:
            self._tell_scans([part for part, _ in ready], found, (time.perf_counter() - started) * 1000)
        return [ShardAnswer(*part, near) for (part, _), near in zip(ready, found, strict=True)], rest

    def _tell_scans(self, parts: list[_Part], found: list[Near], elapsed_ms: float) -> None:
        """They were one piece of work: each tells the time of all."""
        for (shard, which, _), near in zip(parts, found, strict=True):
            facts: dict[str, Value] = {
                EventField.KIND: self._state.kind,
                EventField.STATUS: "ok",
                EventField.SHARD: shard,
                EventField.QUERIES: len(which),
                EventField.RESULTS: len(near.query),
                EventField.LATENCY_MS: elapsed_ms,
            }
            self._core.events.emit(EventName.SHARD_SEARCH, facts)

    def _search_of(self, part: _Part, queries: Float32, k: int) -> Callable[[OpenShard], ShardAnswer]:
        shard, which, _ = part

        def run(opened: OpenShard) -> ShardAnswer:
            asked = queries if len(which) == len(queries) else queries[which]
            return ShardAnswer(*part, self._ask(opened.index, asked, k))

        return run if self._core.events is SILENT else self._told(shard, len(which), run)

    def _told(
        self, shard: int, queries: int, run: Callable[[OpenShard], ShardAnswer]
    ) -> Callable[[OpenShard], ShardAnswer]:
        """The same, and a listener is told."""

        def told(opened: OpenShard) -> ShardAnswer:
            about: dict[str, Value] = {EventField.SHARD: shard, EventField.QUERIES: queries}
            terms = Terms(facts=about)
            with terms.reported(self._core.events, EventName.SHARD_SEARCH, self._state.kind):
                answer = run(opened)
                hits = answer.hits
                about[EventField.RESULTS] = int(hits.counts.sum()) if isinstance(hits, ShardHits) else len(hits.query)
            return answer

        return told

    def _joined(self, answers: Sequence[ShardAnswer], plan: Plan, queries: Float32) -> Candidates:
        zero = self._state.metric.score_of_zero if self._ask is exactly else 0.0
        return Candidates(answers, queries, plan.shards.shape[1], unique=self._state.is_ours, score_of_zero=zero)

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
        jobs = [Job(shard, fetch_of(shard)) for shard in hit]
        yield from each_shard(self._handles, jobs, self._terms, _is_in_memory, answered=True)
        columns = (arrays.ids.tolist(), arrays.scores.tolist(), vectors.tolist(), payloads.tolist())
        return [
            [SearchResult(*hit) for hit in zip(*(column[query][:count] for column in columns), strict=True)]
            for query, count in enumerate(arrays.counts.tolist())
        ]


def _is_in_memory(opened: OpenShard) -> bool:
    return opened.in_memory


def _never(opened: OpenShard) -> bool:
    del opened
    return False


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
    """Why there are fewer results than wanted."""
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


def _planned(state: SnapshotState, rows: Float32, wanted: Wanted, k: int) -> Iterator[tuple[slice, Plan]]:
    """The batch in parts that bound the memory of routing and of merging."""
    step = max(1, _CELLS // state.manifest.num_dbs)
    for start in range(0, max(1, len(rows)), step):
        block = slice(start, min(start + step, len(rows)))
        for at, part in _parts(plan_for(state, rows[block], wanted.of(block, len(rows))), k):
            yield slice(start + at.start, start + at.stop), part


def _rows(serving: Serving, queries: ArrayLike) -> Float32:
    return as_queries(queries, serving.state.dim, serving.state.metric)


def _parts(plan: Plan, k: int) -> Iterator[tuple[slice, Plan]]:
    """The batch in parts that bound the memory of a merge."""
    n, probes = plan.shards.shape
    step = max(1, _CELLS // max(1, probes * k))
    for start in range(0, n, step):
        at = slice(start, min(n, start + step))
        yield at, Plan(plan.shards[at])


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
