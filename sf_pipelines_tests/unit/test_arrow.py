"""Every encoding of the same values has one plain form, and one JSON."""

import json
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_pipelines.snapshot.arrow import compute, plain_column, plain_rows, plain_type
from sf_pipelines.snapshot.errors import SourceSchemaError
from sf_pipelines.snapshot.source.json_text import json_objects

NAMES = [
    "^price$",
    "*",
    "^.*$",
    "a.b",
    "a b",
    'q"u',
    "it's",
    "[x]",
    "back\\slash",
    "select",
    "nul\0",
    "\n",
    "é\u2028",
    "",
]


def as_json(column: Any, name: str = "x") -> list[Any]:
    rows = pa.record_batch([column], names=[name])
    return [json.loads(text)[name] for text in json_objects(rows, [name]).to_pylist()]


def views(values: list[Any], kind: Any) -> dict[str, Callable[[], pa.Array]]:
    """Encodings of one column that Arrow and Parquet writers use."""
    plain = pa.array(values, kind)
    out = {"plain": lambda: plain, "dictionary": plain.dictionary_encode, "runs": lambda: compute.run_end_encode(plain)}
    if pa.types.is_string(kind):
        out |= {"large": lambda: plain.cast(pa.large_string()), "view": lambda: plain.cast(pa.string_view())}
        out["dictionary of views"] = lambda: pa.DictionaryArray.from_arrays(
            plain.dictionary_encode().indices, plain.dictionary_encode().dictionary.cast(pa.string_view())
        )
    if pa.types.is_binary(kind):
        out |= {"large": lambda: plain.cast(pa.large_binary()), "view": lambda: plain.cast(pa.binary_view())}
    return out


TEXTS, BLOBS, NUMBERS = ["a", None, "é", ""], [b"\x00", None, b"", b"\xff\xfe"], [1, None, -5, 1]
ENCODINGS = [
    pytest.param(make, values, kind, id=f"{kind} {name}")
    for values, kind in ((TEXTS, pa.string()), (BLOBS, pa.binary()), (NUMBERS, pa.int64()))
    for name, make in views(values, kind).items()
]


@pytest.mark.parametrize(("make", "values", "kind"), ENCODINGS)
@pytest.mark.parametrize("nesting", ["none", "slice", "list", "large_list", "list_view", "fixed", "struct", "map"])
def test_every_encoding_has_one_plain_form(
    make: Callable[[], pa.Array], values: list[Any], kind: pa.DataType, nesting: str
) -> None:
    column: Any = make()
    offsets, expected = [0, 1, 1, 4], [values[:1], [], values[1:]]
    if nesting == "slice":
        column, values = column.slice(1), values[1:]
    elif nesting == "list":
        column, values, kind = pa.ListArray.from_arrays(offsets, column), expected, pa.list_(kind)
    elif nesting == "large_list":
        column, values, kind = pa.LargeListArray.from_arrays(offsets, column)[1:], expected[1:], pa.list_(kind)
    elif nesting == "list_view":
        column, kind = pa.ListViewArray.from_arrays([1, 0], [3, 1], column), pa.list_(kind)
        values = [values[1:], values[:1]]
    elif nesting == "fixed":
        column, values = pa.FixedSizeListArray.from_arrays(column, 2)[1:], [values[2:]]
        kind = pa.list_(kind, 2)
    elif nesting == "struct":
        mask = pa.array([False, False, False, True])
        column = pa.StructArray.from_arrays([column], ["f"], mask=mask)[1:]
        values, kind = [*({"f": value} for value in values[1:-1]), None], pa.struct([("f", kind)])
    elif nesting == "map":
        keys = pa.array(["k", "l", "m", "n"], pa.large_string())
        column, kind = pa.MapArray.from_arrays(offsets, keys, column)[1:], pa.map_(pa.string(), kind)
        values = [[], list(zip(keys.to_pylist()[1:], values[1:], strict=True))]

    assert plain_type(column.type) == kind
    plain = plain_column(column)
    plain.validate(full=True)
    assert plain.type == kind
    assert plain.to_pylist() == values
    assert plain_column(plain) is plain


