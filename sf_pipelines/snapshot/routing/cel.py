"""CEL: an expression over columns of the row names its shard (https://cel.dev).

The evaluator returns errors as values; their type tells them from data. Expressions are bounded: the configuration
limits their length, macros (``all``, ``exists``, ``map``, ``filter``…) are switched off, so that work grows with the
length of the expression alone, and results longer than 1,024 bytes are refused.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, AnyStr

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import is_bytes, is_text, plain_column
from sf_pipelines.snapshot.errors import ConfigError, ManifestError, NoShardError, QueryError, SourceSchemaError
from sf_pipelines.snapshot.routing.hash import hash_key
from sf_pipelines.snapshot.routing.protocol import Placement, RowRouting
from sf_pipelines.snapshot.sharding import CelType

if TYPE_CHECKING:
    from cel_expr_python import cel

RoutingValue = int | str | bytes

_LONGEST_RESULT = 1024
# Distinct combinations of values whose shard is cached from batch to batch.
_MOST_CACHED = 100_000
_NO_MACROS = "stdlib:\n  disable_macros: true\n"
_RESULTS: dict[str, type[RoutingValue]] = {"INT": int, "UINT": int, "STRING": str, "BYTES": bytes}
_WHOLE = {"int": (-(2**63), 2**63 - 1), "uint": (0, 2**64 - 1)}
_HEX = "__bytes_hex__"


class CelRouting(RowRouting):
    """An expression's value is the shard's number, or one of ``routing_values``.

    Attributes:
        expr: the expression; ``shard_hash(x)`` is the unsigned hash of an int, uint, string or bytes.
        cel_columns: names that it uses and their CEL types.
        routing_values: value of each shard; None: the value is the shard's number.

    Raises:
        ConfigError: the expression does not compile, or its type is not int, uint, string or bytes; or
            ``routing_values`` are not one for each shard, or of another type than the expression.
    """

    strategy = "cel"

    def __init__(
        self,
        expr: str,
        columns: Mapping[str, CelType],
        num_dbs: int,
        routing_values: Sequence[RoutingValue] | None = None,
    ) -> None:
        self.expr = expr
        self.cel_columns = dict(columns)
        self.columns = tuple(self.cel_columns)
        self.num_dbs = num_dbs
        self.routing_values = None if routing_values is None else tuple(routing_values)
        self._shard_of = None if self.routing_values is None else {v: n for n, v in enumerate(self.routing_values)}
        self._cached: dict[tuple[Any, ...], int | str] = {}
        self._program = _compiled(expr, self.cel_columns)
        self._check_values(_RESULTS[self._program.return_type().name()])

    def __reduce__(self) -> tuple[Any, ...]:
        # A compiled expression cannot be pickled.
        return CelRouting, (self.expr, self.cel_columns, self.num_dbs, self.routing_values)

    def check_schema(self, schema: pa.Schema) -> None:
        for name, cel_type in self.cel_columns.items():
            kind = self._column_type(schema, name)
            if not _fits(kind, cel_type):
                raise SourceSchemaError(
                    f"column {name} has type {kind}, which is no CEL {cel_type}; cast one or the other"
                )

    def place(self, rows: pa.RecordBatch) -> Placement:
        """Shard of each row; the expression is evaluated once per distinct combination of values.

        A row has no shard if a value is null or beyond its CEL type, the evaluation fails, or its result is no shard.
        """
        self.check_schema(rows.schema)
        groups, combinations = _distinct(rows, self.columns)
        found = [self._outcome(values) for values in combinations]
        shards = np.array([-1 if isinstance(one, str) else one for one in found], dtype=np.int32)[groups]
        faults = {row: str(found[groups[row]]) for row in np.flatnonzero(shards < 0).tolist()}
        return Placement(shards, faults)

    def locate(self, context: Mapping[str, Any]) -> int:
        """Shard of the rows with these values, one for each name in ``columns``; see ``_as_cel`` for their types."""
        if set(context) != set(self.columns):
            missing = ", ".join(name for name in self.columns if name not in context)
            unknown = ", ".join(repr(name) for name in context if name not in self.cel_columns)
            raise QueryError(
                f"routing_context must hold {', '.join(self.columns)}"
                + (f"; {missing} is missing" if missing else "")
                + (f"; {unknown} is unknown" if unknown else "")
            )
        values = tuple(context[name] for name in self.columns)
        try:
            self._checked(values)
        except _UnusableValueError as error:
            raise QueryError(f"routing_context: {error}") from error
        found = self._outcome(values)
        if isinstance(found, str):
            raise NoShardError(found)
        return found

    def describe(self) -> dict[str, Any]:
        described = {"sharding_strategy": self.strategy, "cel_expr": self.expr, "cel_columns": dict(self.cel_columns)}
        if self.routing_values is not None:
            described["routing_values"] = [
                {_HEX: value.hex()} if isinstance(value, bytes) else value for value in self.routing_values
            ]
        return described

    def _outcome(self, values: tuple[Any, ...]) -> int | str:
        """Shard of a combination of values, or why it has none."""
        try:
            checked = self._checked(values)
        except _UnusableValueError as error:
            return str(error)
        found = self._cached.get(checked)
        if found is None:
            found = self._evaluate(dict(zip(self.columns, checked, strict=True)))
            size = sum(len(value) for value in checked if isinstance(value, str | bytes))
            if len(self._cached) < _MOST_CACHED and size <= _LONGEST_RESULT:
                self._cached[checked] = found
        return found

    def _checked(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            _as_cel(name, kind, value) for (name, kind), value in zip(self.cel_columns.items(), values, strict=True)
        )

    def _evaluate(self, data: dict[str, Any]) -> int | str:
        answer = self._program.eval(data=data)
        kind, result = answer.type().name(), answer.value()
        given = f"cel_expr {self.expr!r} with {_shown(data)}"
        if kind not in _RESULTS:
            return f"{given} fails: {result}"
        if isinstance(result, bytearray):
            result = bytes(result)
        size = len(result.encode() if isinstance(result, str) else result) if kind in ("STRING", "BYTES") else 0
        if size > _LONGEST_RESULT:
            return f"{given} gives {size} bytes, more than the {_LONGEST_RESULT} that a result may have"
        if self._shard_of is not None:
            shard = self._shard_of.get(result)
            return f"{given} gives {result!r}, which is not among routing_values" if shard is None else shard
        try:
            shard = int(result)
        except ValueError:
            return f"{given} gives {result!r}, which is no shard's number"
        return (
            shard
            if 0 <= shard < self.num_dbs
            else f"{given} gives {shard}, which is not one of the shards 0 to {self.num_dbs - 1}"
        )

    def _check_values(self, result: type[RoutingValue]) -> None:
        if self.routing_values is None:
            return
        if len(self.routing_values) != self.num_dbs:
            raise ConfigError(f"routing_values has {len(self.routing_values)} values for {self.num_dbs} shards")
        for value in self.routing_values:
            if type(value) is not result:
                raise ConfigError(f"routing_values has {value!r}, but cel_expr {self.expr!r} gives {result.__name__}")
        if self._shard_of is not None and len(self._shard_of) != self.num_dbs:
            raise ConfigError("routing_values names a value twice")


def _compiled(expr: str, columns: Mapping[str, CelType]) -> "cel.Expression":
    from cel_expr_python import cel

    kinds = cel.Type
    hashed = [
        cel.Overload(f"shard_hash_{name}", kinds.UINT, [kind], is_member=False, impl=hash_key)
        for name, kind in (("int", kinds.INT), ("uint", kinds.UINT), ("string", kinds.STRING), ("bytes", kinds.BYTES))
    ]
    try:
        env = cel.NewEnv(
            config=cel.NewEnvConfigFromYaml(_NO_MACROS),
            variables={name: getattr(kinds, kind.upper()) for name, kind in columns.items()},
            functions=[cel.FunctionDecl("shard_hash", hashed)],
        )
        program = env.compile(expr)
    except RuntimeError as error:
        raise ConfigError(f"cel_expr {expr!r} does not compile (macros are switched off): {error}") from error
    kind = program.return_type().name()
    if kind not in _RESULTS:
        raise ConfigError(
            f"cel_expr {expr!r} gives {kind.lower()}; its type must be known to be int, uint, string or bytes"
        )
    return program


def _fits(kind: pa.DataType, cel_type: CelType) -> bool:
    if cel_type in ("int", "uint"):
        return pa.types.is_integer(kind)
    if cel_type == "double":
        return pa.types.is_floating(kind) or pa.types.is_integer(kind)
    if cel_type == "bool":
        return pa.types.is_boolean(kind)
    return is_text(kind) if cel_type == "string" else is_bytes(kind)


def _distinct(rows: pa.RecordBatch, names: Sequence[str]) -> tuple[NDArray[np.int64], list[tuple[Any, ...]]]:
    """Index of each row's combination of values, and the combinations."""
    groups = np.zeros(rows.num_rows, dtype=np.int64)
    combinations: list[tuple[Any, ...]] = [()]
    for name in names:
        column = plain_column(rows.column(name), uuids=False).dictionary_encode(null_encoding="encode")
        values = column.dictionary.to_pylist()
        # Both factors are at most the rows of the batch: no overflow.
        groups = groups * len(values) + column.indices.to_numpy(zero_copy_only=False)
        pairs, groups = _dense(groups, len(combinations) * len(values))
        combinations = [(*combinations[pair // len(values)], values[pair % len(values)]) for pair in pairs.tolist()]
    return groups, combinations


def _dense(codes: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The codes of 0 … count - 1 that occur, and the index of each row's code among them."""
    if count > 4 * len(codes) + 1024:
        return np.unique(codes, return_inverse=True)
    # Few possible codes: a table is far faster than a sort.
    used = np.zeros(count, dtype=bool)
    used[codes] = True
    return np.flatnonzero(used), (np.cumsum(used) - 1)[codes]


def _shown(data: Mapping[str, Any]) -> str:
    parts = (f"{name} {value!r}" for name, value in data.items())
    return ", ".join(part if len(part) <= 120 else f"{part[:117]}…" for part in parts)


class _UnusableValueError(ValueError):
    """A value is not of the type that was declared; the message names both."""


def _as_cel(name: str, kind: CelType, value: object) -> Any:
    """A value as the expression takes it.

    An int column takes an int (not a bool or float), uint an int from 0, double a float or an int that it holds
    exactly, string a str, bytes bytes, bool a bool; numpy scalars count as what they hold.
    """
    if value is None:
        raise _UnusableValueError(f"{name} is null")
    plain: Any = value.item() if isinstance(value, np.generic) else value
    if kind in _WHOLE and type(plain) is int:
        low, high = _WHOLE[kind]
        if low <= plain <= high:
            return plain
        raise _UnusableValueError(f"{name} {plain} is beyond CEL's {kind}")
    if kind == "double" and type(plain) in (int, float):
        return _as_double(name, plain)
    if kind == "bool" and type(plain) is bool:
        return plain
    if kind == "bytes" and isinstance(plain, bytes | bytearray | memoryview):
        return _without_nul(name, bytes(plain), b"\0")
    if kind == "string" and isinstance(plain, str):
        try:
            plain.encode()
        except UnicodeEncodeError as error:
            raise _UnusableValueError(f"{name} {plain!r} cannot be written as UTF-8: {error.reason}") from error
        return _without_nul(name, str(plain), "\0")
    raise _UnusableValueError(f"{name} must be a CEL {kind}, not {type(plain).__name__} ({plain!r})")


def _without_nul(name: str, value: AnyStr, nul: AnyStr) -> AnyStr:
    # cel-expr-python 0.1.3 passes on only what precedes the first NUL: two values would look the same.
    if nul in value:
        raise _UnusableValueError(f"{name} {value!r} holds a NUL, at which CEL would cut it off")
    return value


def _as_double(name: str, value: float) -> float:
    try:
        number = float(value)
    except OverflowError as error:
        raise _UnusableValueError(f"{name} {value} is beyond CEL's double") from error
    if not math.isnan(number) and number != value:
        raise _UnusableValueError(f"{name} {value} cannot be held exactly as CEL's double; give a float")
    # Minus zero equals zero, so both must have the same shard.
    return number + 0.0


def decode_routing_values(values: Sequence[Any] | None) -> tuple[RoutingValue, ...] | None:
    """Routing values as a manifest holds them: bytes as ``{"__bytes_hex__": hex}``.

    Raises:
        ManifestError: one is neither a whole number, text nor bytes, or they are of different types or repeated.
    """
    if values is None:
        return None
    found = tuple(_decoded(f"routing_values[{place}]", value) for place, value in enumerate(values))
    if len({type(value) for value in found}) > 1:
        raise ManifestError("routing_values are of different types; they must be all whole numbers, text or bytes")
    if len(set(found)) != len(found):
        raise ManifestError("routing_values names a value twice")
    return found


def _decoded(field: str, value: Any) -> RoutingValue:
    if type(value) in (int, str):
        return value
    if not isinstance(value, dict):
        raise ManifestError(f"{field} is {value!r}; it must be a whole number, text or bytes")
    if list(value) != [_HEX] or not isinstance(value[_HEX], str):
        raise ManifestError(f"{field}: an object with {', '.join(map(repr, value)) or 'nothing'} is no value")
    try:
        return bytes.fromhex(value[_HEX])
    except ValueError as error:
        raise ManifestError(f"{field}: {error}") from error
