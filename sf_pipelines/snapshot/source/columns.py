"""Source columns: which types can be used for what, and one schema for files whose types differ.

Files of one table differ: by writer, by the values of a day, by the table's history. Differences that lose nothing are
unified by Arrow's permissive promotion, from the footers alone; batches are cast as they are read, each value checked.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import pyarrow as pa

from sf_pipelines.snapshot.arrow import compute, is_bytes, is_list, is_text, plain_column, plain_type
from sf_pipelines.snapshot.errors import SourceSchemaError

IdType = Literal["int64", "string"]

_Test = Callable[[pa.DataType], bool]

_INT64_MAX = 2**63 - 1

# Of plain types.
_SCALARS: tuple[_Test, ...] = (
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_string,
    pa.types.is_date,
    pa.types.is_timestamp,
)
_JSON_SCALARS = (*_SCALARS, pa.types.is_time, pa.types.is_decimal, pa.types.is_binary)
# Types of one family hold each other's values, or a cast that checks each value says which does not fit.
_FAMILIES: tuple[tuple[_Test, ...], ...] = (
    (pa.types.is_integer,),
    (pa.types.is_floating,),
    (pa.types.is_decimal,),
    (is_text,),
    (is_bytes,),
    (pa.types.is_date,),
    (pa.types.is_timestamp,),
    (pa.types.is_time,),
    (pa.types.is_duration,),
)
# Bits of a whole number that a floating-point number of so many bits holds exactly.
_EXACT_BITS = {16: 11, 32: 24, 64: 53}
# Of the widest decimal128.
_DECIMAL_DIGITS = 38
# The same zone by its names.
_UTC = frozenset({"UTC", "Z", "z", "+00:00", "Etc/UTC"})


def id_type_of(field: pa.Field) -> IdType:
    """Type that ids of a column are stored with; raises ``SourceSchemaError`` when it cannot be one."""
    kind = plain_type(field.type)
    if pa.types.is_string(kind):
        return "string"
    if pa.types.is_integer(kind):
        return "int64"
    raise SourceSchemaError(f"id_col {field.name!r} is {field.type}; ids are integers, strings or UUIDs: cast it")


def as_int64(column: pa.Array) -> pa.Array:
    """Whole numbers as int64; null where one is above its largest."""
    if column.type == pa.uint64():
        column = compute.if_else(compute.less_equal(column, pa.scalar(_INT64_MAX, pa.uint64())), column, None)
    return column.cast(pa.int64())


def check_vector_type(field: pa.Field, dim: int) -> None:
    """Raises ``SourceSchemaError`` unless a column holds lists of so many floating-point numbers."""
    kind: Any = plain_type(field.type)
    if not is_list(kind) or not pa.types.is_floating(kind.value_type):
        raise SourceSchemaError(
            f"vector column {field.name!r} is {field.type}; expected a list or fixed-size list of float16, float32 or "
            "float64"
        )
    if pa.types.is_fixed_size_list(kind) and kind.list_size != dim:
        raise SourceSchemaError(
            f"vector column {field.name!r} holds {kind.list_size} numbers, but vector_spec.dim is {dim}"
        )


def require_json(field: pa.Field, option: str) -> None:
    """Raises ``SourceSchemaError`` unless JSON can say a column's values; ``option`` is what names the column."""
    where = f"{option} names {field.name!r}"
    _require_json(plain_type(field.type), f"{where}, which is {field.type}", where)


def _require_json(kind: Any, what: str, where: str) -> None:
    if is_list(kind):
        _require_json(kind.value_type, what, where)
    elif pa.types.is_map(kind):
        _require_json(kind.key_type, what, where)
        _require_json(kind.item_type, what, where)
    elif pa.types.is_struct(kind):
        names = [field.name for field in kind]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise SourceSchemaError(
                f"{where}, which has more than one field {', '.join(map(repr, repeated))}; rename or drop all but one"
            )
        for field in kind:
            _require_json(field.type, what, where)
    elif not any(test(kind) for test in _JSON_SCALARS):
        raise SourceSchemaError(f"{what}; JSON has no {kind}: cast it, to a string or a number for instance")


def require_filter(field: pa.Field, backend: str) -> None:
    """Raises ``SourceSchemaError`` unless a column can be stored beside the vector."""
    kind = plain_type(field.type)
    # SQLite's integers end at int64.
    if not any(test(kind) for test in _SCALARS) or (backend == "sqlite-vec" and kind == pa.uint64()):
        raise SourceSchemaError(
            f"filter_cols names {field.name!r}, which is {field.type}; that type cannot be stored there"
        )


# One schema for all files of a source.


def uniform_type(kind: pa.DataType) -> pa.DataType:
    """The type without what writers differ in: layouts of the same values, names and nullability of inner fields."""
    if _is_odd(kind):
        return plain_type(kind, uuids=False)
    if pa.types.is_list(kind):
        kind = pa.list_(uniform_type(kind.value_type))
    elif pa.types.is_large_list(kind):
        kind = pa.large_list(uniform_type(kind.value_type))
    elif pa.types.is_fixed_size_list(kind):
        kind = pa.list_(uniform_type(kind.value_type), kind.list_size)
    elif pa.types.is_struct(kind):
        kind = pa.struct([pa.field(field.name, uniform_type(field.type)) for field in kind])
    elif pa.types.is_map(kind):
        kind = pa.map_(uniform_type(kind.key_type), uniform_type(kind.item_type))
    return kind


