"""Finding repeated ids exactly, in memory that does not grow with the table: ids are spread over buckets on disk."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as pa_ipc
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import compute
from sf_pipelines.snapshot.source.hashing import UInt64, hash_column, mix

# Rows that a bucket should have: about what is held in memory at a time.
_BUCKET_ROWS = 100_000

# Buckets of one split, each an open file: systems allow a process about a thousand of these.
_MOST_BUCKETS = 256


class DuplicateFinder:
    """Collects (id, position) pairs; of equal ids the one with the first position is the original.

    Ids are split by hash over at most 256 buckets, and a bucket that grew too large once more when it is read. So
    memory stays the same up to some 6.5 billion rows; only rows with one and the same id always stay together.
    """

    def __init__(self, folder: Path, expected_rows: int, id_type: pa.DataType) -> None:
        self._folder = folder
        self._schema = pa.schema([pa.field("id", id_type), pa.field("row", pa.int64())])
        self._buckets = Buckets(folder, "ids", expected_rows, self._schema)

    def add(self, ids: pa.Array, hashes: UInt64, rows: NDArray[np.int64]) -> None:
        """Adds rows by id, the id's hash, and position in the source."""
        self._buckets.add(pa.record_batch([ids, pa.array(rows)], schema=self._schema), hashes)

    def repeats(self) -> Iterator[pa.Table]:
        """Ends the collection and yields, bucket by bucket, the (id, row) pairs that came after their original."""
        for path, rows in self._buckets.close():
            # Buckets of one split differ in size by chance: only one that is far too large is worth another split.
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
    """Files of rows, filled side by side by the hash of each row's id: equal ids share a file."""

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
    """A bucket's rows, about ``_BUCKET_ROWS`` at a time: its own batches are far too small to be split again."""
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