@pytest.mark.parametrize("kind", [pa.uuid(), pa.binary(16)])
def test_uuids_are_text(kind: Any) -> None:
    some = [uuid.UUID(int=n * 2**100 + n) for n in range(5)]
    column = pa.array([some[0].bytes, None, *(one.bytes for one in some[1:])], kind)
    expected = [str(some[0]), None, *map(str, some[1:])]
    assert plain_column(column).to_pylist() == expected
    assert plain_column(column[1:]).to_pylist() == expected[1:]
    assert plain_column(column[1:2]).to_pylist() == [None]
    assert plain_column(column.dictionary_encode() if kind != pa.uuid() else column).to_pylist() == expected


def test_sixteen_bytes_of_a_key_are_bytes() -> None:
    rows = pa.record_batch({"key": pa.array([b"0123456789abcdef"], pa.binary(16))})
    assert plain_rows(rows, bytes_cols=["key"]).column("key").to_pylist() == [b"0123456789abcdef"]


JSON_VALUES: list[tuple[pa.DataType, Any, Any]] = [
    (pa.decimal128(9, 2), Decimal("1.50"), "1.50"),
    (pa.binary(), b"\x00\xff", "00ff"),
    (pa.map_(pa.string(), pa.int64()), [("a", 1), ('q"', None)], {"a": 1, 'q"': None}),
    (pa.map_(pa.int64(), pa.string()), [(1, "a")], [[1, "a"]]),
    (pa.time64("us"), time(1, 2, 3, 5), "01:02:03.000005"),
    (pa.time32("s"), time(1, 2, 3), "01:02:03"),
    (pa.date32(), date(1, 1, 1), "0001-01-01"),
    (pa.date64(), date(2024, 2, 29), "2024-02-29"),
    (pa.uint64(), 2**64 - 1, 2**64 - 1),
    (pa.float64(), 5e-324, 5e-324),
    (pa.float32(), 0.1, 0.1),
    (pa.float64(), -0.0, -0.0),
    (pa.bool_(), True, True),
    (pa.struct([]), {}, {}),
    (pa.struct([("nul\0", pa.int64()), ("^x$", pa.int64())]), {"nul\0": 1, "^x$": 2}, {"nul\0": 1, "^x$": 2}),
    (pa.list_(pa.list_(pa.string())), [["a", None], None, []], [["a", None], None, []]),
]


@pytest.mark.parametrize(("kind", "value", "said"), JSON_VALUES)
def test_values_come_back_from_json(kind: Any, value: Any, said: Any) -> None:
    column = pa.array([value, None, value], kind)
    assert as_json(column) == [said, None, said]
    assert as_json(column[1:]) == [None, said]
    assert isinstance(as_json(column)[0], type(said))


DAY = 86_400
FAR = [
    # What Postgres' infinity, and dates of year 300000, come out as.
    (pa.timestamp("us"), 2**63 - 1, "+294247-01-10 04:00:54.775807"),
    (pa.timestamp("us"), -(2**63), "-290308-12-21 19:59:05.224192"),
    (pa.timestamp("s"), 9_405_061_632_000, "+300004-07-16 00:00:00"),
    (pa.timestamp("ms", "+05:30"), 9_405_061_632_000_000, "+300004-07-16T05:30:00+05:30"),
    (pa.timestamp("us", "Europe/Berlin"), 2**63 - 1, "+294247-01-10T05:00:54.775807+01:00"),
    (pa.timestamp("us", "Z"), 2**63 - 1, "+294247-01-10T04:00:54.775807+00:00"),
    (pa.date32(), 2**31 - 1, "+5881580-07-11"),
    (pa.date32(), -(2**31), "-5877641-06-23"),
    (pa.date32(), -720_000, "-0002-09-16"),
]


@pytest.mark.parametrize(("kind", "number", "text"), FAR)
def test_dates_beyond_python_s_are_text_all_the_same(kind: Any, number: int, text: str) -> None:
    whole = pa.int32() if kind == pa.date32() else pa.int64()
    near, column = pa.array([0], whole), pa.array([number, None], whole)
    assert as_json(column.view(kind)) == [text, None]
    assert as_json(pa.concat_arrays([near, column]).view(kind))[1] == text


