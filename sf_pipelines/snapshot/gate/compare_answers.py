"""How far two snapshots give the same answers to the same queries."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import DigestMismatchError, ObjectMissingError
from sf_pipelines.snapshot.gate.recall import id_array
from sf_pipelines.snapshot.metric import Float64
from sf_pipelines.snapshot.reader.opening import open_reader
from sf_pipelines.snapshot.reader.state import SnapshotState
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.explicit import ExplicitRouting
from sf_pipelines.snapshot.routing.protocol import Int32
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import SampleReceipt
from sf_pipelines.snapshot.source.contract import SHARD_COLUMN
from sf_pipelines.snapshot.store import Store

_DEFAULT_K = 10
_OPEN_SHARDS = 8


@dataclass(frozen=True)
class AnswerOverlap:
    """How far both answers to a query are the same rows.

    Attributes:
        k: neighbours asked for; a query's own row is left out.
        queries: rows of the newer snapshot that were asked for.
        mean: mean share of an answer's rows that the other has too.
        lowest_tenth: the share below which a tenth of the queries lie.
        same: share of the queries with the same rows in both answers.
    """

    k: int
    queries: int
    mean: float
    lowest_tenth: float
    same: float


def compare_answers(
    store: Store, s3: S3Options | None, old: SnapshotState, new: SnapshotState, cache: Path | None, notes: list[str]
) -> AnswerOverlap | None:
    """Asks both snapshots, each with its own number of probes, for the query sample of the newer one.

    Args:
        store: where they are.
        s3: credentials.
        old: one snapshot.
        new: the other.
        cache: folder for copies of their shards; None is the readers' default.
        notes: where it is said why nothing was measured.
    """
    if old.dim != new.dim:
        notes.append(f"answers: vectors have {old.dim} and {new.dim} numbers")
        return None
    newer = max(old, new, key=lambda state: state.manifest.created_at)
    try:
        receipt = Ledger(store, newer.manifest.run_id).find(SampleReceipt)
        queries = None if receipt is None else Ledger(store, newer.manifest.run_id).get_table(receipt.queries)
    except (ObjectMissingError, DigestMismatchError) as error:
        notes.append(f"answers: the query sample cannot be used: {error}")
        return None
    if queries is None or not queries.num_rows:
        notes.append(f"answers: run {newer.manifest.run_id!r} has left no query sample")
        return None
    homes = [_homes(state, newer, queries) for state in (old, new)]
    if isinstance(reason := homes[0] if isinstance(homes[0], str) else homes[1], str):
        notes.append(f"answers: {reason}")
        return None
    recall = newer.manifest.extras.recall if newer.manifest.extras else None
    k = recall.k if recall else _DEFAULT_K
    found = [
        _ask(store, s3, state, queries, k, home if isinstance(home, np.ndarray) else None, cache)
        for state, home in zip((old, new), homes, strict=True)
    ]
    shares = _shares(found[0], found[1], id_array(queries), k)
    return AnswerOverlap(
        k=k,
        queries=len(shares),
        mean=float(shares.mean()),
        lowest_tenth=float(np.quantile(shares, 0.1)),
        same=float((shares == 1.0).mean()),
    )


def _homes(state: SnapshotState, newer: SnapshotState, queries: pa.Table) -> Int32 | str | None:
    """Shards that hold the queries' rows, where a query must say so; or why that is not known."""
    if not isinstance(state.routing, ExplicitRouting | CelRouting):
        return None
    if state.kind == "unified":
        return None
    if state.routing.describe() != newer.routing.describe() or state.manifest.num_dbs != newer.manifest.num_dbs:
        return "a query must name its shard, and the two snapshots are sharded differently"
    if SHARD_COLUMN not in queries.column_names:
        return "the query sample does not say in which shard its rows are"
    return queries.column(SHARD_COLUMN).to_numpy()


def _ask(
    store: Store,
    s3: S3Options | None,
    state: SnapshotState,
    queries: pa.Table,
    k: int,
    homes: Int32 | None,
    cache: Path | None,
) -> Any:
    """Ids of the answers, shape (n, k + 1); None where a query has fewer."""
    options: dict[str, Any] = {"cache_dir": cache, "max_cached_shards": _OPEN_SHARDS}
    with open_reader(store.url, s3=s3, manifest_key=state.manifest_key, **options) as reader:
        found = reader.search_arrays(vectors_of(queries), k + 1, homes=homes)
    ids = found.ids.astype(object)
    ids[np.isnan(found.scores)] = None
    return ids


def _shares(one: Any, other: Any, own: Any, k: int) -> Float64:
    """For each query the share of rows that both answers have; ids compared as text."""
    shares = np.empty(len(own))
    for at, row_id in enumerate(own.tolist()):
        sets = [
            {str(value) for value in [v for v in answer[at].tolist() if v is not None and str(v) != str(row_id)][:k]}
            for answer in (one, other)
        ]
        longest = max(len(found) for found in sets)
        shares[at] = len(sets[0] & sets[1]) / longest if longest else 1.0
    return shares
