"""The data contract: which rows may enter a snapshot, and what is stored of them.

Rows are checked in the form in which they are stored, so that what passed is what a reader will find.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import column_errors, compute, plain_rows, plain_type
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import SourceSchemaError
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.routing.protocol import RowRouting
from sf_pipelines.snapshot.source.columns import IdType, as_int64, id_type_of, require_filter, require_json
from sf_pipelines.snapshot.source.files import SourceBatch
from sf_pipelines.snapshot.source.json_text import json_objects
from sf_pipelines.snapshot.source.keys import KeyValueColumns
from sf_pipelines.snapshot.source.rejects import REJECT_SCHEMA, Faults, RejectReason, without_invalid_text
from sf_pipelines.snapshot.source.vectors import VectorColumn

# Sampled rows of snapshots that are sharded by other columns carry them under these names.
CONTEXT_PREFIX = "context."
SHARD_COLUMN = "shard"


@dataclass(frozen=True)
class CheckedBatch:
    """A batch after validation.

    Attributes:
        kept: of the rows that passed: ``id``, and where columns decide the shard, ``shard`` and ``context.<name>``.
        stored: these rows as they are stored, by ``stored_schema``.
        vectors: float32, shape (rows, dim), of the rows that passed.
        rows: their positions in the whole source.
        rejects: the others, by ``REJECT_SCHEMA``.
    """

    kept: pa.RecordBatch
    stored: pa.RecordBatch
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
        routing: how rows find their shard, where columns decide it; None where the vector does.

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

    def __init__(self, config: WriteConfig, schema: pa.Schema, routing: RowRouting | None = None) -> None:
        self._config = config
        self._routing = routing
        self._vectors = VectorColumn(config.vector_spec, schema)
        keyed = config.key_value
        self.keys: KeyValueColumns | None = None if keyed is None else KeyValueColumns(keyed, schema)
        self.id_type: IdType = _id_type(schema.field(config.id_col), self.keys)
        for name in config.payload_cols:
            require_json(schema.field(name), "payload_cols")
        for name in config.filter_cols:
            require_filter(schema.field(name), config.vector_spec.backend)
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
        self._routed_by = config.routing_columns
        self._bytes_cols = config.bytes_columns
        if routing is not None:
            routing.check_schema(self._routing_rows(self._no_rows(schema)).schema)
        deciding = {} if routing is None else self._deciding_columns(self._no_rows(schema), Faults(0))
        self.kept_schema = pa.record_batch({"id": pa.array([], id_arrow), **deciding}).schema

    @property
    def filter_columns(self) -> dict[str, str]:
        """Stored types of the filter columns."""
        return {name: str(self.stored_schema.field(name).type) for name in self._config.filter_cols}

    def check(self, batch: SourceBatch) -> CheckedBatch:
        """Sorts a batch into rows that may be stored and rejects with their reason."""
        faults = Faults(len(batch.rows))
        with _in_file(batch.file):
            rows = without_invalid_text(plain_rows(batch.rows, bytes_cols=self._bytes_cols), faults)
            batch = replace(batch, rows=rows)
            ids = self._ids(rows)
            self._check_ids(rows, ids, faults)
            if self.keys is not None:
                self.keys.check(rows, faults)
            vectors, present = self._vectors.read(rows, faults)
            self._vectors.check(vectors, present, faults)
            deciding = self._deciding_columns(rows, faults)
            passed = faults.passed
            kept_vectors = vectors if passed.all() else vectors[passed[present]]
            kept = pa.record_batch({"id": ids, **deciding}).filter(pa.array(passed))
            stored = self._stored(rows.filter(pa.array(passed)), kept.column("id"), kept_vectors)
        positions = batch.first_row + np.flatnonzero(passed)
        return CheckedBatch(kept, stored, kept_vectors, positions, _rejects(batch, ids, faults))

    def _stored(self, rows: pa.RecordBatch, ids: pa.Array, vectors: Float32) -> pa.RecordBatch:
        """Rows that passed, in plain form, as they are stored."""
        columns = [
            ids,
            pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self._config.vector_spec.dim),
            self._payload(rows),
            *(rows.column(name) for name in self._config.filter_cols),
            *([self.keys.keys(rows), self.keys.values(rows)] if self.keys else []),
        ]
        return pa.record_batch(columns, schema=self.stored_schema)

    def _routing_rows(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """The columns that decide a row's shard, by the names that the strategy knows them by."""
        columns = {
            name: self.keys.keys(rows) if self.keys and source == self._config.id_col else rows.column(source)
            for name, source in self._routed_by.items()
        }
        return pa.record_batch(list(columns.values()), names=list(columns))

    def _no_rows(self, schema: pa.Schema) -> pa.RecordBatch:
        """A batch without rows, in plain form."""
        columns = []
        for field in schema:
            with column_errors(field.name):
                columns.append(pa.nulls(0, field.type))
        return plain_rows(pa.record_batch(columns, schema=schema), bytes_cols=self._bytes_cols)

    def _check_ids(self, rows: pa.RecordBatch, ids: pa.Array, faults: Faults) -> None:
        name = self._config.id_col
        given = rows.column(name)
        large = np.flatnonzero(compute.and_(ids.is_null(), given.is_valid()))
        texts = [f"{name}: {given[row].as_py()} is above the largest id, 2**63 - 1" for row in large.tolist()]
        faults.add_each(zip(large.tolist(), texts, strict=True), RejectReason.KEY_OUT_OF_RANGE)
        missing = np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))
        faults.add(missing, RejectReason.NULL_ID, f"{name}: no id")

    def _deciding_columns(self, rows: pa.RecordBatch, faults: Faults) -> dict[str, pa.Array]:
        if self._routing is None:
            return {}
        columns = self._routing_rows(rows)
        placed = self._routing.place(columns)
        faults.add_each(placed.faults.items(), RejectReason.NO_SHARD)
        named = {f"{CONTEXT_PREFIX}{name}": columns.column(name) for name in columns.schema.names}
        return {SHARD_COLUMN: pa.array(placed.shards, pa.int32()), **named}

    def _ids(self, rows: pa.RecordBatch) -> pa.Array:
        """Ids of the rows, with their stored type; null where a number is too large for one."""
        if self.keys is not None:
            return self.keys.ids(rows)
        column = rows.column(self._config.id_col)
        return as_int64(column) if self.id_type == "int64" else column

    def _payload(self, rows: pa.RecordBatch) -> pa.Array:
        names = self._config.payload_cols
        return json_objects(rows, names) if names else pa.nulls(len(rows), pa.string())


@contextmanager
def _in_file(file: str) -> Iterator[None]:
    """Names the file in errors about its columns."""
    try:
        yield
    except SourceSchemaError as error:
        if not file:
            raise
        raise SourceSchemaError(f"{file}: {error}") from error


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


def _id_type(field: pa.Field, keys: KeyValueColumns | None) -> IdType:
    if keys is None:
        return id_type_of(field)
    return "int64" if keys.key_type == "int64" else "string"
