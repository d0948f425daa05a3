"""Hits of a shard, and the exact ranking that every index shares: by distance, then by id."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sf_pipelines.snapshot.metric import Float64

Int64 = NDArray[np.int64]
# int64 ids, or objects: str (where a shard mixes types int and str), None where there is no hit.
IdArray = NDArray[Any]
# int64 or string; or numpy objects, int and str mixed.
Ids = pa.Array | IdArray


@dataclass(frozen=True)
class ShardHits:
    """Nearest rows of one shard for a batch of queries, nearest first, equal distances by id.

    Attributes:
        rows: row references within the shard, int64, shape (n, k), -1 where there is no hit.
        ids: int64 or objects, shape (n, k); 0 or None where there is no hit.
        distances: as ``pair_distances`` gives them, float64, shape (n, k), NaN where there is no hit.
        counts: hits of each query, shape (n,).
    """

    rows: Int64
    ids: IdArray
    distances: Float64
    counts: Int64

    @classmethod
    def of(cls, query: Int64, rows: Int64, ids: Ids, distances: Float64, shape: tuple[int, int]) -> "ShardHits":
        """Hits as tables of shape (n, k); ``query`` says whose each is, they are ordered by it and by rank."""
        values = id_values(ids)
        counts = np.bincount(query, minlength=shape[0])
        at = query, np.arange(len(query)) - (np.cumsum(counts) - counts)[query]
        out = cls(
            np.full(shape, -1, dtype=np.int64),
            np.full(shape, 0 if values.dtype == np.int64 else None, dtype=values.dtype),
            np.full(shape, np.nan),
            counts,
        )
        out.rows[at], out.ids[at], out.distances[at] = rows, values, distances
        return out

    def replaced(self, which: Int64, others: "ShardHits") -> "ShardHits":
        """These hits, with other ones for some of the queries; as wide as the wider of both."""
        shape = len(self.counts), max(self.rows.shape[1], others.rows.shape[1])
        kept = np.setdiff1d(np.arange(shape[0]), which)

        def merged(old: NDArray[Any], new: NDArray[Any], none: float | None) -> NDArray[Any]:
            out: NDArray[Any] = np.full(shape, none, dtype=old.dtype)
            out[kept, : old.shape[1]] = old[kept]
            out[which, : new.shape[1]] = new
            return out

        counts = self.counts.copy()
        counts[which] = others.counts
        return ShardHits(
            merged(self.rows, others.rows, -1),
            merged(self.ids, others.ids, 0 if self.ids.dtype == np.int64 else None),
            merged(self.distances, others.distances, np.nan),
            counts,
        )


def first_k(query: Int64, distances: Float64, ranks: Int64, n: int, k: int) -> Int64:
    """Positions of the k best candidates of each of n queries, by distance and then by id; ordered by query.

    Each candidate has a query, a distance and the rank of its id.
    """
    order = np.lexsort((ranks, distances, query))
    grouped = query[order]
    starts = np.searchsorted(grouped, np.arange(n))
    return order[np.arange(len(order)) - starts[grouped] < k]


def distinct(query: Int64, distances: Float64, ranks: Int64) -> Int64:
    """Positions of the candidates at a finite distance; of those with the same query and id only the nearest."""
    order = np.lexsort((distances, ranks, query))
    order = order[np.isfinite(distances[order])]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(query[order]) != 0) | (np.diff(ranks[order]) != 0)
    return order[new]


def take_ids(ids: Ids, positions: Int64) -> Ids:
    """The ids at these positions."""
    return ids[positions] if isinstance(ids, np.ndarray) else ids.take(pa.array(positions))


def id_values(ids: Ids) -> IdArray:
    """Ids as numpy: int64, or str objects (of mixed ids: int and str)."""
    return ids if isinstance(ids, np.ndarray) else ids.to_numpy(zero_copy_only=False)


def is_numbers(ids: Ids) -> bool:
    """Whether all ids are numbers by their type."""
    return ids.dtype == np.int64 if isinstance(ids, np.ndarray) else pa.types.is_integer(ids.type)


def find_ids(asked: Sequence[int | str], ids: Ids, rows: Int64) -> Int64:
    """Row reference of each asked id, the first where there are several; -1 where no id of its type is equal."""
    kind = (int, str) if isinstance(ids, np.ndarray) else int if is_numbers(ids) else str
    possible = [value for value in asked if isinstance(value, kind)]
    if isinstance(ids, np.ndarray):
        hit = np.flatnonzero([value in possible for value in ids.tolist()])
    else:
        among = pc.SetLookupOptions(value_set=pa.array(possible, ids.type))
        hit = np.flatnonzero(pc.call_function("is_in", [ids], among).to_numpy(zero_copy_only=False))
    found = dict(zip(id_values(take_ids(ids, hit[::-1])).tolist(), rows[hit[::-1]].tolist(), strict=True))
    return np.array([found.get(value, -1) for value in asked], dtype=np.int64)


def most_repeats(ids: Ids) -> int:
    """Rows of the id that has most of them; 1 where there are none."""
    if isinstance(ids, np.ndarray):
        return int(np.unique(id_ranks(ids), return_counts=True)[1].max(initial=1))
    if pc.call_function("count_distinct", [ids]).as_py() == len(ids):
        return 1
    return int(pc.call_function("value_counts", [ids]).field("counts").to_numpy().max(initial=1))


def id_ranks(ids: Ids) -> Int64:
    """Numbers that sort as the ids do, int before str; equal ids get equal numbers."""
    if not isinstance(ids, np.ndarray):
        return id_values(ids) if pa.types.is_integer(ids.type) else _dense_ranks(ids)
    kinds = set(map(type, ids.tolist())) if ids.dtype == object else {int}
    if kinds <= {str}:
        return _dense_ranks(pa.array(ids, pa.string()))
    if str not in kinds:
        return ids.astype(np.int64, copy=False)
    whole = np.fromiter((not isinstance(value, str) for value in ids), dtype=bool, count=len(ids))
    ranks = np.empty(len(ids), dtype=np.int64)
    # Numbers are ranked, too: as they are, they could not be kept below the ranks of the texts.
    ranks[whole] = _dense_ranks(pa.array(ids[whole].astype(np.int64)))
    ranks[~whole] = _dense_ranks(pa.array(ids[~whole], pa.string())) + ranks[whole].max()
    return ranks


def _dense_ranks(ids: pa.Array) -> Int64:
    ranks = pc.call_function("rank", [ids], pc.RankOptions(sort_keys="ascending", tiebreaker="dense"))
    return ranks.to_numpy().astype(np.int64)
