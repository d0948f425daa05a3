"""Checked rows of one input range, as they are stored: the first pass writes them, routing reads them.

So every row is decoded, and the vector function called for it, once. One Arrow file for each input range: the columns
of a stored row, then its position in the source, then its shard where its columns decide that.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.ipc as pa_ipc
from numpy.typing import NDArray

from sf_pipelines.snapshot.source.contract import SHARD_COLUMN, CheckedBatch, RowContract


class PartWriter:
    """Writes the rows of one input range that passed the contract."""

    def __init__(self, path: Path, contract: RowContract) -> None:
        self.path = path
        self.rows = 0
        self._placed = SHARD_COLUMN in contract.kept_schema.names
        more = [pa.field("position", pa.int64()), *([pa.field("shard", pa.int32())] if self._placed else [])]
        # A filter column may have one of these names, too: they are found by their place.
        self._schema = pa.schema([*contract.stored_schema, *more])
        self._writer = pa_ipc.new_file(str(path), self._schema)

    def add(self, checked: CheckedBatch) -> None:
        """Writes what passed of a batch."""
        if not len(checked.rows):
            return
        placed = [checked.kept.column(SHARD_COLUMN)] if self._placed else []
        columns = [*checked.stored.columns, pa.array(checked.rows), *placed]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self.rows += len(checked.rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.close()


def read_part(
    path: Path, stored_schema: pa.Schema, repeats_between: Callable[[int, int], NDArray[np.int64]]
) -> Iterator[tuple[pa.RecordBatch, NDArray[np.int32] | None]]:
    """The rows of one input range as they are stored, batch by batch, and their shards where columns decide them.

    Rows at the positions that ``repeats_between`` gives for the range's first and last one are left out.
    """
    width = len(stored_schema)
    with pa_ipc.open_file(str(path)) as reader:
        if not reader.num_record_batches:
            return
        ends = [reader.get_batch(place).column(width) for place in (0, reader.num_record_batches - 1)]
        repeats = repeats_between(ends[0][0].as_py(), ends[1][-1].as_py())
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            kept = ~np.isin(batch.column(width).to_numpy(), repeats)
            if not kept.all():
                batch = batch.filter(pa.array(kept))
            if batch.num_rows:
                shards = batch.column(width + 1).to_numpy() if batch.num_columns > width + 1 else None
                yield pa.RecordBatch.from_arrays(batch.columns[:width], schema=stored_schema), shards
