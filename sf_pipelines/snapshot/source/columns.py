"""Source columns: which types can be used for what."""

from collections.abc import Callable
from typing import Any, Literal

import pyarrow as pa

from sf_pipelines.snapshot.arrow import compute, is_list, plain_type
from sf_pipelines.snapshot.errors import SourceSchemaError

IdType = Literal["int64", "string"]

_INT64_MAX = 2**63 - 1

# Of plain types.
_SCALARS: tuple[Callable[[pa.DataType], bool], ...] = (
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_string,
    pa.types.is_date,
    pa.types.is_timestamp,
)
_JSON_SCALARS = (*_SCALARS, pa.types.is_time, pa.types.is_decimal, pa.types.is_binary)


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