def _is_odd(kind: pa.DataType) -> bool:
    """Whether a type has parts that Arrow's casts do not take, or, as list views, take wrongly."""
    tests = (pa.types.is_run_end_encoded, pa.types.is_list_view, pa.types.is_large_list_view, pa.types.is_string_view)
    if isinstance(kind, pa.BaseExtensionType) or pa.types.is_binary_view(kind) or any(test(kind) for test in tests):
        return True
    return any(_is_odd(kind.field(n).type) for n in range(kind.num_fields))


def wider_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds all values of two uniform types; None where that would lose something.

    A wider type may lack room for some values (uint64 beside int64): reading them is an error, never another value.
    """
    wider = None
    if one == other or pa.types.is_null(other):
        wider = one
    elif pa.types.is_null(one):
        wider = other
    elif pa.types.is_dictionary(one) or pa.types.is_dictionary(other):
        wider = wider_type(*(kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (one, other)))
    elif is_list(one) and is_list(other):
        wider = _wider_list(one, other)
    elif pa.types.is_struct(one) and pa.types.is_struct(other):
        wider = _wider_struct(one, other)
    elif pa.types.is_map(one) and pa.types.is_map(other):
        key, item = wider_type(one.key_type, other.key_type), wider_type(one.item_type, other.item_type)
        wider = None if key is None or item is None else pa.map_(key, item)
    else:
        wider = _wider_value(one, other)
    return wider


def _wider_value(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if isinstance(one, pa.TimestampType) and isinstance(other, pa.TimestampType) and {one.tz, other.tz} <= _UTC:
        one, other = (pa.timestamp(kind.unit, "UTC") for kind in (one, other))
    for whole, real in ((one, other), (other, one)):
        if pa.types.is_integer(whole) and pa.types.is_floating(real):
            found = _promoted(whole, real)
            return found if found is not None and whole.bit_width <= _EXACT_BITS[found.bit_width] else None
        if pa.types.is_integer(whole) and pa.types.is_decimal(real):
            # Arrow's own promotion forgets a digit.
            digits = max(real.precision - real.scale, len(str(2**whole.bit_width))) + real.scale
            return pa.decimal128(digits, real.scale) if digits <= _DECIMAL_DIGITS else None
        if is_text(whole) and real == pa.binary(16):
            # UUIDs, as some write them.
            return whole
    for family in _FAMILIES:
        if all(any(test(kind) for test in family) for kind in (one, other)):
            return _promoted(one, other)
    return None


def _promoted(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    try:
        both = pa.unify_schemas([pa.schema({"": one}), pa.schema({"": other})], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None
    return both.field(0).type


def _wider_list(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    items = wider_type(one.value_type, other.value_type)
    sizes = {kind.list_size if pa.types.is_fixed_size_list(kind) else None for kind in (one, other)}
    # Two fixed sizes are two kinds of vectors.
    if items is None or len(sizes - {None}) > 1:
        return None
    size = sizes.pop()
    if size is not None and not sizes:
        return pa.list_(items, size)
    large = pa.types.is_large_list(one) or pa.types.is_large_list(other)
    return pa.large_list(items) if large else pa.list_(items)


def _wider_struct(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    fields: dict[str, pa.DataType] = {}
    for kind in (one, other):
        if len({field.name for field in kind}) < kind.num_fields:
            return None
        for field in kind:
            found = wider_type(fields.get(field.name, pa.null()), field.type)
            if found is None:
                return None
            fields[field.name] = found
    return pa.struct(list(fields.items()))


def fitted(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values as a type that ``wider_type`` gave."""
    if array.type == kind:
        return array
    if _is_odd(array.type):
        array = plain_column(array, uuids=False)
    elif is_text(kind) and array.type == pa.binary(16):
        array = plain_column(array)
    # A cast of inner nullability copies nothing.
    return array if array.type == kind else array.cast(kind)


def stored_name(schema: pa.Schema, name: str) -> str | None:
    """Name in the file of a column that is asked for: its own, or that of the pandas index that is called so."""
    if name in schema.names:
        return name
    for column in _pandas(schema, "columns"):
        if isinstance(column, dict) and column.get("name") == name and column.get("field_name") in schema.names:
            return str(column["field_name"])
    return None


def stored_names(schema: pa.Schema, names: Sequence[str]) -> list[str]:
    """Names in the file of those columns that it has, without repeats."""
    return list(dict.fromkeys(name for name in (stored_name(schema, name) for name in names) if name is not None))


def index_range(schema: pa.Schema, name: str, rows: int) -> range | None:
    """Values of the pandas index ``name`` (``__index_level_0__`` if unnamed) that the file only describes as a range.

    A description for another number of rows than the file has is a leftover of some other tool.
    """
    for level, index in enumerate(_pandas(schema, "index_columns")):
        if not isinstance(index, dict) or index.get("kind") != "range":
            continue
        limits = [index.get(limit) for limit in ("start", "stop", "step")]
        called = f"__index_level_{level}__" if index.get("name") is None else index["name"]
        if called == name and all(isinstance(limit, int) for limit in limits) and limits[2]:
            values = range(*cast("list[int]", limits))
            return values if len(values) == rows else None
    return None


def _pandas(schema: pa.Schema, part: str) -> list[Any]:
    try:
        said = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
    except ValueError:
        # No pandas wrote this, so it says nothing of an index.
        return []
    found = said.get(part) if isinstance(said, dict) else None
    return found if isinstance(found, list) else []
