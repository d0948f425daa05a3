"""Which shards are asked for which queries. Pure functions over a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sf_pipelines.snapshot.errors import QueryError
from sf_pipelines.snapshot.metric import DistanceMetric, Float32
from sf_pipelines.snapshot.routing.protocol import Int32

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """Shards of a batch of queries.

    Attributes:
        shards: shards of each query in the order in which they are asked, shape (n, probes).
    """

    shards: Int32

    def by_shard(self) -> Iterator[tuple[int, Int64, Int64]]:
        """Each shard once, with the queries that ask it and the place that it has in their order."""
        n, probes = self.shards.shape
        flat = self.shards.ravel()
        order = np.argsort(flat, kind="stable")
        ids, starts = np.unique(flat[order], return_index=True)
        for shard, part in zip(ids.tolist(), np.split(order, starts[1:]) if n and probes else [], strict=True):
            yield shard, part // probes, part % probes


def as_queries(queries: ArrayLike, dim: int, metric: DistanceMetric) -> Float32:
    """Queries as float32, shape (n, dim).

    Raises:
        QueryError: they are no numbers, of another dimension, not finite, or without direction under cosine.
    """
    try:
        given: NDArray[Any] = np.asarray(queries)
    except ValueError as error:
        raise QueryError(f"the queries are no table of numbers with {dim} columns: {error}") from error
    if given.size == 0 and given.ndim == 1:
        given = given.reshape(0, dim).astype(np.float32)
    if given.dtype.kind not in "fiu":
        raise QueryError(f"a query must be numbers, not {given.dtype}")
    if given.shape[1:] != (dim,):
        got = "x".join(map(str, given.shape[1:])) or "a single number"
        raise QueryError(f"a query must have {dim} numbers (got {got})")
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(given, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise QueryError(f"query {bad[0]} holds NaN, infinity or a number beyond float32")
    if metric.normalises:
        zero = np.flatnonzero(~rows.any(axis=1))
        if len(zero):
            raise QueryError(f"query {zero[0]} is zero: it has no direction, which {metric} needs")
    return rows


def positive(value: int, name: str) -> int:
    """A whole number of at least 1.

    Raises:
        QueryError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise QueryError(f"{name} must be a whole number of at least 1 (got {value!r})")
    return int(value)


def probes_of(num_probes: int | None, default: int, num_dbs: int) -> int:
    """Shards to ask; more than there are means all.

    Raises:
        QueryError: it is no whole number of at least 1.
    """
    return min(num_dbs, default if num_probes is None else positive(num_probes, "num_probes"))


def named_shards(shard_ids: Sequence[int], num_dbs: int, queries: int) -> Plan:
    """The same shards for every query.

    Raises:
        QueryError: one is unknown or named twice, or none is named.
    """
    shards = list(shard_ids)
    for shard in shards:
        if isinstance(shard, bool) or not isinstance(shard, int | np.integer) or not 0 <= shard < num_dbs:
            raise QueryError(f"shard_ids names {shard!r}; shards are 0 to {num_dbs - 1}")
    if len(set(shards)) != len(shards):
        raise QueryError(f"shard_ids names a shard twice: {shards}")
    if not shards:
        raise QueryError("shard_ids is empty; leave it out to let the snapshot route the query")
    return Plan(np.tile(np.array(shards, dtype=np.int32), (queries, 1)))
