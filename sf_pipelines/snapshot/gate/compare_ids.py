"""Which rows came, went, changed and stayed between two snapshots, exactly, in memory that does not grow with them.

Rows may have moved to other shards, so shards cannot be compared one by one: the ids of each side are spread over
buckets on disk by their hash, and equal ones meet in one bucket.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc as pa_ipc

from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.reader.handles import open_index
from sf_pipelines.snapshot.reader.state import SnapshotState
from sf_pipelines.snapshot.run.build import scratch
from sf_pipelines.snapshot.source.duplicates import Buckets
from sf_pipelines.snapshot.source.hashing import UInt64, hash_column, hash_vectors
from sf_pipelines.snapshot.store import Store


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
    """Compares the rows of two snapshots by id.

    Args:
        store: where both are.
        before: the earlier one.
        after: the later one.
        cache: verified copies of their shards.
        shard_done: called after each shard.

    Raises:
        StoreError: a shard cannot be fetched.
        IntegrityError: a shard is damaged.
    """
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
