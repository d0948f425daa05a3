"""Which shards are asked for which queries. Pure functions over a batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sf_pipelines.snapshot.errors import QueryError
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, as_float16
from sf_pipelines.snapshot.reader.state import SnapshotState
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.explicit import ExplicitRouting
from sf_pipelines.snapshot.routing.protocol import Int32, VectorRouting

_MOST_HITS = 1_000_000

Int64 = NDArray[np.int64]
Context = Mapping[str, Any]
Queries = ArrayLike | list[ArrayLike]


# Shards of each query in the order in which they are asked, shape (n, probes); -1 where a query asks fewer.
Plan = Int32


def by_shard(plan: Plan) -> Iterator[tuple[int, Int64, Int64]]:
    """Each shard once, with the queries that ask it and the place that it has in their order."""
    n, probes = plan.shape
    flat = plan.ravel()
    order = np.argsort(flat, kind="stable")
    ids, starts = np.unique(flat[order], return_index=True)
    for shard, part in zip(ids.tolist(), np.split(order, starts[1:]) if n and probes else [], strict=True):
        if shard >= 0:
            yield shard, part // probes, part % probes


def asked_shards(plan: Plan) -> list[list[int]]:
    """Shards of each query, without the places that stay empty."""
    return [[shard for shard in row if shard >= 0] for row in plan.tolist()]


@dataclass(frozen=True)
class ShardChoice:
    """What a caller says of the shards to ask; nothing leaves it to the snapshot.

    Attributes:
        num_probes: so many, nearest first.
        shard_ids: exactly these, by every query.
        routing_context: those that hold these values: one context for all queries, or one for each.
        shard_of: for each query the one shard that it is about, shape (n,): measures snapshots whose queries cannot be
            routed by their vector.
    """

    num_probes: int | None = None
    shard_ids: Sequence[int] | None = None
    routing_context: Context | Sequence[Context] | None = None
    shard_of: Int32 | None = None

    def of(self, part: slice, queries: int) -> "ShardChoice":
        """The same for a part of so many queries; a wrong number of contexts is left for the plan to refuse."""
        contexts = self.routing_context
        if isinstance(contexts, Sequence) and not isinstance(contexts, str | bytes) and len(contexts) == queries:
            contexts = contexts[part]
        shard_of = None if self.shard_of is None else self.shard_of[part]
        return ShardChoice(self.num_probes, self.shard_ids, contexts, shard_of)


def plan_for(state: SnapshotState, queries: Float32, choice: ShardChoice) -> Plan:
    """Shards to ask: those that are named, else those of the context, else by vector, else all (with keys)."""
    routing, num_dbs = state.routing, state.manifest.num_dbs
    if choice.num_probes is not None and not isinstance(routing, VectorRouting):
        raise QueryError(
            f"num_probes is for snapshots sharded by vector; this one is sharded by {routing.strategy!r}, leave it out"
        )
    if choice.routing_context is not None and not isinstance(routing, CelRouting):
        raise QueryError(
            "routing_context is for snapshots sharded by an expression ('cel'); this one is sharded by "
            f"{routing.strategy!r}, leave it out"
        )
    if choice.shard_of is not None:
        return _one_each(state, choice.shard_of, len(queries))
    if choice.shard_ids is not None:
        if choice.num_probes is not None:
            raise QueryError("num_probes and shard_ids exclude each other: shard_ids already says which are asked")
        return named_shards(choice.shard_ids, num_dbs, len(queries))
    if isinstance(routing, VectorRouting):
        probes = probes_of(choice.num_probes, state.default_probes, num_dbs)
        return routing.probe(routable(state, queries))[0][:, :probes]
    if choice.routing_context is not None and isinstance(routing, CelRouting):
        return _located(routing, choice.routing_context, len(queries))
    return _everywhere(state, len(queries))


def stock_plan(state: SnapshotState, queries: Float32, num_probes: int, shard_of: Int32 | None) -> Plan:
    """The shards that a stock reader asks, in its order; see ``plan_for``."""
    if shard_of is not None or not isinstance(state.routing, VectorRouting):
        return plan_for(state, queries, ShardChoice(shard_of=shard_of))
    probes = probes_of(num_probes, num_probes, state.manifest.num_dbs)
    return state.routing.stock_probe(queries, probes)


def order_for(state: SnapshotState, queries: Float32, shard_of: Int32 | None) -> Int32:
    """All shards that queries may ask, in the order of their turn; shape (n, shards)."""
    probes = state.manifest.num_dbs if isinstance(state.routing, VectorRouting) else None
    return plan_for(state, queries, ShardChoice(num_probes=probes, shard_of=shard_of))


def routable(state: SnapshotState, queries: Float32) -> Float32:
    """Queries as they are compared with what routes: rounded as the stored vectors are.

    A stored vector so always finds the shard that it was put in. What float16 cannot stand for was never stored and
    is routed as it is.
    """
    if state.vector_type != "float16":
        return queries
    rounded, kept = as_float16(queries, state.metric)
    return np.where(kept[:, None], rounded, queries)


def as_queries(queries: Queries, dim: int, metric: DistanceMetric) -> Float32:
    """Queries as float32, shape (n, dim)."""
    try:
        given: NDArray[Any] = np.asarray(queries)
    except ValueError as error:
        raise QueryError(f"the queries are no table of numbers with {dim} columns: {error}") from error
    if given.size == 0 and given.ndim == 1:
        given = given.reshape(0, dim).astype(np.float32)
    if given.dtype.kind not in "fiu":
        raise QueryError(f"a query must be numbers, not {given.dtype}")
    if given.ndim == 1 and given.shape[0] == dim:
        raise QueryError(f"the queries must be rows of {dim} numbers, not one row; search takes a single query")
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
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise QueryError(f"{name} must be a whole number of at least 1 (got {value!r})")
    return int(value)


def hits_of(state: SnapshotState, top_k: int) -> int:
    """Results to look for: as many as were asked for, and no more than there can be."""
    # Others count keys, and need not give each a vector, or may give it several.
    counted = state.kind == "vector" or state.is_ours
    return min(positive(top_k, "top_k"), max(1, state.manifest.row_count if counted else _MOST_HITS))


def columns_of(top_k: int) -> int:
    """Width of a table of answers, which is filled up where a query has fewer."""
    k = positive(top_k, "top_k")
    if k > _MOST_HITS:
        raise QueryError(f"top_k must be at most {_MOST_HITS} (got {k})")
    return k


def probes_of(num_probes: int | None, default: int, num_dbs: int) -> int:
    """Shards to ask; more than there are means all."""
    return min(num_dbs, default if num_probes is None else positive(num_probes, "num_probes"))


def named_shards(shard_ids: Sequence[int], num_dbs: int, queries: int) -> Plan:
    """The same shards for every query."""
    if isinstance(shard_ids, str | bytes) or not isinstance(shard_ids, Iterable):
        raise QueryError(f"shard_ids must be several numbers of shards, such as [3], not {shard_ids!r}")
    shards = list(shard_ids)
    for shard in shards:
        if isinstance(shard, bool) or not isinstance(shard, int | np.integer) or not 0 <= shard < num_dbs:
            raise QueryError(f"shard_ids names {shard!r}; shards are 0 to {num_dbs - 1}")
    if len(set(shards)) != len(shards):
        raise QueryError(f"shard_ids names a shard twice: {shards}")
    if not shards:
        raise QueryError("shard_ids is empty; leave it out to let the snapshot route the query")
    return _same(np.array(shards, dtype=np.int32), queries)


def _same(shards: Int32, queries: int) -> Plan:
    """One order for all queries, held once."""
    return np.broadcast_to(shards, (queries, len(shards)))


def _one_each(state: SnapshotState, shard_of: Int32, queries: int) -> Plan:
    if not isinstance(state.routing, CelRouting | ExplicitRouting):
        raise QueryError(f"shard_of is for snapshots sharded by cel or explicit, not by {state.routing.strategy!r}")
    num_dbs = state.manifest.num_dbs
    if shard_of.shape != (queries,) or shard_of.dtype.kind != "i" or ((shard_of < 0) | (shard_of >= num_dbs)).any():
        raise QueryError(f"shard_of must name one shard from 0 to {num_dbs - 1} for each of {queries} queries")
    return shard_of.astype(np.int32)[:, None]


def _located(routing: CelRouting, given: Context | Sequence[Context], queries: int) -> Plan:
    if isinstance(given, Mapping):
        return np.full((queries, 1), routing.locate(given), dtype=np.int32)
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise QueryError(f"routing_context must be a mapping, or one for each query, not {type(given).__name__}")
    if len(given) != queries:
        raise QueryError(f"routing_context has {len(given)} contexts for {queries} queries; give one for each, or one")
    for at, context in enumerate(given):
        if not isinstance(context, Mapping):
            raise QueryError(f"routing_context {at} must be a mapping, not {type(context).__name__}")
    shard_of = np.fromiter((routing.locate(context) for context in given), dtype=np.int32, count=queries)
    return shard_of[:, None]


def _everywhere(state: SnapshotState, queries: int) -> Plan:
    if state.kind == "unified":
        return _same(np.arange(state.manifest.num_dbs, dtype=np.int32), queries)
    if isinstance(state.routing, CelRouting):
        names = ", ".join(state.routing.columns)
        raise QueryError(
            f"this snapshot is sharded by an expression over {names}: give routing_context with a value for each, or "
            "shard_ids"
        )
    raise QueryError("the rows of this snapshot named their shards themselves ('explicit'): give shard_ids")
