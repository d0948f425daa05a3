"""Finding repeated ids exactly, in memory that does not grow with the table: ids are spread over buckets on disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc as pa_ipc
from numpy.typing import NDArray

from sf_pipelines.snapshot.source.hashing import UInt64

# Rows of one bucket: what is held in memory at a time.
_BUCKET_ROWS = 100_000


class DuplicateFinder:
    """Collects (id, position) pairs; of equal ids the one with the first position is the original."""

    def __init__(self, folder: Path, expected_rows: int, id_type: pa.DataType) -> None:
        self._schema = pa.schema([pa.field("id", id_type), pa.field("row", pa.int64())])
        self._paths = [folder / f"ids-{n:04d}.arrow" for n in range(1 + expected_rows // _BUCKET_ROWS)]
        self._writers = [pa_ipc.new_stream(str(path), self._schema) for path in self._paths]

    def add(self, ids: pa.Array, hashes: UInt64, rows: NDArray[np.int64]) -> None:
        """Adds rows by id, the id's hash, and position in the source."""
        batch = pa.record_batch([ids, pa.array(rows)], schema=self._schema)
        if len(self._writers) == 1:
            self._writers[0].write_batch(batch)
            return
        buckets = (hashes % np.uint64(len(self._writers))).astype(np.int64)
        order = np.argsort(buckets, kind="stable")
        batch = batch.take(pa.array(order))
        edges = np.searchsorted(buckets[order], np.arange(len(self._writers) + 1))
        for bucket, writer in enumerate(self._writers):
            start, end = int(edges[bucket]), int(edges[bucket + 1])
            if end > start:
                writer.write_batch(batch.slice(start, end - start))

    def repeats(self) -> Iterator[pa.Table]:
        """Ends the collection and yields, bucket by bucket, the (id, row) pairs that came after their original."""
        import polars as pl

        for writer in self._writers:
            writer.close()
        for path in self._paths:
            with pa_ipc.open_stream(str(path)) as reader:
                table = reader.read_all()
            frame = cast("pl.DataFrame", pl.from_arrow(table)).sort("row")
            yield frame.filter(~pl.col("id").is_first_distinct()).to_arrow().cast(self._schema)
            path.unlink()
