"""The one merge of all readers: candidates of several shards to one answer per query.

Shards that are scanned in memory give rough candidates (``ScanCandidates``), which are scored here once for all
shards; shards that are asked by their index give scored hits. Everything is flat: one number per candidate, so that a
batch costs what its candidates cost.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sf_pipelines.snapshot.index.ranking import IdArray, ShardHits, distinct, first_k, id_ranks
from sf_pipelines.snapshot.index.scan import MemoryScan, ScanCandidates, exact_distances
from sf_pipelines.snapshot.metric import Float32, Float64
from sf_pipelines.snapshot.reader.types import SearchArrays

Int64 = NDArray[np.int64]
# A shard's number, with query, place, row and id of each of its hits.
_Part = tuple[int, Int64, Int64, Int64, IdArray]


@dataclass(frozen=True)
class ShardAnswer:
    """What one shard answered.

    Attributes:
        shard: its number.
        queries: queries that were asked, ascending, shape (m,).
        places: place of the shard in each query's order, shape (m,).
        hits: for these queries: exact ones, or candidates of a scan.
    """

    shard: int
    queries: Int64
    places: Int64
    hits: ShardHits | ScanCandidates


@dataclass(frozen=True)
class Merged:
    """Answers with the places that they come from.

    Attributes:
        arrays: the answers.
        shards: shard of each hit, shape (n, k), -1 where there is none.
        rows: its row reference within the shard, shape (n, k), -1 where there is none.
    """

    arrays: SearchArrays
    shards: Int64
    rows: Int64


class Candidates:
    """What all shards answered to a batch.

    Args:
        answers: of the shards.
        queries: the batch, float32, shape (n, dim).
        places: most shards that a query asked.
        unique: no id is in two shards. Then candidates that others outdo are dropped across shards before they are
            scored, and ids need not be compared.
        score_of_zero: of the metric; 0 where the shards answered with scores.
    """

    def __init__(
        self,
        answers: Sequence[ShardAnswer],
        queries: Float32,
        places: int,
        *,
        unique: bool = False,
        score_of_zero: float = 0.0,
    ) -> None:
        self._queries = queries
        self._places = places
        self._score_of_zero = score_of_zero
        self._scans = [(answer, answer.hits) for answer in answers if isinstance(answer.hits, ScanCandidates)]
        self._indexed = [(answer, answer.hits) for answer in answers if isinstance(answer.hits, ShardHits)]
        self._unique = unique and all(scanned.scan.repeats == 1 for _, scanned in self._scans)

    def merge(self, k: int) -> Merged:
        """The k best of each query over all of its shards."""
        found = self._scored(self._least(k) if self._unique and self._places > 1 and self._scans else None)
        return found.table(found.best(np.arange(len(found.query)), k), len(self._queries), k)

    def curve(self, k: int) -> Iterator[SearchArrays]:
        """The answers of the first shard of each query, of its first two, and so on."""
        found = self._scored(self._least_of_prefixes(k) if self._unique and self._scans else None)
        # Candidates of each place, behind one another.
        order = np.argsort(found.place, kind="stable")
        ends = np.searchsorted(found.place[order], np.arange(self._places), side="right")
        best = np.empty(0, dtype=np.int64)
        start = 0
        for end in ends.tolist():
            best = found.best(np.concatenate([best, order[start:end]]), k)
            start = end
            yield found.table(best, len(self._queries), k).arrays

    def _bounds(self) -> Float64:
        """What rows of the scanned shards have at least for a key, shape (n, places, width); -inf where there is none.

        Each number is another row's.
        """
        width = max(scanned.best.shape[1] for _, scanned in self._scans)
        out = np.full((len(self._queries), self._places, width), -np.inf)
        for answer, scanned in self._scans:
            out[answer.queries, answer.places, : scanned.best.shape[1]] = scanned.best - scanned.bound[:, None]
        return out

    def _least(self, k: int) -> Float64:
        """A lower bound of the k-th best key of each query over its scanned shards, shape (n, 1)."""
        bounds = self._bounds()
        return _kth(bounds.reshape(len(bounds), -1), k)[1][:, None]

    def _least_of_prefixes(self, k: int) -> Float64:
        """The same over the first shard of each query, over its first two, and so on, shape (n, places)."""
        bounds = self._bounds()
        out = np.empty(bounds.shape[:2])
        best = bounds[:, 0, :0]
        for place in range(self._places):
            best, out[:, place] = _kth(np.concatenate([best, bounds[:, place]], axis=1), k)
        return out

    def _scored(self, least: Float64 | None) -> "_Found":
        """All hits with exact distances, but for candidates whose key cannot reach the least of query and place."""
        parts: list[_Part] = []
        pairs: list[tuple[MemoryScan, Int64, Int64]] = []
        for answer, scanned in self._scans:
            own, position = self._kept(answer, scanned, least)
            query = answer.queries[own]
            pairs.append((scanned.scan, query, position))
            rows, ids = scanned.scan.rows[position], scanned.scan.ids_at(position)
            parts.append((answer.shard, query, answer.places[own], rows, ids))
        distances = [exact_distances(self._queries, pairs)]
        for answer, hits in self._indexed:
            at = np.nonzero(np.isfinite(hits.distances) & (hits.rows >= 0))
            parts.append((answer.shard, answer.queries[at[0]], answer.places[at[0]], hits.rows[at], hits.ids[at]))
            distances.append(hits.distances[at])
        return _Found(parts, np.concatenate(distances), unique=self._unique, score_of_zero=self._score_of_zero)

    def _kept(self, answer: ShardAnswer, scanned: ScanCandidates, least: Float64 | None) -> tuple[Int64, Int64]:
        if least is None:
            return scanned.query, scanned.position
        # One column stands for all places.
        places = answer.places if least.shape[1] > 1 else np.zeros_like(answer.places)
        needed = least[answer.queries, places] - scanned.bound
        kept = np.flatnonzero(scanned.key >= needed[scanned.query])
        return scanned.query[kept], scanned.position[kept]


class _Found:
    """Scored hits of all shards, flat.

    Args:
        parts: of the shards.
        distances: of all hits, in the order of the parts.
        unique: no id of a query comes twice.
        score_of_zero: what makes scores of them.
    """

    def __init__(self, parts: list[_Part], distances: Float64, *, unique: bool, score_of_zero: float) -> None:
        none = np.empty(0, dtype=np.int64)
        shards, query, place, rows, ids = zip((0, none, none, none, none), *parts, strict=True)
        self.distances = distances
        self.query: Int64 = np.concatenate(query)
        self.place: Int64 = np.concatenate(place)
        self._rows: Int64 = np.concatenate(rows)
        self._shards: Int64 = np.repeat(np.array(shards), [len(part) for part in query])
        # Others may have written numbers into one shard and text into the next: objects hold both.
        self._ids: IdArray = np.concatenate(ids)
        self._ranks: Int64 | None = self._ids if self._ids.dtype == np.int64 else None
        self._unique = unique
        self._score_of_zero = score_of_zero

    def best(self, hits: Int64, k: int) -> Int64:
        """The k best of each query among these hits, by distance, then by id; each id once. Ordered by query.

        Texts are ranked only where an answer depends on it.
        """
        query, distances = self.query[hits], self.distances[hits]
        if not self._unique:
            hits = hits[distinct(query, distances, self._ranked[hits])]
            query, distances = self.query[hits], self.distances[hits]
        n = int(query.max(initial=-1)) + 1
        if self._ranks is None and not _tied(query, distances):
            return hits[first_k(query, distances, query, n, k)]
        return hits[first_k(query, distances, self._ranked[hits], n, k)]

    def table(self, best: Int64, n: int, k: int) -> Merged:
        """The chosen hits as tables of shape (n, k)."""
        query = self.query[best]
        counts = np.bincount(query, minlength=n)
        at = query, np.arange(len(best)) - (np.cumsum(counts) - counts)[query]
        whole = len(best) == n * k
        ids = np.empty((n, k), dtype=self._ids.dtype if whole else object)
        ids[at] = self._ids[best]
        distances = np.full((n, k), np.nan)
        distances[at] = self.distances[best]
        shards, rows = np.full((n, k), -1, dtype=np.int64), np.full((n, k), -1, dtype=np.int64)
        shards[at], rows[at] = self._shards[best], self._rows[best]
        scores = distances + self._score_of_zero if self._score_of_zero else distances
        return Merged(SearchArrays(ids, scores, counts, distances), shards, rows)

    @property
    def _ranked(self) -> Int64:
        if self._ranks is None:
            self._ranks = id_ranks(self._ids)
        return self._ranks


def _kth(values: Float64, k: int) -> tuple[Float64, Float64]:
    """The k largest of each row, or all, and the k-th of them; -inf where there are fewer."""
    width = values.shape[1]
    if width < k:
        return values, np.full(len(values), -np.inf)
    kept = np.partition(values, width - k, axis=1)[:, width - k :]
    return kept, kept[:, 0]


def _tied(query: Int64, distances: Float64) -> bool:
    """Whether a query has two hits at one distance."""
    order = np.lexsort((distances, query))
    return bool(((np.diff(query[order]) == 0) & (np.diff(distances[order]) == 0)).any())
