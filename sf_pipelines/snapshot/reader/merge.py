"""The one merge of all readers: hits of several shards to one answer per query."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sf_pipelines.snapshot.index.protocol import IdArray, ShardHits
from sf_pipelines.snapshot.index.scan import rank_values
from sf_pipelines.snapshot.metric import Float64
from sf_pipelines.snapshot.reader.types import SearchArrays

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class ShardAnswer:
    """What one shard answered.

    Attributes:
        shard: its number.
        queries: queries that were asked, shape (m,).
        places: place of the shard in each query's order, shape (m,).
        hits: for these queries.
    """

    shard: int
    queries: Int64
    places: Int64
    hits: ShardHits


@dataclass(frozen=True)
class Merged:
    """Answers with the places that they come from.

    Attributes:
        arrays: ids, scores, counts.
        shards: shard of each hit, shape (n, k), -1 where there is none.
        rows: its row reference within the shard, shape (n, k), -1 where there is none.
    """

    arrays: SearchArrays
    shards: Int64
    rows: Int64


class Candidates:
    """Hits of all shards side by side: query, place in the query's order, rank within the shard.

    Args:
        answers: of the shards.
        queries: number of queries.
        places: shards that each query asked.
    """

    def __init__(self, answers: Sequence[ShardAnswer], queries: int, places: int) -> None:
        width = max((answer.hits.rows.shape[1] for answer in answers), default=0)
        shape = (queries, places, width)
        kinds = {answer.hits.ids.dtype for answer in answers}
        # Others may have written numbers into one shard and text into the next: objects hold both.
        kind = np.dtype(np.int64) if kinds <= {np.dtype(np.int64)} else np.dtype(object)
        self.ids: IdArray = np.full(shape, 0 if kind == np.int64 else None, dtype=kind)
        self.scores: Float64 = np.full(shape, np.inf)
        self.rows: Int64 = np.full(shape, -1, dtype=np.int64)
        self.shards: Int64 = np.full(shape, -1, dtype=np.int64)
        for answer in answers:
            hits = answer.hits
            at = (answer.queries, answer.places, slice(0, hits.rows.shape[1]))
            self.ids[at] = hits.ids
            self.scores[at] = np.where(np.isnan(hits.scores), np.inf, hits.scores)
            self.rows[at] = hits.rows
            self.shards[at] = np.where(hits.rows < 0, -1, answer.shard)
        self.ranks = self._ranks()

    def merge(self, k: int) -> Merged:
        """The k best of each query over all of its shards."""
        n = len(self.scores)
        picked = _best(self.scores.reshape(n, -1), self.ranks.reshape(n, -1), k)
        cells = np.where(picked < 0, -1, picked + np.arange(n)[:, None] * (self.scores[0].size if n else 0))
        return Merged(self._arrays(cells), self._at(self.shards, cells, -1), self._at(self.rows, cells, -1))

    def curve(self, k: int) -> Iterator[SearchArrays]:
        """The answers of the first shard of each query, of its first two, and so on."""
        n, places, width = self.scores.shape
        # The best so far, with the cell of the table that each comes from.
        scores, ranks = np.full((n, k), np.inf), np.zeros((n, k), dtype=np.int64)
        cells = np.full((n, k), -1, dtype=np.int64)
        table = np.arange(n * places * width).reshape(n, places, width)
        for place in range(places):
            scores = np.concatenate([scores, self.scores[:, place]], axis=1)
            ranks = np.concatenate([ranks, self.ranks[:, place]], axis=1)
            cells = np.concatenate([cells, table[:, place]], axis=1)
            picked = _best(scores, ranks, k)
            scores = np.where(picked < 0, np.inf, np.take_along_axis(scores, picked, axis=1))
            ranks = np.take_along_axis(ranks, picked, axis=1)
            cells = np.where(picked < 0, -1, np.take_along_axis(cells, picked, axis=1))
            yield self._arrays(cells)

    def _arrays(self, cells: Int64) -> SearchArrays:
        hit = cells >= 0
        ids = self._at(self.ids, cells, 0 if self.ids.dtype == np.int64 else None)
        if not hit.all():
            ids = ids.astype(object)
            ids[~hit] = None
        return SearchArrays(ids, self._at(self.scores, cells, np.nan), hit.sum(axis=1))

    @staticmethod
    def _at(values: NDArray[Any], cells: Int64, fill: Any) -> NDArray[Any]:
        out = np.full(cells.shape, fill, dtype=values.dtype)
        hit = cells >= 0
        out[hit] = values.reshape(-1)[cells[hit]]
        return out

    def _ranks(self) -> Int64:
        """Numbers that sort as the ids do; where there is no hit they mean nothing."""
        if self.ids.dtype == np.int64:
            return self.ids
        out = np.zeros(self.ids.shape, dtype=np.int64)
        hit = self.rows >= 0
        if hit.any():
            out[hit] = rank_values(self.ids[hit])
        return out


def _best(scores: Float64, ranks: Int64, k: int) -> Int64:
    """Columns of the k best of each row, by score, then by id; each id once.

    Args:
        scores: shape (n, m), inf where there is no hit.
        ranks: order of the ids, shape (n, m).
        k: most hits of a row.

    Returns:
        Shape (n, k), -1 where there are fewer.
    """
    scores = _without_repeats(scores, ranks)
    order = np.lexsort((ranks, scores), axis=1)[:, :k]
    picked = np.where(np.isinf(np.take_along_axis(scores, order, axis=1)), -1, order)
    return np.pad(picked, ((0, 0), (0, k - picked.shape[1])), constant_values=-1)


def _without_repeats(scores: Float64, ranks: Int64) -> Float64:
    """The scores, inf for a hit whose id is there with a better one."""
    order = np.lexsort((scores, ranks), axis=1)
    ids, values = np.take_along_axis(ranks, order, axis=1), np.take_along_axis(scores, order, axis=1)
    repeated = (ids[:, 1:] == ids[:, :-1]) & np.isfinite(values[:, 1:])
    if not repeated.any():
        return scores
    rows, columns = np.nonzero(repeated)
    out = scores.copy()
    out[rows, order[rows, columns + 1]] = np.inf
    return out
