"""The exact ranking that every index shares: by distance, then by id."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sf_pipelines.snapshot.index.protocol import IdArray, ShardHits
from sf_pipelines.snapshot.metric import Float64

Int64 = NDArray[np.int64]
# int64 or string; or numpy objects, int and str mixed.
Ids = pa.Array | pa.ChunkedArray | IdArray


class Selection:
    """The first k of each query among flat candidates.

    Attributes:
        flat: positions of the chosen candidates, ordered by query and then from best to worst.
    """

    def __init__(self, flat: Int64, query: Int64, slot: Int64, shape: tuple[int, int]) -> None:
        self.flat = flat
        self._query = query
        self._slot = slot
        self._shape = shape

    def hits(self, rows: Int64, ids: Ids, distances: Float64) -> ShardHits:
        """Spreads values over (query, slot).

        Args:
            rows: row reference of each chosen candidate.
            ids: id of each chosen candidate.
            distances: of every candidate.
        """
        at = (self._query, self._slot)
        out_rows = np.full(self._shape, -1, dtype=np.int64)
        out_rows[at] = rows
        out_distances = np.full(self._shape, np.nan)
        out_distances[at] = distances[self.flat]
        values = id_values(ids)
        out_ids = np.full(self._shape, 0 if values.dtype == np.int64 else None, dtype=values.dtype)
        out_ids[at] = values
        return ShardHits(out_rows, out_ids, out_distances, np.bincount(self._query, minlength=self._shape[0]))


def first_k(query: Int64, distances: Float64, ranks: Int64, n: int, k: int) -> Selection:
    """Chooses the k best candidates of each of n queries: by distance, then by id.

    Args:
        query: query of each candidate.
        distances: of each candidate.
        ranks: order of the candidates' ids.
        n: number of queries.
        k: most candidates of a query.
    """
    order = np.lexsort((ranks, distances, query))
    grouped = query[order]
    starts = np.searchsorted(grouped, np.arange(n))
    slot = np.arange(len(order)) - starts[grouped]
    keep = slot < k
    return Selection(order[keep], grouped[keep], slot[keep], (n, k))


def distinct(query: Int64, distances: Float64, ranks: Int64) -> Int64:
    """Positions of the candidates that are at a distance, of those with the same query and id the nearest only.

    Args:
        query: query of each candidate.
        distances: of each candidate.
        ranks: order of the candidates' ids; equal ids have equal ranks.
    """
    order = np.lexsort((distances, ranks, query))
    order = order[np.isfinite(distances[order])]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(query[order]) != 0) | (np.diff(ranks[order]) != 0)
    return order[new]


def replaced(hits: ShardHits, which: Int64, others: ShardHits) -> ShardHits:
    """The hits with others for some queries; as wide as the wider ones.

    Args:
        hits: of all queries.
        which: queries that get others.
        others: hits of these, in their order.
    """
    shape = len(hits.counts), max(hits.rows.shape[1], others.rows.shape[1])
    kept = np.setdiff1d(np.arange(shape[0]), which)

    def merged(old: NDArray[Any], new: NDArray[Any], none: float | None) -> NDArray[Any]:
        out: NDArray[Any] = np.full(shape, none, dtype=old.dtype)
        out[kept, : old.shape[1]] = old[kept]
        out[which, : new.shape[1]] = new
        return out

    counts = hits.counts.copy()
    counts[which] = others.counts
    return ShardHits(
        merged(hits.rows, others.rows, -1),
        merged(hits.ids, others.ids, 0 if hits.ids.dtype == np.int64 else None),
        merged(hits.distances, others.distances, np.nan),
        counts,
    )


def no_hits(queries: int, ids: Ids) -> ShardHits:
    """The answer of a shard without rows; its (no) ids say their type."""
    shape = (queries, 0)
    none = np.empty(shape, dtype=id_values(ids).dtype)
    return ShardHits(np.empty(shape, np.int64), none, np.empty(shape), np.zeros(queries, dtype=np.int64))


def take_ids(ids: Ids, positions: Int64) -> Ids:
    """The ids at these positions."""
    return ids[positions] if isinstance(ids, np.ndarray) else ids.take(pa.array(positions))


def id_values(ids: Ids) -> IdArray:
    """Ids as numpy: int64, or str objects (of mixed ids: int and str)."""
    if isinstance(ids, np.ndarray):
        return ids
    array = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    return array.to_numpy(zero_copy_only=False)


def is_numbers(ids: Ids) -> bool:
    """Whether all ids are numbers by their type."""
    return ids.dtype == np.int64 if isinstance(ids, np.ndarray) else pa.types.is_integer(ids.type)


def find_ids(wanted: Sequence[int | str], ids: Ids, rows: Int64) -> Int64:
    """Row reference of each wanted id, the first where there are several; -1 where there is none.

    Args:
        wanted: ids; one of another type than the stored ones is not found.
        ids: of all rows.
        rows: reference of each row.
    """
    kind = (int, str) if isinstance(ids, np.ndarray) else int if is_numbers(ids) else str
    asked = [value for value in wanted if isinstance(value, kind)]
    if isinstance(ids, np.ndarray):
        hit = np.flatnonzero([value in asked for value in ids.tolist()])
    else:
        among = pc.SetLookupOptions(value_set=pa.array(asked, ids.type))
        hit = np.flatnonzero(pc.call_function("is_in", [ids], among).to_numpy(zero_copy_only=False))
    found = dict(zip(id_values(take_ids(ids, hit[::-1])).tolist(), rows[hit[::-1]].tolist(), strict=True))
    return np.array([found.get(value, -1) for value in wanted], dtype=np.int64)


def most_repeats(ids: Ids) -> int:
    """Rows of the id that has most of them; 1 where there are none."""
    if isinstance(ids, np.ndarray):
        return int(np.unique(rank_values(ids), return_counts=True)[1].max(initial=1))
    if pc.call_function("count_distinct", [ids]).as_py() == len(ids):
        return 1
    return int(pc.call_function("value_counts", [ids]).field("counts").to_numpy().max(initial=1))


def id_ranks(ids: Ids) -> Int64:
    """Numbers that sort as the ids do; equal ids get equal numbers."""
    if isinstance(ids, np.ndarray):
        return rank_values(ids)
    if pa.types.is_integer(ids.type):
        return id_values(ids)
    return _dense_ranks(ids)


def rank_values(values: IdArray) -> Int64:
    """Numbers that sort as ids do, int before str; equal ids get equal numbers.

    Args:
        values: int64, or int and str objects, shape (n,).
    """
    if values.dtype != object:
        return values.astype(np.int64)
    kinds = set(map(type, values.tolist()))
    if kinds <= {str}:
        return _dense_ranks(pa.array(values, pa.string()))
    if str not in kinds:
        return values.astype(np.int64)
    whole = np.fromiter((not isinstance(value, str) for value in values), dtype=bool, count=len(values))
    ranks = np.empty(len(values), dtype=np.int64)
    # Numbers are ranked, too: as they are, they could not be kept below the ranks of the texts.
    ranks[whole] = _dense_ranks(pa.array(values[whole].astype(np.int64)))
    ranks[~whole] = _dense_ranks(pa.array(values[~whole], pa.string())) + ranks[whole].max()
    return ranks


def _dense_ranks(ids: pa.Array | pa.ChunkedArray) -> Int64:
    ranks = pc.call_function("rank", [ids], pc.RankOptions(sort_keys="ascending", tiebreaker="dense"))
    return ranks.to_numpy().astype(np.int64)
