"""The data contract: which rows may enter a snapshot, and what is stored of them.

Scalar columns are validated by pandera (on polars, which keeps Arrow's types), vectors by numpy; both after the cast
to what is stored, so that what passed is what a reader will find.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import SourceSchemaError
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.source.columns import (
    IdType,
    id_type_of,
    is_json,
    is_scalar,
    json_objects,
    plain_type,
    require,
)
from sf_pipelines.snapshot.source.files import SourceBatch
from sf_pipelines.snapshot.source.keys import KeyValueColumns
from sf_pipelines.snapshot.source.rejects import REJECT_SCHEMA, Faults, RejectReason
from sf_pipelines.snapshot.source.text import without_invalid_text
from sf_pipelines.snapshot.source.vectors import VectorColumn

# Sampled rows of snapshots that are sharded by other columns carry them under these names.
CONTEXT_PREFIX = "context."
SHARD_COLUMN = "shard"


class Placed(Protocol):
    """Shards of a batch of rows, -1 for a row that has none, and why."""

    @property
    def shards(self) -> NDArray[np.int32]:
        """Shape (n,)."""
        ...

    @property
    def faults(self) -> dict[int, str]:
        """Why a row has no shard."""
        ...


class Placer(Protocol):
    """A way to shard rows by their columns."""

    def place(self, rows: pa.RecordBatch) -> Placed:
        """Shard of each row."""
        ...

    def check_schema(self, schema: pa.Schema) -> None:
        """Raises ``SourceSchemaError`` when the columns' types cannot be used."""
        ...


@dataclass(frozen=True)
class CheckedBatch:
    """A batch after validation.

    Attributes:
        kept: of the rows that passed: ``id``, and where columns decide the shard, ``shard`` and ``context.<name>``.
        vectors: float32, shape (rows, dim), of the rows that passed.
        rows: their positions in the whole source.
        rejects: the others, by ``REJECT_SCHEMA``.
    """

    kept: pa.RecordBatch
    vectors: Float32
    rows: NDArray[np.int64]
    rejects: pa.RecordBatch

    @property
    def ids(self) -> pa.Array:
        """Ids of the rows that passed."""
        return self.kept.column("id")

    def count_reasons(self) -> Counter[str]:
        """Rejected rows by reason."""
        return Counter(self.rejects.column("reason").to_pylist())


