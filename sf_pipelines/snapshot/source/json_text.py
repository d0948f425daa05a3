"""Columns as JSON text, whole columns at a time.

Names and values are data here and nothing else: no library reads them as patterns, and nothing depends on the range of
dates or the list of time zones that a library knows.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import column_errors, compute, hex_texts, list_parts, plain_column

# Plain text: a scalar that is made when this module is imported imports pandas.
_NULL = "null"
# Units of a timestamp or time in a second, and the digits of its fraction.
_UNITS = {"s": (1, 0), "ms": (10**3, 3), "us": (10**6, 6), "ns": (10**9, 9)}
_DAY = 86_400
# Days since 1970 of the years 1 to 9999.
_FIRST_DAY, _LAST_DAY = -719_162, 2_932_896
_OFFSET = re.compile(r"([+-])(\d\d):?(\d\d)")


def json_objects(rows: pa.RecordBatch, names: Sequence[str]) -> pa.Array:
    """One JSON object of these columns for each row, as strings.

    Numbers that JSON cannot say are null. Dates and times are ISO 8601, with their zone's offset; years beyond 9999
    have a sign. Decimals are strings, bytes hex digits, maps objects (lists of pairs where the keys are no strings).
    """
    texts = []
    for name in names:
        with column_errors(name):
            texts.append(_texts(plain_column(rows.column(name))))
    return _objects(names, texts, len(rows))


def _objects(names: Sequence[str], texts: Sequence[pa.Array], rows: int) -> pa.Array:
    """Objects of these members, whose values are JSON already."""
    if not names:
        return pa.array(["{}"] * rows, pa.string())
    parts: list[Any] = []
    for place, (name, column) in enumerate(zip(names, texts, strict=True)):
        lead = "{" if place == 0 else ","
        parts += [pa.scalar(f"{lead}{json.dumps(name, ensure_ascii=False)}:", pa.string()), column]
    return _joined(*parts, "}")


def _texts(column: Any) -> pa.Array:
    """JSON of each value of a plain column; there are no nulls in it."""
    return compute.fill_null(compute.if_else(column.is_valid(), _values(column), _NULL), _NULL)


def _values(column: Any) -> pa.Array:  # noqa: PLR0911 - one for each kind
    """JSON of each value that is there."""
    kind = column.type
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return column.cast(pa.string())
    if pa.types.is_floating(kind):
        # A whole number stays a float for who reads it.
        text = compute.replace_substring_regex(column.cast(pa.string()), r"^(-?[0-9]+)$", r"\1.0")
        return compute.if_else(compute.is_finite(column), text, _NULL)
    if pa.types.is_string(kind):
        return _joined('"', _escaped(column), '"')
    if pa.types.is_binary(kind):
        return _joined('"', hex_texts(column), '"')
    if pa.types.is_decimal(kind):
        return _joined('"', column.cast(pa.string()), '"')
    if pa.types.is_temporal(kind):
        return _joined('"', time_texts(column), '"')
    if pa.types.is_struct(kind):
        names = [kind.field(n).name for n in range(kind.num_fields)]
        return _objects(names, [_texts(column.field(n)) for n in range(len(names))], len(column))
    return _list_values(column)


def _list_values(column: Any) -> pa.Array:
    """JSON of lists, and of maps: objects where the keys are strings, else lists of pairs."""
    offsets, items = list_parts(column)
    if not pa.types.is_map(column.type):
        return _joined("[", _by_list(offsets, _texts(items)), "]")
    keys, values = _texts(items.field(0)), _texts(items.field(1))
    if pa.types.is_string(column.type.key_type):
        return _joined("{", _by_list(offsets, _joined(keys, ":", values)), "}")
    return _joined("[", _by_list(offsets, _joined("[", keys, ",", values, "]")), "]")


def _by_list(offsets: pa.Array, texts: pa.Array) -> pa.Array:
    return compute.binary_join(pa.ListArray.from_arrays(offsets, texts), ",")


def _joined(*parts: Any) -> pa.Array:
    return compute.binary_join_element_wise(*parts, "")


def _escaped(column: Any) -> pa.Array:
    """Strings with JSON's escapes; only characters that occur are replaced."""
    data = column.buffers()[2]
    if data is None or not len(column):
        return column
    offsets = np.frombuffer(column.buffers()[1], dtype=np.int32)[column.offset : column.offset + len(column) + 1]
    raw = bytes(memoryview(data)[offsets[0] : offsets[-1]])
    # The backslash first: the others' escapes have one.
    for code in (ord("\\"), ord('"'), *range(32)):
        if code in raw:
            column = compute.replace_substring(column, chr(code), json.dumps(chr(code))[1:-1])
    return column


