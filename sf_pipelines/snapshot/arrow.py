"""Arrow's types: one list of what a source may hold, and the plain form of each.

Writers encode the same values in many ways: dictionaries, views, large offsets, runs. Each column is brought to its
plain form once, so that all other code knows one type for each kind of value.
"""

import binascii
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute

from sf_pipelines.snapshot.errors import SfPipelinesError, SourceSchemaError
from sf_pipelines.snapshot.metric import Float32

# Arrow makes its functions when it is imported, so type checkers see none of them.
compute: Any = pyarrow.compute

_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view)
_UUID = pa.binary(16)


def is_text(kind: pa.DataType) -> bool:
    """Whether values are strings."""
    return any(test(kind) for test in _TEXT)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether values are bytes."""
    return any(test(kind) for test in _BYTES)


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists, of fixed size or not."""
    return pa.types.is_fixed_size_list(kind) or any(test(kind) for test in _LISTS)


def plain_type(kind: pa.DataType, *, uuids: bool = True) -> pa.DataType:  # noqa: PLR0911 - one for each kind
    """The plain form of a type, at any depth.

    Strings, bytes and lists have 32-bit offsets, dictionaries and runs are decoded, float16 is float32, UUIDs and
    columns without any value are text, extension types are what they are stored as, and the zone ``Z`` is ``UTC``.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return pa.string() if kind.extension_name == "arrow.uuid" else plain_type(kind.storage_type, uuids=uuids)
    if isinstance(kind, pa.DictionaryType | pa.RunEndEncodedType):
        return plain_type(kind.value_type, uuids=uuids)
    if is_text(kind) or pa.types.is_null(kind) or (uuids and kind == _UUID):
        return pa.string()
    if is_bytes(kind):
        return pa.binary()
    if isinstance(kind, pa.TimestampType) and kind.tz in {"Z", "z"}:
        return pa.timestamp(kind.unit, "UTC")
    if isinstance(kind, pa.StructType):
        return pa.struct([(field.name, plain_type(field.type, uuids=uuids)) for field in kind])
    if isinstance(kind, pa.MapType):
        return pa.map_(plain_type(kind.key_type, uuids=uuids), plain_type(kind.item_type, uuids=uuids))
    if isinstance(kind, pa.FixedSizeListType):
        return pa.list_(plain_type(kind.value_type, uuids=uuids), kind.list_size)
    if is_list(kind):
        return pa.list_(plain_type(kind.value_type, uuids=uuids))
    return pa.float32() if pa.types.is_float16(kind) else kind


def plain_column(array: pa.Array, *, uuids: bool = True) -> pa.Array:  # noqa: PLR0911 - one for each kind
    """The values in their plain form, see ``plain_type``; without a copy where they have it."""
    column: Any = array
    kind: Any = plain_type(array.type, uuids=uuids)
    if column.type == kind:
        return column
    if isinstance(column, pa.ExtensionArray):
        named = column.type.extension_name == "arrow.uuid"
        return plain_column(column.storage, uuids=uuids or named)
    if pa.types.is_run_end_encoded(column.type):
        return plain_column(compute.run_end_decode(column), uuids=uuids)
    if isinstance(column, pa.DictionaryArray):
        return plain_column(column.dictionary, uuids=uuids).take(column.indices)
    if uuids and column.type == _UUID:
        return _uuid_texts(column)
    if isinstance(column, pa.StructArray):
        fields = [plain_column(column.field(n), uuids=uuids) for n in range(column.type.num_fields)]
        return pa.StructArray.from_arrays(fields, fields=list(kind), mask=column.is_null())
    if isinstance(column, pa.FixedSizeListArray):
        size = column.type.list_size
        inner = plain_column(column.values.slice(column.offset * size, len(column) * size), uuids=uuids)
        return pa.FixedSizeListArray.from_arrays(inner, type=kind, mask=column.is_null())
    if isinstance(column, pa.MapArray):
        offsets, entries = list_parts(column)
        keys, items = (plain_column(entries.field(n), uuids=uuids) for n in range(2))
        return pa.MapArray.from_arrays(offsets, keys, items, type=kind, mask=column.is_null())
    if is_list(column.type):
        offsets, items = list_parts(column)
        return pa.ListArray.from_arrays(offsets, plain_column(items, uuids=uuids), type=kind, mask=column.is_null())
    return column.cast(kind)


def plain_rows(rows: pa.RecordBatch, *, bytes_cols: Collection[str] = ()) -> pa.RecordBatch:
    """A batch of plain columns."""
    columns = []
    for field, column in zip(rows.schema, rows.columns, strict=True):
        with column_errors(field.name):
            columns.append(plain_column(column, uuids=field.name not in bytes_cols))
    return pa.RecordBatch.from_arrays(columns, names=rows.schema.names)


@contextmanager
def column_errors(name: str) -> Iterator[None]:
    """Names the column in whatever Arrow says of its values."""
    try:
        yield
    except SfPipelinesError:
        raise
    except (pa.ArrowException, ValueError, OverflowError, MemoryError) as error:
        raise SourceSchemaError(f"column {name!r} cannot be read: {error}") from error


def list_parts(column: Any) -> tuple[pa.Array, Any]:
    """Offsets of each list and the items of all, without those of nulls; of a map, structs of key and value."""
    if isinstance(column, pa.MapArray):
        # Arrow's own cast gives wrong values where the items are runs.
        ends, nulls = pa.array(column.offsets.to_numpy()), column.is_null()
        parts = [list_parts(pa.ListArray.from_arrays(ends, part, mask=nulls)) for part in (column.keys, column.items)]
        return parts[0][0], pa.StructArray.from_arrays([items for _, items in parts], ["key", "value"])
    lengths = compute.fill_null(compute.list_value_length(column), 0)
    ends = np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)
    return pa.array(np.append(0, ends), pa.int32()), column.flatten()


def hex_texts(column: pa.Array) -> pa.Array:
    """Bytes as lower-case hex digits; a null stays one."""
    # A copy begins at its own data.
    whole: Any = compute.fill_null(column.cast(pa.large_binary()), b"").take(pa.array(np.arange(len(column))))
    _, offsets, data = whole.buffers()
    doubled = 2 * np.frombuffer(offsets, dtype=np.int64)[: len(column) + 1]
    digits = binascii.hexlify(data) if data else b""
    texts = pa.LargeStringArray.from_buffers(len(column), pa.py_buffer(doubled), pa.py_buffer(digits))
    return compute.if_else(column.is_valid(), texts, pa.scalar(None, pa.large_string())).cast(pa.string())


def _uuid_texts(column: pa.Array) -> pa.Array:
    """16 bytes as ``xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx``."""
    parts = r"(.{8})(.{4})(.{4})(.{4})(.{12})"
    return compute.replace_substring_regex(hex_texts(column), parts, r"\1-\2-\3-\4-\5")


def vectors_of(rows: pa.RecordBatch | pa.Table) -> Float32:
    """The vector column as a matrix, shape (rows, dim)."""
    column = rows.column("vector")
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        column = cast("pa.Array", column)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(rows), column.type.list_size)