ZONES = ["+05:30", "-0800", "Z", "UTC", "Europe/Berlin", "America/St_Johns", "Etc/GMT+5", "+00:00"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29)) | st.none(), max_size=5),  # noqa: DTZ001
    st.sampled_from(ZONES),
    st.sampled_from(["s", "ms", "us"]),
)
def test_zoned_timestamps_are_the_instant(values: list[datetime | None], zone: str, unit: Any) -> None:
    step = {"s": 10**6, "ms": 1000, "us": 1}[unit]
    micros = [None if one is None else (one - datetime(1970, 1, 1)) // timedelta(microseconds=1) for one in values]  # noqa: DTZ001
    whole = [None if one is None else one // step for one in micros]
    found = as_json(pa.array(whole, pa.int64()).view(pa.timestamp(unit, zone)))
    for text, number in zip(found, whole, strict=True):
        if number is None:
            assert text is None
            continue
        read = datetime.fromisoformat(text)
        assert (read - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) == number * step
        if zone == "+05:30":
            assert read.utcoffset() == timezone(timedelta(hours=5, minutes=30)).utcoffset(None)


def test_a_zone_that_nobody_knows_is_still_an_instant() -> None:
    assert as_json(pa.array([0], pa.timestamp("s", "Nowhere/Land"))) == ["1970-01-01T00:00:00+00:00"]


LEAVES = st.sampled_from([pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.null()])
KINDS = st.recursive(
    LEAVES,
    lambda inner: (
        inner.map(pa.list_)
        | inner.map(lambda kind: pa.list_(kind, 2))
        | st.lists(st.tuples(st.sampled_from(NAMES), inner), max_size=3, unique_by=lambda pair: pair[0]).map(pa.struct)
    ),
    max_leaves=5,
)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    if pa.types.is_string(kind):
        some: Any = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    elif pa.types.is_int64(kind):
        some = st.integers(-(2**63), 2**63 - 1)
    elif pa.types.is_floating(kind):
        some = st.floats(allow_nan=False, allow_infinity=False)
    elif pa.types.is_boolean(kind):
        some = st.booleans()
    elif pa.types.is_null(kind):
        some = st.none()
    elif pa.types.is_struct(kind):
        some = st.fixed_dictionaries({field.name: values_of(field.type) for field in kind})
    else:
        size = kind.list_size if pa.types.is_fixed_size_list(kind) else None
        some = st.lists(values_of(kind.value_type), min_size=size or 0, max_size=size or 3)
    return some | st.none()


@settings(max_examples=200, deadline=None)
@given(st.data(), KINDS, st.sampled_from(NAMES), st.integers(0, 2))
def test_what_goes_in_comes_out(data: st.DataObject, kind: Any, name: str, start: int) -> None:
    values = data.draw(st.lists(values_of(kind), min_size=3, max_size=5))
    assert as_json(pa.array(values, kind)[start:], name) == values[start:]


def test_many_columns_in_one_object() -> None:
    rows = pa.record_batch([pa.array([n, None]) for n in range(len(NAMES))], names=NAMES)
    first, second = map(json.loads, json_objects(rows, NAMES).to_pylist())
    assert first == {name: n for n, name in enumerate(NAMES)}
    assert second == dict.fromkeys(NAMES)
    assert list(first) == NAMES


def test_what_arrow_refuses_names_the_column() -> None:
    bad = pa.DictionaryArray.from_arrays(pa.array([5]), pa.array(["a"]), safe=False)
    with pytest.raises(SourceSchemaError, match=r"column '\^x\$' cannot be read: .*[Ii]ndex 5"):
        plain_rows(pa.record_batch([bad], names=["^x$"]))


def test_a_large_column_costs_no_python_per_row() -> None:
    texts = pa.array(np.repeat(np.array(['say "hi"\n', "plain"]), 50_000))
    assert json_objects(pa.record_batch([texts], names=["t"]), ["t"])[0].as_py() == '{"t":"say \\"hi\\"\\n"}'
