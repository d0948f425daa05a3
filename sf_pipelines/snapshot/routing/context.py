"""Values that decide a row's shard: in a query's ``routing_context``, in a manifest, as an expression takes them."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, AnyStr

import numpy as np

from sf_pipelines.snapshot.errors import ConfigError, ManifestError
from sf_pipelines.snapshot.sharding import CelType

_HEX = "__bytes_hex__"
_WHOLE = {"int": (-(2**63), 2**63 - 1), "uint": (0, 2**64 - 1)}


class UnusableValueError(ValueError):
    """A value is not of the type that was declared; the message names both."""


def as_cel(name: str, kind: CelType, value: object) -> Any:
    """A value as the expression takes it.

    Args:
        name: the column.
        kind: its declared type.
        value: int, float, bool, str or bytes, or numpy's scalar of one.

    Raises:
        UnusableValueError: it is null, of another type, or too large for it.
    """
    if value is None:
        raise UnusableValueError(f"{name} is null")
    plain: Any = value.item() if isinstance(value, np.generic) else value
    if kind in _WHOLE and type(plain) is int:
        low, high = _WHOLE[kind]
        if low <= plain <= high:
            return plain
        raise UnusableValueError(f"{name} {plain} is beyond CEL's {kind}")
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
            raise UnusableValueError(f"{name} {plain!r} cannot be written as UTF-8: {error.reason}") from error
        return _without_nul(name, str(plain), "\0")
    raise UnusableValueError(f"{name} must be a CEL {kind}, not {type(plain).__name__} ({plain!r})")


def _without_nul(name: str, value: AnyStr, nul: AnyStr) -> AnyStr:
    # cel-expr-python 0.1.3 hands over what stands before the first NUL: two values would be taken for one.
    if nul in value:
        raise UnusableValueError(f"{name} {value!r} holds a NUL, at which CEL would cut it off")
    return value


def _as_double(name: str, value: float) -> float:
    try:
        number = float(value)
    except OverflowError as error:
        raise UnusableValueError(f"{name} {value} is beyond CEL's double") from error
    if not math.isnan(number) and number != value:
        raise UnusableValueError(f"{name} {value} cannot be held exactly as CEL's double; give a float")
    # Minus zero equals zero, so it must also be routed like it.
    return number + 0.0


def encode_value(value: Any) -> Any:
    """A value as JSON holds it: bytes as ``{"__bytes_hex__": hex}``."""
    return {_HEX: bytes(value).hex()} if isinstance(value, bytes | bytearray) else value


def decode_value(value: Any) -> Any:
    """The value that ``encode_value`` was given.

    Raises:
        ValueError: an object that is not of its form.
    """
    if not isinstance(value, dict):
        return value
    if list(value) != [_HEX] or not isinstance(value[_HEX], str):
        raise ValueError(f"an object with {', '.join(map(repr, value)) or 'nothing'} is no value")
    return bytes.fromhex(value[_HEX])


def encode_context(context: Mapping[str, Any]) -> str:
    """A routing context as JSON text, names sorted.

    Raises:
        ConfigError: a value is none of int, float, bool, str, bytes.
    """
    plain: dict[str, Any] = {}
    for name, value in context.items():
        one = value.item() if isinstance(value, np.generic) else value
        if not isinstance(one, int | float | str | bytes | bytearray):
            raise ConfigError(f"routing context: {name} is {type(one).__name__}; use int, float, bool, str or bytes")
        plain[name] = encode_value(one)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def decode_context(text: str) -> dict[str, Any]:
    """The routing context that ``encode_context`` was given.

    Raises:
        ConfigError: the text is no such JSON object.
    """
    try:
        found = json.loads(text)
        context = {name: decode_value(value) for name, value in found.items()} if isinstance(found, dict) else None
    except ValueError as error:
        raise ConfigError(f"routing context {text!r} cannot be read: {error}") from error
    if context is None:
        raise ConfigError(f"a routing context is a JSON object, not {text!r}")
    return context


def decode_routing_values(values: Sequence[Any] | None) -> tuple[int | str | bytes, ...] | None:
    """Routing values as a manifest holds them.

    Raises:
        ManifestError: one is neither a whole number, text nor bytes, or they are of different types or repeated.
    """
    if values is None:
        return None
    found: list[int | str | bytes] = []
    for place, value in enumerate(values):
        try:
            one = decode_value(value)
        except ValueError as error:
            raise ManifestError(f"routing_values[{place}]: {error}") from error
        if type(one) not in (int, str, bytes):
            raise ManifestError(f"routing_values[{place}] is {one!r}; it must be a whole number, text or bytes")
        found.append(one)
    if len({type(one) for one in found}) > 1:
        raise ManifestError("routing_values are of different types; they must be all whole numbers, text or bytes")
    if len(set(found)) != len(found):
        raise ManifestError("routing_values names a value twice")
    return tuple(found)
