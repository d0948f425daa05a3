"""What the first pass over the source collects by the hash of each id: samples, and repeated ids."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as pa_ipc
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import compute
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.source.hashing import UInt64, hash_column, mix

# Rows of a bucket, about what is in memory at a time.
_BUCKET_ROWS = 100_000
# Buckets of one split, each an open file: systems allow a process about a thousand.
_MOST_BUCKETS = 256


class SmallestHashSample:
    """Keeps the ``size`` rows with the smallest hashes: the same rows whatever the order of files and batches.

    Of rows with equal ids only the first in the source is kept. Memory is bounded by twice the size and one batch.

    Args:
        size: rows to keep.
        dim: numbers in a vector.
        schema: columns that are kept beside the vector; the first is the id.
    """

    def __init__(self, size: int, dim: int, schema: pa.Schema) -> None:
        self._size = size
        self._hashes = np.empty(0, dtype=np.uint64)
        self._rows = np.empty(0, dtype=np.int64)
        self._vectors: Float32 = np.empty((0, dim), dtype=np.float32)
        self._kept = schema.empty_table()

    def add(self, kept: pa.RecordBatch, hashes: UInt64, rows: NDArray[np.int64], vectors: Float32) -> None:
        """Offers rows to the sample."""
        if len(self._hashes) >= self._size:
            small = np.flatnonzero(hashes <= self._hashes[self._size - 1])
            if not len(small):
                return
            kept, hashes, rows, vectors = kept.take(pa.array(small)), hashes[small], rows[small], vectors[small]
        self._kept = pa.concat_tables([self._kept, pa.Table.from_batches([kept])])
        self._hashes = np.concatenate([self._hashes, hashes])
        self._rows = np.concatenate([self._rows, rows])
        self._vectors = np.concatenate([self._vectors, vectors])
        self._trim()

    def take(self) -> tuple[pa.Table, Float32]:
        """Columns and vectors by growing hash."""
        return self._kept, self._vectors

    def _trim(self) -> None:
        # Different ids may share a hash, equal ids always do: compare ids among equal hashes only.
        order = np.lexsort((self._rows, self._hashes))
        hashes = self._hashes[order]
        ids = self._kept.column(0)
        repeated = np.zeros(len(order), dtype=bool)
        twins = np.flatnonzero(hashes[1:] == hashes[:-1])
        for place in twins:
            first = place
            while first >= 0 and hashes[first] == hashes[place + 1]:
                if ids[int(order[first])].equals(ids[int(order[place + 1])]):
                    repeated[place + 1] = True
                    break
                first -= 1
        kept = order[~repeated][: self._size]
        self._kept = self._kept.take(pa.array(kept)).combine_chunks()
        self._hashes, self._rows, self._vectors = self._hashes[kept], self._rows[kept], self._vectors[kept]


class DuplicateFinder:
    """Finds repeated ids exactly, in bounded memory; of equal ids the one with the first position is the original.

    Ids are split by hash over at most 256 buckets on disk, and a bucket that grew too large once more when it is read.
    So memory stays the same up to some 6.5 billion rows; only rows with one and the same id always stay together.
    """

    def __init__(self, folder: Path, expected_rows: int, id_type: pa.DataType) -> None:
        self._folder = folder
        self._schema = pa.schema([pa.field("id", id_type), pa.field("row", pa.int64())])
        self._buckets = Buckets(folder, "ids", expected_rows, self._schema)

    def add(self, ids: pa.Array, hashes: UInt64, rows: NDArray[np.int64]) -> None:
        self._buckets.add(pa.record_batch([ids, pa.array(rows)], schema=self._schema), hashes)

    def repeats(self) -> Iterator[pa.Table]:
        """Ends the collection and yields, bucket by bucket, the (id, row) pairs that came after their original."""
        for path, rows in self._buckets.close():
            # Buckets of one split differ in size by chance: only a far too large one is worth another split.
            if rows <= 2 * _BUCKET_ROWS:
                yield self._repeats_in(path)
                continue
            for part, _ in self._split(path, rows):
                yield self._repeats_in(part)

    def _split(self, path: Path, rows: int) -> list[tuple[Path, int]]:
        parts = Buckets(self._folder, path.stem, rows, self._schema)
        for table in _pieces(path):
            batch = table.combine_chunks().to_batches()[0]
            # Mixed again: within a bucket the hashes themselves agree in their remainder.
            parts.add(batch, mix(hash_column(batch.column("id"))))
        path.unlink()
        return parts.close()

    def _repeats_in(self, path: Path) -> pa.Table:
        with pa_ipc.open_stream(str(path)) as reader:
            table = reader.read_all()
        path.unlink()
        firsts = table.group_by("id").aggregate([("row", "min")]).column("row_min")
        return table.filter(compute.invert(compute.is_in(table.column("row"), value_set=firsts)))


class Buckets:
    """Files of rows, chosen by the hash of each row's id: equal ids share a file."""

    def __init__(self, folder: Path, stem: str, expected_rows: int, schema: pa.Schema) -> None:
        count = min(_MOST_BUCKETS, 1 + expected_rows // _BUCKET_ROWS)
        self._paths = [folder / f"{stem}-{n:03d}.arrow" for n in range(count)]
        self._writers = [pa_ipc.new_stream(str(path), schema) for path in self._paths]
        self._rows = np.zeros(count, dtype=np.int64)

    def add(self, batch: pa.RecordBatch, hashes: UInt64) -> None:
        """Spreads rows over the files by their hashes."""
        buckets = (hashes % np.uint64(len(self._writers))).astype(np.int64)
        order = np.argsort(buckets, kind="stable")
        batch = batch.take(pa.array(order))
        edges = np.searchsorted(buckets[order], np.arange(len(self._writers) + 1))
        self._rows += np.diff(edges)
        for bucket in np.flatnonzero(np.diff(edges)).tolist():
            start, end = int(edges[bucket]), int(edges[bucket + 1])
            self._writers[bucket].write_batch(batch.slice(start, end - start))

    def close(self) -> list[tuple[Path, int]]:
        """Each file and its rows."""
        for writer in self._writers:
            writer.close()
        self._writers.clear()
        return list(zip(self._paths, self._rows.tolist(), strict=True))


def _pieces(path: Path) -> Iterator[pa.Table]:
    """A bucket's rows, about ``_BUCKET_ROWS`` at a time: its own batches are far too small to split."""
    held: list[pa.RecordBatch] = []
    rows = 0
    with pa_ipc.open_stream(str(path)) as reader:
        for batch in reader:
            held.append(batch)
            rows += len(batch)
            if rows >= _BUCKET_ROWS:
                yield pa.Table.from_batches(held)
                held, rows = [], 0
    if held:
        yield pa.Table.from_batches(held)
