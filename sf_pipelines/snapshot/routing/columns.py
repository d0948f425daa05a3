"""Columns that decide a row's shard, whatever their encoding."""

import pyarrow as pa

from sf_pipelines.snapshot.errors import SourceSchemaError


def column_of(schema: pa.Schema, name: str, strategy: str) -> pa.DataType:
    """Type of the column that has this name.

    Raises:
        SourceSchemaError: none has, or more than one.
    """
    found = schema.get_all_field_indices(name)
    if len(found) != 1:
        there = "there is none" if not found else f"there are {len(found)}"
        raise SourceSchemaError(
            f"{strategy} sharding needs one column {name!r}, but {there} ({', '.join(schema.names)})"
        )
    return schema.field(found[0]).type


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values: that of a dictionary-encoded column is its dictionary's."""
    return kind.value_type if isinstance(kind, pa.DictionaryType) else kind


def plain_column(rows: pa.RecordBatch, name: str) -> pa.Array:
    """A column of plain values: dictionaries decoded."""
    column = rows.column(name)
    return column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column


def is_text(kind: pa.DataType) -> bool:
    """Whether values are strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether values are bytes."""
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)
