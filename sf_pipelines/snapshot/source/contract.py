"""The data contract: which rows may enter a snapshot, and what is stored of them.

Scalar columns are validated by pandera (on polars, which keeps Arrow's types), vectors by numpy; both after the cast
to what is stored, so that what passed is what a reader will find.
"""

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import SourceSchemaError
from sf_pipelines.snapshot.metric import DistanceMetric, Float32
from sf_pipelines.snapshot.source.files import SourceBatch

IdType = Literal["int64", "string"]

# Squared norms must stay normal float32 numbers: index libraries add up squares in float32.
_LARGEST_SQUARE = 1e37
_SMALLEST_SQUARE = 1e-36

REJECT_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("source_file", pa.string()),
        pa.field("source_row", pa.int64()),
        pa.field("id", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


class RejectReason(StrEnum):
    """Why a row was turned away; of several, the first in this order."""

    NULL_ID = "null_id"
    SCALAR = "scalar_contract"
    NULL_VECTOR = "null_vector"
    WRONG_DIMENSION = "wrong_dimension"
    NOT_FINITE = "not_finite"
    OUT_OF_RANGE = "norm_out_of_range"
    ZERO_NORM = "zero_norm"
    DUPLICATE_ID = "duplicate_id"


@dataclass(frozen=True)
class CheckedBatch:
    """A batch after validation.

    Attributes:
        ids: of the rows that passed.
        vectors: float32, shape (rows, dim), of the rows that passed.
        rows: their positions in the whole source.
        rejects: the others, by ``REJECT_SCHEMA``.
    """

    ids: pa.Array
    vectors: Float32
    rows: NDArray[np.int64]
    rejects: pa.RecordBatch

    def count_reasons(self) -> Counter[str]:
        """Rejected rows by reason."""
        return Counter(self.rejects.column("reason").to_pylist())


class RowContract:
    """Validates source batches and turns rows into what is stored.

    Attributes:
        id_type: type of the ids, in the snapshot and in every answer.
        stored_schema: columns of a stored row: id, vector, payload, filter columns.
    """

    def __init__(self, config: WriteConfig, schema: pa.Schema) -> None:
        """Raises ``SourceSchemaError`` when a column's type cannot be used."""
        self._config = config
        self._dim = config.vector_spec.dim
        self.id_type: IdType = _id_type(schema.field(config.id_col))
        _check_vector_type(schema.field(config.vector_spec.vector_col), self._dim)
        for name in config.payload_cols:
            _require(schema.field(name), "payload_cols", _is_json)
        for name in config.filter_cols:
            _require(schema.field(name), "filter_cols", _is_scalar)
        id_arrow = pa.int64() if self.id_type == "int64" else pa.string()
        self.stored_schema = pa.schema(
            [
                pa.field("id", id_arrow),
                pa.field("vector", pa.list_(pa.float32(), self._dim)),
                pa.field("payload", pa.string()),
                *(pa.field(name, _plain_type(schema.field(name).type)) for name in config.filter_cols),
            ]
        )
        self._scalar_schema = self._pandera_schema()

    def check(self, batch: SourceBatch) -> CheckedBatch:
        """Sorts a batch into rows that may be stored and rejects with their reason."""
        ids = self._ids(batch.rows)
        reasons, details = self._scalar_reasons(batch.rows, ids)
        vectors, present = _vectors(batch.rows.column(self._config.vector_spec.vector_col), self._dim, reasons, details)
        self._vector_reasons(vectors, present, reasons, details)
        passed = reasons == ""
        kept_vectors = vectors if passed.all() else vectors[passed[present]]
        rejected = np.flatnonzero(~passed)
        rejects = pa.record_batch(
            [
                pa.array(batch.first_row + rejected, pa.int64()),
                pa.array([batch.file] * len(rejected), pa.string()),
                pa.array(batch.file_row + rejected, pa.int64()),
                ids.take(pa.array(rejected)).cast(pa.string()),
                pa.array(reasons[rejected].tolist(), pa.string()),
                pa.array(details[rejected].tolist(), pa.string()),
            ],
            schema=REJECT_SCHEMA,
        )
        mask = pa.array(passed)
        return CheckedBatch(ids.filter(mask), kept_vectors, batch.first_row + np.flatnonzero(passed), rejects)

    def stored(self, rows: pa.RecordBatch) -> tuple[pa.RecordBatch, Float32]:
        """Rows that passed the check, as they are stored, and their vectors as a matrix of shape (rows, dim)."""
        reasons, details = np.full(len(rows), "", dtype=object), np.full(len(rows), "", dtype=object)
        vectors, _ = _vectors(rows.column(self._config.vector_spec.vector_col), self._dim, reasons, details)
        columns = [
            self._ids(rows),
            pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self._dim),
            self._payload(rows),
            *(rows.column(name).cast(self.stored_schema.field(name).type) for name in self._config.filter_cols),
        ]
        return pa.record_batch(columns, schema=self.stored_schema), vectors

    def _ids(self, rows: pa.RecordBatch) -> pa.Array:
        return rows.column(self._config.id_col).cast(pa.int64() if self.id_type == "int64" else pa.string())

    def _payload(self, rows: pa.RecordBatch) -> pa.Array:
        import polars as pl

        names = list(self._config.payload_cols)
        if not names:
            return pa.nulls(len(rows), pa.string())
        frame = cast("pl.DataFrame", pl.from_arrow(_without_dictionaries(rows.select(names))))
        encoded = frame.select(pl.struct(names).struct.json_encode().alias("payload")).to_arrow()
        return encoded.column("payload").combine_chunks().cast(pa.string())

    def _pandera_schema(self) -> Any:
        import pandera.polars as pandera
        import polars as pl

        empty = cast("pl.DataFrame", pl.from_arrow(self.stored_schema.empty_table().drop(["vector", "payload"])))
        return pandera.DataFrameSchema(
            {name: pandera.Column(dtype, nullable=name != "id", required=True) for name, dtype in empty.schema.items()},
            strict=True,
        )

    def _scalar_reasons(self, rows: pa.RecordBatch, ids: pa.Array) -> tuple[NDArray[Any], NDArray[Any]]:
        import polars as pl
        from pandera.errors import SchemaErrors

        reasons, details = np.full(len(rows), "", dtype=object), np.full(len(rows), "", dtype=object)
        scalars = [field for field in self.stored_schema if field.name not in {"vector", "payload"}]
        columns = [ids, *(rows.column(field.name).cast(field.type) for field in scalars[1:])]
        frame = cast("pl.DataFrame", pl.from_arrow(pa.table(columns, schema=pa.schema(scalars))))
        try:
            self._scalar_schema.validate(frame, lazy=True)
        except SchemaErrors as error:
            cases = error.failure_cases
            if cases["index"].null_count():
                raise SourceSchemaError(f"the scalar columns break the contract as a whole: {cases}") from error
            for index, column, check in cases.select("index", "column", "check").iter_rows():
                if not reasons[index]:
                    null_id = column == "id" and check == "not_nullable"
                    reasons[index] = (RejectReason.NULL_ID if null_id else RejectReason.SCALAR).value
                    details[index] = f"{self._config.id_col if column == 'id' else column}: {check}"
        return reasons, details

    def _vector_reasons(
        self, vectors: Float32, present: NDArray[np.bool_], reasons: NDArray[Any], details: NDArray[Any]
    ) -> None:
        where = np.flatnonzero(present)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
        finite = np.isfinite(squares)
        faults = [(~finite, RejectReason.NOT_FINITE, "NaN or infinity (as float32)")]
        large = finite & (squares > _LARGEST_SQUARE)
        faults.append((large, RejectReason.OUT_OF_RANGE, "squared norm above 1e37 overflows float32"))
        if self._config.vector_spec.metric.normalises:
            small = finite & (squares < _SMALLEST_SQUARE)
            faults.append((small, RejectReason.ZERO_NORM, "a vector without length has no direction under cosine"))
        elif self._config.vector_spec.metric is DistanceMetric.DOT_PRODUCT:
            # LanceDB finds no partition for the rows of a shard whose vectors are all like that; zeros it accepts.
            small = (squares > 0) & (squares < _SMALLEST_SQUARE)
            detail = "squared norm below 1e-36 underflows float32 under dot_product; scale the vectors up or use zeros"
            faults.append((small, RejectReason.OUT_OF_RANGE, detail))
        for mask, reason, detail in faults:
            rows = where[mask]
            fresh = rows[reasons[rows] == ""]
            reasons[fresh], details[fresh] = reason.value, detail