# Dates and times.


def time_texts(column: Any) -> pa.Array:
    """Dates, times and timestamps as ISO 8601, whatever their year; a timestamp without zone has a space for the T."""
    kind = column.type
    masked = column.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_date32(kind):
        return _days(_integers(column), masked)
    if pa.types.is_date64(kind):
        return _days(_integers(column) // (1000 * _DAY), masked)
    per_second, digits = _UNITS[kind.unit]
    days, rest = np.divmod(_integers(column), per_second * _DAY)
    if pa.types.is_time(kind):
        return _clock(rest, digits, masked)
    if kind.tz is None or not kind.tz:
        return _joined(_days(days, masked), " ", _clock(rest, digits, masked))
    seconds = _offsets(kind.tz, days, rest // per_second)
    carried, rest = np.divmod(rest + seconds * per_second, per_second * _DAY)
    days = days + carried
    return _joined(_days(days, masked), "T", _clock(rest, digits, masked), _offset_texts(seconds))


def _integers(column: Any) -> NDArray[np.int64]:
    """What the values are stored as; a null is 0."""
    narrow = column.type.bit_width == 32
    whole = compute.fill_null(column.view(pa.int32() if narrow else pa.int64()), 0)
    return whole.to_numpy(zero_copy_only=False).astype(np.int64)


def _days(days: NDArray[np.int64], masked: NDArray[np.bool_]) -> pa.Array:
    """Dates by days since 1970; before the year 0 and after 9999 with a sign, as ISO 8601 wants it."""
    if ((days >= _FIRST_DAY) & (days <= _LAST_DAY)).all():
        return pa.array(days, pa.int64(), mask=masked).cast(pa.int32()).cast(pa.date32()).cast(pa.string())
    # Arrow's own text ends with the year 32,767.
    texts = pa.array(np.datetime_as_string(days.astype("datetime64[D]")), pa.string(), mask=masked)
    texts = compute.replace_substring_regex(texts, r"^-([0-9]{3})-", r"-0\1-")
    return compute.replace_substring_regex(texts, r"^([0-9]{5,})", r"+\1")


def _clock(rest: NDArray[np.int64], digits: int, masked: NDArray[np.bool_]) -> pa.Array:
    """Times by units since midnight; of the fraction as many groups of three digits as are needed."""
    whole = pa.array(rest, pa.int64(), mask=masked)
    unit: Any = next(unit for unit, (_, places) in _UNITS.items() if places == digits)
    narrow = digits <= 3
    texts = (whole.cast(pa.int32()).cast(pa.time32(unit)) if narrow else whole.cast(pa.time64(unit))).cast(pa.string())
    for pattern, kept in ((r"\.0+$", ""), (r"(\.[0-9]{3})0+$", r"\1"), (r"(\.[0-9]{6})0+$", r"\1"))[: digits // 3]:
        texts = compute.replace_substring_regex(texts, pattern, kept)
    return texts


def _offsets(zone: str, days: NDArray[np.int64], seconds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Seconds that a zone's clocks are ahead of UTC.

    0 in a zone that Arrow does not know: the instant is right all the same. Beyond the years 1 to 9999 a zone has the
    offset that it has at their end.
    """
    fixed = _OFFSET.fullmatch(zone)
    if fixed is not None:
        sign = -1 if fixed[1] == "-" else 1
        return np.full(len(days), sign * (3600 * int(fixed[2]) + 60 * int(fixed[3])), dtype=np.int64)
    near = np.clip(days, _FIRST_DAY, _LAST_DAY) * _DAY + seconds
    try:
        local: Any = compute.local_timestamp(pa.array(near, pa.timestamp("s", zone)))
    except pa.ArrowInvalid:
        return np.zeros(len(days), dtype=np.int64)
    return local.cast(pa.int64()).to_numpy() - near


def _offset_texts(seconds: NDArray[np.int64]) -> pa.Array:
    """Offsets as ``+05:30``; old ones may have seconds."""
    known, places = np.unique(seconds, return_inverse=True)
    texts = []
    for offset in known.tolist():
        minutes, rest = divmod(abs(offset), 60)
        text = f"{'-' if offset < 0 else '+'}{minutes // 60:02d}:{minutes % 60:02d}"
        texts.append(text + (f":{rest:02d}" if rest else ""))
    return pa.array(texts, pa.string()).take(pa.array(places))
