"""Which ids came, went and stayed between two snapshots, exactly, in memory that does not grow with them.

Rows may have moved to other shards, so shards cannot be compared one by one: the ids of each side are spread over
buckets on disk by their hash, and equal ones meet in one bucket.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as pa_ipc

from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.reader.handles import open_index
from sf_pipelines.snapshot.reader.state import SnapshotState
from sf_pipelines.snapshot.source.duplicates import Buckets
from sf_pipelines.snapshot.source.hashing import hash_column
from sf_pipelines.snapshot.store import Store


@dataclass(frozen=True)
class IdChanges:
    """How the rows changed, by id.

    Attributes:
        added: ids that only the later snapshot has.
        gone: ids that only the earlier one has.
        kept: ids that both have.
        as_text: whether one side has numbers and the other text, so that numbers were compared by their digits.
    """

    added: int
    gone: int
    kept: int
    as_text: bool


def compare_ids(
    store: Store, before: SnapshotState, after: SnapshotState, cache: ShardCache, shard_done: Callable[[], None]
) -> IdChanges:
    """Compares the ids of two snapshots.

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
    rows, same = max(before.manifest.row_count, after.manifest.row_count), _same_shards(before, after)
    with tempfile.TemporaryDirectory(prefix="sf_pipelines-diff-") as name:
        whole = [all(_are_numbers(store, state, cache)) for state in (before, after)]
        kind = pa.int64() if all(whole) else pa.large_string()
        sides = [Buckets(Path(name), side, rows, pa.schema([("id", kind)])) for side in ("before", "after")]
        for state, side in zip((before, after), sides, strict=True):
            for ids in _ids_of(store, state, cache, besides=same):
                column = ids.cast(kind)
                side.add(pa.record_batch([column], names=["id"]), hash_column(column))
                shard_done()
        for _ in range(2 * len(same)):
            shard_done()
        added, gone, kept = 0, 0, sum(entry.rows for entry in after.shards if entry.db_id in same)
        for (old, _), (new, _) in zip(sides[0].close(), sides[1].close(), strict=True):
            old_ids, new_ids = _distinct(old), _distinct(new)
            common = pc.call_function("sum", [pc.call_function("is_in", [new_ids], pc.SetLookupOptions(old_ids))])
            both = common.as_py() or 0
            added, gone, kept = added + len(new_ids) - both, gone + len(old_ids) - both, kept + both
    return IdChanges(added, gone, kept, as_text=whole[0] != whole[1])


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
    for ids in _ids_of(store, state, cache):
        yield pa.types.is_integer(ids.type)


def _ids_of(
    store: Store, state: SnapshotState, cache: ShardCache, besides: frozenset[int] = frozenset()
) -> Iterator[pa.Array]:
    """The ids of each shard that is not empty, and not one of ``besides``."""
    for entry in state.shards:
        if entry.key is None or entry.db_id in besides:
            continue
        with cache.checkout(store, entry.key, entry.objects) as folder, closing(open_index(state, folder)) as index:
            ids = index.ids()
            if not isinstance(ids, pa.Array):
                # Numbers and text in one shard, as stock writers may leave them.
                ids = pa.array([str(value) for value in ids.tolist()], pa.large_string())
            yield cast("pa.Array", ids)


def _distinct(path: Path) -> pa.Array:
    """The ids of one bucket, each once: stock snapshots may repeat some."""
    with pa_ipc.open_stream(str(path)) as reader:
        table = reader.read_all()
    path.unlink()
    return table.column("id").combine_chunks().unique()
