"""The checks of the gate that look at single shards: a good mean may hide a bad shard, or rows that nobody reaches."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.gate.checks import Figures, Finding, Judged
from sf_pipelines.snapshot.gate.recall import (
    ROUNDING,
    RecallEstimate,
    Truth,
    halves,
    home_shards,
    id_array,
    recall_per_query,
)
from sf_pipelines.snapshot.metric import Float32, pair_distances
from sf_pipelines.snapshot.sharding import ClusterSharding, LshSharding

# A shard's bound may lie so far below min_recall before it is worth a warning.
_SPREAD = 0.1
# With fewer queries nothing is said of a shard.
_FEWEST_QUERIES = 5
# Rows of each shard, and of all, that are searched by their own vector.
_PER_SHARD, _IN_ALL = 200, 4000
_QUERIES_AT_A_TIME = 1000
_SHOWN = 5


def recall_spread(judged: Judged) -> Finding:
    """Recall of the queries that lie in each shard, at the manifest's number of probes."""
    gate, sampled = judged.build.config.recall_gate, judged.sampled
    queries = judged.run.queries
    # The half that tuned the number of probes judges nothing; rows beyond the sample were added for this very check.
    _, judging = halves(sampled.query_rows, disjoint=sampled.disjoint)
    rows = np.concatenate([judging, np.arange(sampled.query_rows, queries.num_rows)])
    asked = queries.take(pa.array(rows))
    truth = Truth.of(judged.run.get_table(judged.receipt.truth), queries.num_rows).select(rows)
    answers = judged.reader.search_arrays(vectors_of(asked), gate.k + 1, shard_of=judged.build.own_shards(asked))
    recalls = recall_per_query(answers.ids, answers.distances, id_array(asked), truth)
    homes = home_shards(judged.run, asked)
    table: list[dict[str, Any]] = []
    for db_id in [] if homes is None else np.unique(homes).tolist():
        estimate = RecallEstimate.of(recalls[homes == db_id], census=not sampled.disjoint)
        found = {"db_id": db_id, "queries": estimate.queries, "recall": estimate.mean, "lower_bound": estimate.lower}
        table.append(found)
    limit = gate.min_recall - _SPREAD
    known = sorted((row for row in table if row["queries"] >= _FEWEST_QUERIES), key=lambda row: row["lower_bound"])
    weak = [row for row in known if row["lower_bound"] < limit]
    worst = known[0]["lower_bound"] if known else float(recalls.mean())
    percentile = float(np.quantile(recalls, 0.05, method="lower"))
    figures: Figures = {"weak_shards": len(weak), "worst_lower_bound": worst, "percentile_5": percentile}
    if not weak:
        message = f"every shard's own recall@{gate.k} is at least {worst:.4f}; 95 % of queries reach {percentile:.2f}"
        return Finding(True, message, figures, tuple(table))
    shown = ", ".join(
        f"shard {row['db_id']} {row['recall']:.4f} (at least {row['lower_bound']:.4f}, {row['queries']} queries)"
        for row in weak[:_SHOWN]
    )
    message = (
        f"{len(weak)} of {len(table)} shards have a recall@{gate.k} of their own more than {_SPREAD} below min_recall "
        f"{gate.min_recall}: {shown}; a larger num_probes helps queries that lie there"
    )
    return Finding(False, message, figures, tuple(table))


def rows_reachable(judged: Judged) -> Finding:
    """Sampled rows of every shard, each searched by its own vector through the index.

    A row that is not in the answer counts as found where the answer is full of rows that are as near as itself.
    """
    build, gate = judged.build, judged.build.config.recall_gate
    rows = _sampled_rows(judged)
    homes = home_shards(judged.run, rows)
    chosen = _of_every_shard(homes, rows.num_rows, build.config.shards)
    rows, homes = rows.take(pa.array(chosen)), None if homes is None else homes[chosen]
    found = np.concatenate(
        [_is_found(judged, rows.slice(at, _QUERIES_AT_A_TIME)) for at in range(0, len(chosen), _QUERIES_AT_A_TIME)]
    )
    shards = np.zeros(len(chosen), dtype=np.int32) if homes is None else homes
    asked, lost = np.bincount(shards), np.bincount(shards[~found], minlength=1)
    table = tuple(
        {"db_id": None if homes is None else db_id, "rows": int(asked[db_id]), "not_found": int(lost[db_id])}
        for db_id in np.flatnonzero(np.pad(lost, (0, len(asked) - len(lost)))).tolist()
    )
    missing = id_array(rows)[~found]
    figures: Figures = {"rows_searched": len(chosen), "not_found": len(missing), "k": gate.k}
    if not len(missing):
        return Finding(True, f"{len(chosen)} sampled rows are found by their own vector", figures)
    where = "" if homes is None else f" in shards {', '.join(str(row['db_id']) for row in table[:_SHOWN])}"
    message = (
        f"{len(missing)} of {len(chosen)} sampled rows are not found by their own vector{where}: "
        f"{', '.join(repr(row) for row in missing[:_SHOWN].tolist())}. A graph index (hnsw) loses rows where many "
        "vectors are equal: use index_type ivf_sq, ivf_flat or flat"
    )
    return Finding(False, message, figures, table)


def _sampled_rows(judged: Judged) -> pa.Table:
    """All rows of which the build has kept the vector; where a row names its shard itself, those that do."""
    sampled, ledger = judged.sampled, judged.run
    kept = [sampled.queries, sampled.pool, *([sampled.training] if sampled.disjoint else [])]
    tables = [ledger.get_table(ref) for ref in kept if ref is not None and ref.rows]
    return pa.concat_tables([table for table in tables if table.schema == tables[0].schema])


def _of_every_shard(homes: NDArray[np.int32] | None, rows: int, shards: int) -> NDArray[np.int64]:
    """Positions of the first few rows of each shard."""
    if homes is None:
        return np.arange(min(rows, _IN_ALL))
    order = np.argsort(homes, kind="stable")
    place_in_shard = np.arange(rows) - np.searchsorted(homes[order], homes[order])
    return np.sort(order[place_in_shard < max(1, min(_PER_SHARD, _IN_ALL // shards))])


def _is_found(judged: Judged, rows: pa.Table) -> NDArray[np.bool_]:
    vectors: Float32 = vectors_of(rows)
    metric, k = judged.build.config.vector_spec.metric, judged.build.config.recall_gate.k
    one = 1 if isinstance(judged.build.config.sharding, ClusterSharding | LshSharding) else None
    answers = judged.reader.search_arrays(vectors, k, num_probes=one, shard_of=judged.build.own_shards(rows))
    own = pair_distances(vectors, vectors, metric)
    itself = (answers.ids == id_array(rows)[:, None]).any(axis=1)
    with np.errstate(invalid="ignore"):  # Places without a hit.
        as_near = (answers.distances <= (own + ROUNDING * np.abs(own))[:, None]).all(axis=1)
    return itself | as_near
