"""Samples by smallest hash of the id: the same rows whatever the order of files and batches."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.source.hashing import UInt64


class SmallestHashSample:
    """Keeps the ``size`` rows with the smallest hashes; of rows with equal ids only the first in the source.

    Memory is bounded by twice the size and one batch.

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
        """Offers rows to the sample.

        Args:
            kept: their columns.
            hashes: of their ids.
            rows: their positions in the source.
            vectors: float32, shape (rows, dim).
        """
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
