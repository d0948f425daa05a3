"""Truth, recall and its confidence bound: what the gate measures with."""

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.index.ranking import Ids, ShardHits
from sf_pipelines.snapshot.manifest.models import JudgedRecord
from sf_pipelines.snapshot.metric import Float64
from sf_pipelines.snapshot.routing.protocol import Int32, VectorRouting
from sf_pipelines.snapshot.run.build import Run
from sf_pipelines.snapshot.source.hashing import hash_column

TRUTH_FIELDS = ("query", "row", "distance")

# One-sided confidence of every bound.
CONFIDENCE = 0.95
# The neighbours of no query.
NOBODY = ShardHits(
    rows=np.empty((0, 0), dtype=np.int64),
    ids=np.empty((0, 0), dtype=np.int64),
    distances=np.empty((0, 0)),
    counts=np.empty(0, dtype=np.int64),
)
# Distances of one pair may differ by the rounding of another order of additions: by so much of the distance, and of
# what lies between a query's nearest and furthest true neighbour. Both have the data's unit, so it does not matter.
ROUNDING, _SPREAD = 2.0**-46, 1e-9
# Sample queries that each shard should have, so that its own recall is known too.
_PER_SHARD = 30


def row_numbers(ids: Ids | pa.ChunkedArray) -> NDArray[np.int64]:
    """A number of each row: the hash of its id.

    An id may be a long text, and a truth names a row once for every query and shard.
    """
    if isinstance(ids, np.ndarray):
        return row_numbers(pa.array(ids, from_pandas=True))
    column = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    return hash_column(cast("pa.Array", column)).view(np.int64)


def truth_table(asked: NDArray[np.int64], nearest: ShardHits) -> pa.Table:
    """Neighbours of each query within one shard."""
    query = np.repeat(asked.astype(np.int32), nearest.ids.shape[1])
    columns = [pa.array(query), pa.array(nearest.ids.ravel()), pa.array(nearest.distances.ravel())]
    return pa.table(columns, names=list(TRUTH_FIELDS))


def id_array(table: pa.Table) -> NDArray[Any]:
    """The ``id`` column: int64, or str objects."""
    return table.column("id").to_numpy()


