"""Source columns: which types can be used for what, and their plain forms."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import pyarrow as pa

from sf_pipelines.snapshot.errors import SourceSchemaError

IdType = Literal["int64", "string"]


def json_objects(rows: pa.RecordBatch, names: Sequence[str]) -> pa.Array:
    """One JSON object of these columns for each row, as strings; NaN and infinity become null."""
    import polars as pl

    frame = cast("pl.DataFrame", pl.from_arrow(_without_dictionaries(rows.select(list(names)))))
    encoded = frame.select(pl.struct(list(names)).struct.json_encode().alias("json")).to_arrow()
    return encoded.column("json").combine_chunks().cast(pa.string())


def _without_dictionaries(rows: pa.RecordBatch) -> pa.RecordBatch:
    columns = [rows.column(field.name).cast(plain_type(field.type)) for field in rows.schema]
    return pa.record_batch(columns, names=rows.schema.names)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries, large strings, float16 and null at any depth: what index and JSON can take."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    # polars refuses a slice of a fixed-size list that has nulls; in JSON the two are the same.
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(kind.field(n)) for n in range(kind.num_fields)])
    return {pa.float16(): pa.float32(), pa.large_string(): pa.string(), pa.null(): pa.string()}.get(kind, kind)


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain_type(field.type))


def id_type_of(field: pa.Field) -> IdType:
    """Type that ids of a column are stored with; raises ``SourceSchemaError`` when it cannot be one."""
    kind = plain_type(field.type)
    if pa.types.is_string(kind):
        return "string"
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return "int64"
    raise SourceSchemaError(f"id_col {field.name!r} is {field.type}; ids are integers up to int64 or strings: cast it")


def check_vector_type(field: pa.Field, dim: int) -> None:
    """Raises ``SourceSchemaError`` unless a column holds lists of so many floating-point numbers."""
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


def is_scalar(kind: pa.DataType) -> bool:
    """Whether a value is one boolean, number, string, date or time."""
    tests = (
        pa.types.is_boolean,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_string,
        pa.types.is_date,
        pa.types.is_timestamp,
    )
    return any(test(plain_type(kind)) for test in tests)


def is_json(kind: pa.DataType) -> bool:
    """Whether JSON can say a value."""
    if any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        return is_json(kind.value_type)
    if pa.types.is_struct(kind):
        return all(is_json(kind.field(n).type) for n in range(kind.num_fields))
    # Arrow cannot unpack a dictionary of lists or structs.
    return is_scalar(kind)


def require(field: pa.Field, option: str, allowed: Any) -> None:
    """Raises ``SourceSchemaError`` unless a column's type is allowed; ``option`` is what names the column."""
    if not allowed(field.type):
        raise SourceSchemaError(
            f"{option} names {field.name!r}, which is {field.type}; that type cannot be stored there"
        )
