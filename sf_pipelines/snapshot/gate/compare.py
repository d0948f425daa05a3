"""The difference of two snapshots: rows by id, answers, routing. The drift check and ``diff`` are faces of it.

Rows may have moved to other shards, so shards cannot be compared one by one: the ids of each side are spread over
buckets on disk by their hash, and equal ones meet in one bucket. Memory does not grow with the snapshots.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc as pa_ipc

from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import DigestMismatchError, ObjectMissingError
from sf_pipelines.snapshot.gate.recall import id_array
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, Float64, pair_distances
from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.reader.reader import open_reader
from sf_pipelines.snapshot.reader.shards import open_index
from sf_pipelines.snapshot.reader.state import SnapshotState
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.explicit import ExplicitRouting
from sf_pipelines.snapshot.routing.protocol import Int32, VectorRouting
from sf_pipelines.snapshot.run.build import scratch
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import SampleReceipt
from sf_pipelines.snapshot.source.contract import SHARD_COLUMN
from sf_pipelines.snapshot.source.hashing import UInt64, hash_column, hash_vectors
from sf_pipelines.snapshot.source.samples import Buckets
from sf_pipelines.snapshot.store import Store

_DEFAULT_K = 10
_OPEN_SHARDS = 8
# Matching takes time by the cube of the number of centroids: about 10 s for so many.
_MOST_MATCHED = 4096


# Rows by id.


@dataclass(frozen=True)
class IdChanges:
    """How the rows changed, by id.

    Attributes:
        added: ids that only the later snapshot has.
        gone: ids that only the earlier one has.
        kept: ids that both have.
        changed: those of them with another vector; None where vectors have other numbers or are stored as another type.
        as_text: whether one side has numbers and the other text, so that numbers were compared by their digits.
    """

    added: int
    gone: int
    kept: int
    changed: int | None
    as_text: bool


def rows_to_read(before: SnapshotState, after: SnapshotState) -> int:
    """Rows of both sides that a comparison reads: not those of shards that are the same, byte for byte."""
    same = _same_shards(before, after)
    return sum(entry.rows for state in (before, after) for entry in state.shards if entry.db_id not in same)


def compare_ids(
    store: Store, before: SnapshotState, after: SnapshotState, cache: ShardCache, shard_done: Callable[[], None]
) -> IdChanges:
    """Compares the rows of two snapshots by id; calls ``shard_done`` after each shard."""
    rows, same = rows_to_read(before, after), _same_shards(before, after)
    same_vectors = (before.dim, before.vector_type) == (after.dim, after.vector_type)
    with scratch() as name:
        whole = [all(_are_numbers(store, state, cache)) for state in (before, after)]
        kind = pa.int64() if all(whole) else pa.large_string()
        schema = pa.schema([("id", kind), ("vector", pa.uint64())])
        sides = [Buckets(Path(name), side, rows, schema) for side in ("before", "after")]
        for state, side in zip((before, after), sides, strict=True):
            for ids, vectors in _rows_of(store, state, cache, besides=same):
                column = ids.cast(kind)
                side.add(pa.record_batch([column, pa.array(vectors)], schema=schema), hash_column(column))
                shard_done()
        for _ in range(2 * len(same)):
            shard_done()
        kept = sum(entry.rows for entry in after.shards if entry.db_id in same)
        met = [_meet(old, new) for (old, _), (new, _) in zip(sides[0].close(), sides[1].close(), strict=True)]
    added, gone, both, changed = (sum(counts) for counts in zip(*met, strict=True))
    return IdChanges(added, gone, kept + both, changed if same_vectors else None, as_text=whole[0] != whole[1])


def _same_shards(before: SnapshotState, after: SnapshotState) -> frozenset[int]:
    """Shards that are one and the same, byte for byte, on both sides: a build copies what has not changed."""
    sealed = {entry.db_id: entry.objects for entry in before.shards if entry.objects}
    return frozenset(
        entry.db_id for entry in after.shards if entry.objects and sealed.get(entry.db_id) == entry.objects
    )


def _are_numbers(store: Store, state: SnapshotState, cache: ShardCache) -> Iterator[bool]:
    """Whether the ids of each shard are whole numbers; for our own snapshots the manifest says it."""
    if state.manifest.extras is not None:
        yield state.manifest.extras.id_type == "int64"
        return
    for ids, _ in _rows_of(store, state, cache):
        yield pa.types.is_integer(ids.type)


def _rows_of(
    store: Store, state: SnapshotState, cache: ShardCache, besides: frozenset[int] = frozenset()
) -> Iterator[tuple[pa.Array, UInt64]]:
    """Ids, and hashes of the vectors, of each shard that is not empty, and not one of ``besides``."""
    for entry in state.shards:
        if entry.key is None or entry.db_id in besides:
            continue
        with cache.checkout(store, entry.key, entry.objects) as folder, closing(open_index(state, folder)) as index:
            found, vectors = index.sample(index.rows)
            if np.issubdtype(found.dtype, np.integer):
                ids = pa.array(found)
            else:
                # Stock writers may leave numbers and text in one shard.
                ids = pa.array([str(value) for value in found.tolist()], pa.large_string())
            yield ids, hash_vectors(vectors)


def _meet(old: Path, new: Path) -> tuple[int, int, int, int]:
    """Rows of one bucket that were added, are gone, were kept, and of the kept ones those that changed."""
    import polars as pl

    # Stock snapshots may repeat some ids.
    before, after = (
        cast("pl.DataFrame", pl.from_arrow(_read(path))).unique("id", keep="first", maintain_order=True)
        for path in (old, new)
    )
    both = before.join(after, on="id", suffix="_after")
    changed = both.select((pl.col("vector") != pl.col("vector_after")).sum()).item()
    return after.height - both.height, before.height - both.height, both.height, int(changed)


def _read(path: Path) -> pa.Table:
    """A bucket, which is gone then."""
    with pa_ipc.open_stream(str(path)) as reader:
        table = reader.read_all()
    path.unlink()
    return table


# Answers.


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

    ``cache`` is a folder for copies of shards, None the readers' default; ``notes`` takes why nothing was measured.
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
    asked = [_query_shards(state, newer, queries) for state in (old, new)]
    if isinstance(reason := asked[0] if isinstance(asked[0], str) else asked[1], str):
        notes.append(f"answers: {reason}")
        return None
    recall = newer.manifest.extras.recall if newer.manifest.extras else None
    k = recall.k if recall else _DEFAULT_K
    found = [
        _ask(store, s3, state, queries, k, shards if isinstance(shards, np.ndarray) else None, cache)
        for state, shards in zip((old, new), asked, strict=True)
    ]
    shares = _shares(found[0], found[1], id_array(queries), k)
    return AnswerOverlap(
        k=k,
        queries=len(shares),
        mean=float(shares.mean()),
        lowest_tenth=float(np.quantile(shares, 0.1)),
        same=float((shares == 1.0).mean()),
    )


def _query_shards(state: SnapshotState, newer: SnapshotState, queries: pa.Table) -> Int32 | str | None:
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
    shards: Int32 | None,
    cache: Path | None,
) -> Any:
    """Ids of the answers, shape (n, k + 1); None where a query has fewer."""
    options: dict[str, Any] = {"cache_dir": cache, "max_cached_shards": _OPEN_SHARDS}
    with open_reader(store.url, s3=s3, manifest_key=state.manifest_key, **options) as reader:
        found = reader.search_arrays(vectors_of(queries), k + 1, shard_of=shards)
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


# Routing.


@dataclass(frozen=True)
class RoutingShift:
    """How far what routes has moved.

    Attributes:
        artifact: ``centroids``, matched one to one so that the sum of distances is smallest (the assignment problem;
            Kuhn, The Hungarian method, 1955), or ``hyperplanes``, bit by bit.
        measure: ``cosine`` (1 - cos) or ``euclidean``.
        mean: of the matched distances.
        largest: of them.
        pairs: earlier number, later number, distance; by the later number.
        unmatched: how many the larger side has left over.
    """

    artifact: str
    measure: str
    mean: float
    largest: float
    pairs: tuple[tuple[int, int, float], ...]
    unmatched: int


def routing_shift(old: SnapshotState, new: SnapshotState, notes: list[str]) -> RoutingShift | None:
    """How far centroids or hyperplanes have moved; None where nothing is trained, or (a note says why) matched."""
    if not (isinstance(old.routing, VectorRouting) and isinstance(new.routing, VectorRouting)):
        return None
    one, other = old.routing.matrix, new.routing.matrix
    kinds = (old.routing.strategy, new.routing.strategy)
    if kinds[0] != kinds[1] or one.shape[1] != other.shape[1]:
        notes.append("routing: the strategies or the dimensions differ, so nothing can be matched")
        return None
    if kinds[0] == "lsh":
        bits = min(len(one), len(other))
        distances = pair_distances(one[:bits], other[:bits], DistanceMetric.COSINE)
        return _shift("hyperplanes", "cosine", np.arange(bits), np.arange(bits), distances, abs(len(one) - len(other)))
    if max(len(one), len(other)) > _MOST_MATCHED:
        notes.append(f"routing: more than {_MOST_MATCHED} centroids are not matched")
        return None
    from scipy.optimize import linear_sum_assignment

    cosine = new.metric is DistanceMetric.COSINE
    table = _distances(one, other, cosine=cosine)
    rows, columns = linear_sum_assignment(table)
    measure = "cosine" if cosine else "euclidean"
    return _shift("centroids", measure, rows, columns, table[rows, columns], abs(len(one) - len(other)))


def _shift(artifact: str, measure: str, old: Any, new: Any, distances: Float64, unmatched: int) -> RoutingShift:
    order = np.argsort(new, kind="stable")
    return RoutingShift(
        artifact=artifact,
        measure=measure,
        mean=float(distances.mean()),
        largest=float(distances.max()),
        pairs=tuple(zip(old[order].tolist(), new[order].tolist(), distances[order].tolist(), strict=True)),
        unmatched=unmatched,
    )


def _distances(one: Float32, other: Float32, *, cosine: bool) -> Float64:
    """Distance of every centroid of one side to every one of the other, shape (n, m)."""
    out = np.empty((len(one), len(other)))
    for row, centroid in enumerate(one):
        repeated = np.broadcast_to(centroid, other.shape)
        out[row] = pair_distances(repeated, other, DistanceMetric.COSINE if cosine else DistanceMetric.L2)
    return out if cosine else np.sqrt(out)