def _vectors(
    column: pa.Array, dim: int, reasons: NDArray[Any], details: NDArray[Any]
) -> tuple[Float32, NDArray[np.bool_]]:
    """The float32 matrix of those rows whose vector is there and has ``dim`` numbers, and which rows these are."""
    present = np.asarray(column.is_valid())
    if pa.types.is_fixed_size_list(column.type):
        lengths = np.full(len(column), dim)
    else:
        lengths = cast("NDArray[np.int64]", pc.fill_null(pc.call_function("list_value_length", [column]), 0).to_numpy())
    sized = lengths == dim
    for row in np.flatnonzero(~present & (reasons == "")):
        reasons[row], details[row] = RejectReason.NULL_VECTOR.value, "no vector"
    for row in np.flatnonzero(present & ~sized & (reasons == "")):
        reasons[row], details[row] = RejectReason.WRONG_DIMENSION.value, f"{lengths[row]} numbers, expected {dim}"
    usable = present & sized
    if not usable.all():
        column = column.filter(pa.array(usable))
    # A null among the numbers becomes NaN and is rejected as such.
    values = column.flatten().to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False).reshape(len(column), dim), usable


def _without_dictionaries(rows: pa.RecordBatch) -> pa.RecordBatch:
    columns = [rows.column(field.name).cast(_plain_type(field.type)) for field in rows.schema]
    return pa.record_batch(columns, names=rows.schema.names)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries, large strings and float16 at any depth: what the index and JSON can take."""
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    # polars refuses a slice of a fixed-size list that has nulls; in JSON the two are the same.
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(kind.field(n)) for n in range(kind.num_fields)])
    return {pa.float16(): pa.float32(), pa.large_string(): pa.string()}.get(kind, kind)


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(_plain_type(field.type))


def _id_type(field: pa.Field) -> IdType:
    kind = _plain_type(field.type)
    if pa.types.is_string(kind):
        return "string"
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return "int64"
    raise SourceSchemaError(f"id_col {field.name!r} is {field.type}; ids are integers up to int64 or strings: cast it")


def _check_vector_type(field: pa.Field, dim: int) -> None:
    kind = field.type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(test(kind) for test in lists) or not pa.types.is_floating(kind.value_type):
        raise SourceSchemaError(
            f"vector column {field.name!r} is {kind}; expected a list or fixed-size list of float16, float32 or float64"
        )
    if pa.types.is_fixed_size_list(kind) and kind.list_size != dim:
        raise SourceSchemaError(
            f"vector column {field.name!r} holds {kind.list_size} numbers, but vector_spec.dim is {dim}"
        )


def _is_scalar(kind: pa.DataType) -> bool:
    tests = (
        pa.types.is_boolean,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_string,
        pa.types.is_date,
        pa.types.is_timestamp,
    )
    return any(test(_plain_type(kind)) for test in tests)


def _is_json(kind: pa.DataType) -> bool:
    if any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        return _is_json(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_is_json(kind.field(n).type) for n in range(kind.num_fields))
    # Arrow cannot unpack a dictionary of lists or structs.
    return _is_scalar(kind)


def _require(field: pa.Field, option: str, allowed: Any) -> None:
    if not allowed(field.type):
        raise SourceSchemaError(
            f"{option} names {field.name!r}, which is {field.type}; that type cannot be stored there"
        )
