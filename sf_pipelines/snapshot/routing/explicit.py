"""EXPLICIT: each row names its shard."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sf_pipelines.snapshot.arrow import plain_column
from sf_pipelines.snapshot.errors import QueryError, SourceSchemaError
from sf_pipelines.snapshot.routing.protocol import Placement, RowRouting


class ExplicitRouting(RowRouting):
    """The column ``shard_id`` is the shard; a query must name its shards itself."""

    strategy = "explicit"
    columns = ("shard_id",)

    def __init__(self, num_dbs: int) -> None:
        self.num_dbs = num_dbs

    def check_schema(self, schema: pa.Schema) -> None:
        kind = self._column_type(schema, "shard_id")
        # Whole numbers are floats where pandas had a column with gaps.
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise SourceSchemaError(f"shard_id has type {kind}; it must be whole numbers from 0 to {self.num_dbs - 1}")

    def place(self, rows: pa.RecordBatch) -> Placement:
        self.check_schema(rows.schema)
        column = plain_column(rows.column("shard_id"), uuids=False)
        null = column.is_null().to_numpy(zero_copy_only=False)
        values = pc.fill_null(column, pa.scalar(0, column.type)).to_numpy(zero_copy_only=False)
        # NaN and infinity fail this test.
        known = (values >= 0) & (values < self.num_dbs) & ~null
        if values.dtype.kind == "f":
            known &= np.floor(values) == values
        shards = np.full(len(values), -1, dtype=np.int32)
        shards[known] = values[known].astype(np.int32)
        faults = {row: self._fault(column[row].as_py()) for row in np.flatnonzero(~known).tolist()}
        return Placement(shards, faults)

    def locate(self, context: Mapping[str, Any]) -> int:
        named = f"; routing_context ({', '.join(context)}) plays no part" if context else ""
        raise QueryError(f"rows named their shards themselves: pass shard_ids to say which to ask{named}")

    def describe(self) -> dict[str, Any]:
        return {"sharding_strategy": self.strategy}

    def _fault(self, value: float | None) -> str:
        if value is None:
            return "shard_id is null"
        if isinstance(value, float) and not value.is_integer():
            return f"shard_id {value!r} is not a whole number"
        return f"shard_id {value!r} is not one of the shards 0 to {self.num_dbs - 1}"