class RowContract:
    """Validates source batches and turns rows into what is stored.

    Args:
        config: of the snapshot.
        schema: of the source's columns.
        placer: how rows find their shard, where columns decide it; None where the vector does.

    Attributes:
        id_type: type of the ids, in the snapshot and in every answer.
        stored_schema: columns of a stored row: id, vector, payload, filter columns, and where there are any, key and
            value.
        kept_schema: columns of ``CheckedBatch.kept``.
        keys: key and value columns, None without.

    Raises:
        SourceSchemaError: a column's type cannot be used.
        ConfigError: the vector function cannot be imported.
    """

    def __init__(self, config: WriteConfig, schema: pa.Schema, placer: Placer | None = None) -> None:
        self._config = config
        self._placer = placer
        self._vectors = VectorColumn(config.vector_spec, schema)
        keyed = config.key_value
        self.keys: KeyValueColumns | None = None if keyed is None else KeyValueColumns(keyed, schema)
        self.id_type: IdType = _id_type(schema.field(config.id_col), self.keys)
        for name in config.payload_cols:
            require(schema.field(name), "payload_cols", is_json)
        for name in config.filter_cols:
            require(schema.field(name), "filter_cols", _filter_test(config))
        id_arrow = pa.int64() if self.id_type == "int64" else pa.string()
        self.stored_schema = pa.schema(
            [
                pa.field("id", id_arrow),
                pa.field("vector", pa.list_(pa.float32(), config.vector_spec.dim)),
                pa.field("payload", pa.string()),
                *(pa.field(name, plain_type(schema.field(name).type)) for name in config.filter_cols),
                *(self.keys.fields if self.keys else []),
            ]
        )
        self._scalar_schema = self._pandera_schema()
        self._routed_by = config.routing_columns
        if placer is not None:
            placer.check_schema(self.routing_rows(_no_rows(schema)).schema)
        companions = {} if placer is None else self._companions(_no_rows(schema), Faults(0))
        self.kept_schema = pa.record_batch({"id": pa.array([], id_arrow), **companions}).schema

    @property
    def filter_columns(self) -> dict[str, str]:
        """Stored types of the filter columns."""
        return {name: str(self.stored_schema.field(name).type) for name in self._config.filter_cols}

    def check(self, batch: SourceBatch) -> CheckedBatch:
        """Sorts a batch into rows that may be stored and rejects with their reason."""
        faults = Faults(len(batch.rows))
        batch = replace(batch, rows=without_invalid_text(batch.rows, faults))
        ids = self.ids(batch.rows)
        self._check_scalars(batch.rows, ids, faults)
        if self.keys is not None:
            self.keys.check(batch.rows, faults)
        vectors, present = self._vectors.read(batch.rows, faults)
        self._vectors.check(vectors, present, faults)
        companions = self._companions(batch.rows, faults)
        passed = faults.passed
        kept_vectors = vectors if passed.all() else vectors[passed[present]]
        kept = pa.record_batch({"id": ids, **companions}).filter(pa.array(passed))
        positions = batch.first_row + np.flatnonzero(passed)
        return CheckedBatch(kept, kept_vectors, positions, _rejects(batch, ids, faults))

    def stored(self, rows: pa.RecordBatch) -> tuple[pa.RecordBatch, Float32]:
        """Rows that passed the check, as they are stored, and their vectors as a matrix of shape (rows, dim)."""
        vectors = self._vectors.read_again(rows)
        columns = [
            self.ids(rows),
            pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self._config.vector_spec.dim),
            self._payload(rows),
            *(rows.column(name).cast(self.stored_schema.field(name).type) for name in self._config.filter_cols),
            *([self.keys.keys(rows), self.keys.values(rows)] if self.keys else []),
        ]
        return pa.record_batch(columns, schema=self.stored_schema), vectors

    def routing_rows(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """The columns that decide a row's shard, by the names that the strategy knows them by."""
        columns = {
            name: self.keys.keys(rows)
            if self.keys and source == self._config.id_col
            else rows.column(source).cast(plain_type(rows.schema.field(source).type))
            for name, source in self._routed_by.items()
        }
        return pa.record_batch(list(columns.values()), names=list(columns))

    def _companions(self, rows: pa.RecordBatch, faults: Faults) -> dict[str, pa.Array]:
        if self._placer is None:
            return {}
        deciding = self.routing_rows(rows)
        placed = self._placer.place(deciding)
        faults.add_each(placed.faults.items(), RejectReason.NO_SHARD)
        named = {f"{CONTEXT_PREFIX}{name}": deciding.column(name) for name in deciding.schema.names}
        return {SHARD_COLUMN: pa.array(placed.shards, pa.int32()), **named}

    def ids(self, rows: pa.RecordBatch) -> pa.Array:
        """Ids of the rows, with their stored type."""
        if self.keys is not None:
            return self.keys.ids(rows)
        return rows.column(self._config.id_col).cast(pa.int64() if self.id_type == "int64" else pa.string())

    def _payload(self, rows: pa.RecordBatch) -> pa.Array:
        names = self._config.payload_cols
        return json_objects(rows, names) if names else pa.nulls(len(rows), pa.string())

    @property
    def _scalars(self) -> list[pa.Field]:
        return [self.stored_schema.field(name) for name in ("id", *self._config.filter_cols)]

    def _pandera_schema(self) -> Any:
        import pandera.polars as pandera
        import polars as pl

        empty = cast("pl.DataFrame", pl.from_arrow(pa.schema(self._scalars).empty_table()))
        return pandera.DataFrameSchema(
            {name: pandera.Column(dtype, nullable=name != "id", required=True) for name, dtype in empty.schema.items()},
            strict=True,
        )

    def _check_scalars(self, rows: pa.RecordBatch, ids: pa.Array, faults: Faults) -> None:
        import polars as pl
        from pandera.errors import SchemaErrors

        scalars = self._scalars
        columns = [ids, *(rows.column(field.name).cast(field.type) for field in scalars[1:])]
        frame = cast("pl.DataFrame", pl.from_arrow(pa.table(columns, schema=pa.schema(scalars))))
        try:
            self._scalar_schema.validate(frame, lazy=True)
        except SchemaErrors as error:
            cases = error.failure_cases
            if cases["index"].null_count():
                raise SourceSchemaError(f"the scalar columns break the contract as a whole: {cases}") from error
            for index, column, check in cases.select("index", "column", "check").iter_rows():
                null_id = column == "id" and check == "not_nullable"
                reason = RejectReason.NULL_ID if null_id else RejectReason.SCALAR
                faults.add_each([(index, f"{self._config.id_col if column == 'id' else column}: {check}")], reason)


def _rejects(batch: SourceBatch, ids: pa.Array, faults: Faults) -> pa.RecordBatch:
    rejected = np.flatnonzero(~faults.passed)
    return pa.record_batch(
        [
            pa.array(batch.first_row + rejected, pa.int64()),
            pa.array([batch.file] * len(rejected), pa.string()),
            pa.array(batch.file_row + rejected, pa.int64()),
            ids.take(pa.array(rejected)).cast(pa.string()),
            pa.array(faults.reasons[rejected].tolist(), pa.string()),
            pa.array(faults.details[rejected].tolist(), pa.string()),
        ],
        schema=REJECT_SCHEMA,
    )


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([column.combine_chunks() for column in schema.empty_table().columns], schema=schema)


def _id_type(field: pa.Field, keys: KeyValueColumns | None) -> IdType:
    if keys is None:
        return id_type_of(field)
    return "int64" if keys.key_type == "int64" else "string"


def _filter_test(config: WriteConfig) -> Any:
    def storable(kind: pa.DataType) -> bool:
        # SQLite's integers end at int64.
        return is_scalar(kind) and not (config.vector_spec.backend == "sqlite-vec" and plain_type(kind) == pa.uint64())

    return storable