def halves(queries: int, *, disjoint: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the sample queries that tune and of those that judge; both are all rows of a small table."""
    everything = np.arange(queries)
    return (everything[0::2], everything[1::2]) if disjoint else (everything, everything)


def home_shards(run: Run, rows: pa.Table) -> Int32 | None:
    """Shard that each sampled row lies in; None where only its key tells (HASH)."""
    routing = run.routing
    return routing.assign(vectors_of(rows)) if isinstance(routing, VectorRouting) else run.build.own_shards(rows)


def stratified_queries(run: Run) -> pa.Table:
    """The sample queries, and after them more rows of those shards that have few of them.

    A uniform sample says little of small shards. The rows that are added judge single shards alone, never the whole.
    """
    queries = run.get_table(run.sampled.queries)
    if run.sampled.pool is None:
        return queries
    pool = run.get_table(run.sampled.pool)
    homes = home_shards(run, pa.concat_tables([queries, pool]))
    if homes is None:
        return queries
    lacking = np.maximum(0, _PER_SHARD - np.bincount(homes[: len(queries)], minlength=run.build.config.shards))
    more = homes[len(queries) :]
    order = np.argsort(more, kind="stable")
    place_in_shard = np.arange(len(order)) - np.searchsorted(more[order], more[order])
    chosen = np.sort(order[place_in_shard < lacking[more[order]]])
    return pa.concat_tables([queries, pool.take(pa.array(chosen))])


@dataclass(frozen=True)
class Truth:
    """Exact neighbours of the sample queries.

    Attributes:
        limits: distance up to which a row is as near as the furthest true neighbour of each query, shape (queries,);
            -inf where it has none.
        counts: true neighbours of each query (k, or fewer in small tables), shape (queries,).
    """

    limits: Float64
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, table: pa.Table, queries: int) -> "Truth":
        """From a merged truth table."""
        query, distances = table.column("query").to_numpy(), table.column("distance").to_numpy()
        furthest, nearest = np.full(queries, -np.inf), np.full(queries, np.inf)
        np.maximum.at(furthest, query, distances)
        np.minimum.at(nearest, query, distances)
        counts = np.bincount(query, minlength=queries)
        with np.errstate(invalid="ignore"):  # Of queries without neighbours.
            limits = furthest + ROUNDING * np.abs(furthest) + _SPREAD * (furthest - nearest)
        return cls(np.where(counts > 0, limits, -np.inf), counts)

    def select(self, rows: NDArray[np.int64]) -> "Truth":
        """Of some of the queries."""
        return Truth(self.limits[rows], self.counts[rows])


def merge_truth(parts: list[pa.Table], own: NDArray[np.int64], k: int) -> pa.Table:
    """The ``k`` nearest of all shards' exact neighbours.

    Args:
        parts: truth tables of the shards.
        own: number of each query's own row, which is left out, shape (queries,).
        k: most neighbours of a query.
    """
    import polars as pl

    numbered = pa.concat_tables([_numbered(part) for part in parts])
    merged = cast("pl.DataFrame", pl.from_arrow(numbered))
    best = (
        merged.filter(pl.col("row") != pl.Series(own[numbered.column("query").to_numpy()]))
        .sort("query", "distance", "row")
        .group_by("query", maintain_order=True)
        .head(k)
        .select(TRUTH_FIELDS)
    )
    return best.to_arrow().cast(numbered.schema)


def _numbered(table: pa.Table) -> pa.Table:
    """A truth table of a build that was begun when rows were named by their ids, as one of numbers."""
    if "id" not in table.column_names:
        return table
    rows = pa.array(row_numbers(table.column("id")))
    return pa.table([table.column("query"), rows, table.column("distance")], names=list(TRUTH_FIELDS))


def recall_per_query(
    ids: NDArray[Any],
    distances: Float64,
    query_ids: NDArray[Any],
    truth: Truth,
) -> Float64:
    """Share of each query's true neighbours that were found.

    A result counts when it is no further away than the furthest true neighbour, so that of equally near rows any
    will do (as in Aumüller, Bernhardsson and Faithfull, ANN-Benchmarks, 2018).

    Args:
        ids: answers, shape (n, any); places without a result have a distance that is NaN.
        distances: exact ones, same shape.
        query_ids: id of each query's own row, which does not count, shape (n,).
        truth: of the same queries.

    Returns:
        Shape (n,); 1.0 for a query without neighbours.
    """
    with np.errstate(invalid="ignore"):
        hits = ((distances <= truth.limits[:, None]) & (ids != query_ids[:, None])).sum(axis=1)
    return np.where(truth.counts > 0, np.minimum(hits, truth.counts) / np.maximum(truth.counts, 1), 1.0)


def recall_by_id(ids: NDArray[Any], query_rows: NDArray[np.int64], truth: pa.Table) -> Float64:
    """The same by id alone, for answers whose scores are not distances in the declared metric."""
    rows = _numbered(truth)
    query, row = rows.column("query").to_numpy(), rows.column("row").to_numpy()
    answers = row_numbers(ids.ravel()).reshape(ids.shape)
    shares = np.ones(len(query_rows))
    for place, number in enumerate(query_rows.tolist()):
        neighbours = row[query == number]
        if len(neighbours):
            shares[place] = np.isin(neighbours, answers[place]).mean()
    return shares


def quantile(degrees: int) -> float:
    """Student's t quantile of ``CONFIDENCE``."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, CONFIDENCE))


@dataclass(frozen=True)
class RecallEstimate:
    """Mean recall of a sample of queries and the one-sided lower confidence bound of the true mean (Student's t).

    Attributes:
        mean: of the sample.
        deviation: standard deviation of one query's recall.
        queries: size of the sample.
    """

    mean: float
    deviation: float
    queries: int

    @classmethod
    def of(cls, recalls: Float64, *, census: bool = False) -> "RecallEstimate":
        """From each query's recall; needs at least one."""
        deviation = 0.0 if census or len(recalls) < 2 else float(recalls.std(ddof=1))
        return cls(float(recalls.mean()), deviation, len(recalls))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(self.queries)

    @property
    def lower(self) -> float:
        """Lower confidence bound of the mean."""
        return self.mean - (quantile(self.queries - 1) * self.error if self.queries > 1 else 0.0)

    @property
    def upper(self) -> float:
        """Upper confidence bound of the mean."""
        return 2 * self.mean - self.lower

    def lower_of_another(self, queries: int) -> float:
        """What the ``lower`` bound of another sample of ``queries`` queries will reach, by the same confidence.

        Its mean differs from ours by both samples' errors, and its own bound lies one error below its mean.
        """
        if self.queries < 2 or queries < 2:
            return self.lower
        other = self.deviation / math.sqrt(queries)
        return self.mean - quantile(queries - 1) * other - quantile(self.queries - 1) * math.hypot(self.error, other)


def judged_record(recalls: Float64, num_probes: int, *, census: bool) -> JudgedRecord:
    """The recall of a snapshot from that of each judging query."""
    estimate = RecallEstimate.of(recalls, census=census)
    return JudgedRecord(
        num_probes=num_probes,
        queries=estimate.queries,
        recall=estimate.mean,
        lower=estimate.lower,
        percentile_5=float(np.quantile(recalls, 0.05, method="lower")),
    )
