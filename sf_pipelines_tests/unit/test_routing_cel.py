from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sf_pipelines.snapshot.errors import ConfigError, ManifestError, QueryError, SourceSchemaError
from sf_pipelines.snapshot.routing.cel import CelRouting, decode_routing_values
from sf_pipelines.snapshot.routing.hash import hash_key
from sf_pipelines.snapshot.sharding import CelType
from sf_pipelines.snapshot.testing.routing import RowRoutingConformance


class TestCelConforms(RowRoutingConformance):
    def routing(self) -> CelRouting:
        return CelRouting('shard_hash(region + ":" + string(tier)) % 8u', {"region": "string", "tier": "int"}, 8)

    def good_rows(self) -> pa.RecordBatch:
        return pa.record_batch({"tier": pa.array([2, 2, 3, 2]), "x": [0] * 4, "region": ["eu", "us", "eu", "eu"]})

    def bad_rows(self) -> pa.RecordBatch:
        return pa.record_batch({"region": [None, "eu"], "tier": pa.array([2, None])})

    def bad_schema(self) -> pa.Schema:
        return pa.schema({"region": pa.int64(), "tier": pa.int64()})

    def bad_contexts(self) -> Iterable[Mapping[str, Any]]:
        return ({}, {"region": "eu"}, {"region": "eu", "tier": 2, "more": 1}, {"region": "eu", "tier": "2"})


class TestCelWithRoutingValuesConforms(RowRoutingConformance):
    def routing(self) -> CelRouting:
        return CelRouting("region", {"region": "string"}, 2, ["eu", "us"])

    def good_rows(self) -> pa.RecordBatch:
        return pa.record_batch({"region": ["eu", "us", "us"], "x": [1, 2, 3]})

    def bad_rows(self) -> pa.RecordBatch:
        return pa.record_batch({"region": [None, "ap", "EU"]})

    def bad_schema(self) -> pa.Schema:
        return pa.schema({"region": pa.binary()})


# Section 4.5 of the format: expression, column types, context, routing values, shard; None: refused.
Row = tuple[str, dict[str, CelType], dict[str, Any], Sequence[int | str] | None, int | None]
TABLE: list[Row] = [
    ("key % 4", {"key": "int"}, {"key": 42}, None, 2),
    ("key % 4", {"key": "int"}, {"key": -3}, None, None),
    ("shard_hash(key) % 8u", {"key": "int"}, {"key": 42}, None, 0),
    ("shard_hash(key) % 8u", {"key": "uint"}, {"key": 42}, None, 0),
    ("shard_hash(key) % 8u", {"key": "string"}, {"key": "hello"}, None, 5),
    ("shard_hash(key) % 8u", {"key": "bytes"}, {"key": b"hello"}, None, 5),
    ("shard_hash(region) % 4u", {"region": "string"}, {"region": "eu"}, None, 3),
    ("shard_hash(region) % 4u", {"region": "string"}, {"region": "us"}, None, 1),
    (
        'shard_hash(region + ":" + string(tier)) % 8u',
        {"region": "string", "tier": "int"},
        {"region": "eu", "tier": 2},
        None,
        6,
    ),
    ("region", {"region": "string"}, {"region": "us"}, ["eu", "us"], 1),
    ("region", {"region": "string"}, {"region": "ap"}, ["eu", "us"], None),
    ("tier", {"tier": "int"}, {"tier": 7}, [5, 7, 9], 1),
    ("int(d)", {"d": "double"}, {"d": 1.9}, None, 1),
]


@pytest.mark.parametrize(("expr", "columns", "context", "values", "shard"), TABLE)
def test_the_table_of_the_format(
    expr: str,
    columns: dict[str, CelType],
    context: dict[str, Any],
    values: Sequence[int | str] | None,
    shard: int | None,
) -> None:
    routing = CelRouting(expr, columns, 8 if values is None else len(values), values)
    kinds = {
        "int": pa.int64(),
        "uint": pa.uint64(),
        "string": pa.string(),
        "bytes": pa.binary(),
        "double": pa.float64(),
    }
    arrays = {name: pa.array([context[name]], kinds[kind]) for name, kind in columns.items()}
    placed = routing.place(pa.record_batch(arrays))
    if shard is None:
        assert placed.shards.tolist() == [-1]
        assert repr(next(iter(context.values()))) in placed.faults[0]
        with pytest.raises(QueryError):
            routing.locate(context)
    else:
        assert placed.shards.tolist() == [shard]
        assert routing.locate(context) == shard


@pytest.mark.parametrize(
    ("expr", "reason"),
    [
        ("shard_hash(region) % 8", "no matching overload for '_%_'"),
        ("nope", "undeclared reference to 'nope'"),
        ("region +", "Syntax error"),
        ("true", "gives bool"),
        ("1.5", "gives double"),
        ("dyn(region)", "gives dyn"),
        ("[region]", "gives list"),
        ("type(region)", "gives type"),
        ("[1, 2].map(x, x)[0]", "macros are switched off"),
        ("[region].exists(r, r == 'eu') ? 0 : 1", "macros are switched off"),
        ("[region].all(r, r == 'eu') ? 0 : 1", "macros are switched off"),
        ("[region].filter(r, r == 'eu').size()", "macros are switched off"),
        ("(" * 40 + "1" + ")" * 40, "recursion"),
    ],
)
def test_expressions_that_are_refused(expr: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CelRouting(expr, {"region": "string"}, 4)
    assert reason in str(caught.value)
    assert expr in str(caught.value)


@pytest.mark.parametrize(
    ("expr", "columns", "context", "reason"),
    [
        ("1 / n", {"n": "int"}, {"n": 0}, "divide by zero"),
        ("n * n", {"n": "int"}, {"n": 2**40}, "integer overflow"),
        ("int(s)", {"s": "string"}, {"s": "x"}, "cannot convert"),
        ("int(d)", {"d": "double"}, {"d": float("nan")}, "out of int64 range"),
        ("string(b)", {"b": "bytes"}, {"b": b"\xff"}, "malformed UTF-8"),
        ("shard_hash(u) % 8u", {"u": "uint"}, {"u": 2**63}, "beyond a signed 64-bit number"),
        ("s", {"s": "string"}, {"s": "x"}, "which is no shard's number"),
        ("n", {"n": "int"}, {"n": 8}, "not one of the shards 0 to 7"),
        ("s + s", {"s": "string"}, {"s": "1" * 600}, "1200 bytes"),
        ("b + b", {"b": "bytes"}, {"b": b"1" * 600}, "1200 bytes"),
    ],
)
def test_an_evaluation_error_is_never_data(
    expr: str, columns: dict[str, CelType], context: dict[str, Any], reason: str
) -> None:
    routing = CelRouting(expr, columns, 8)
    with pytest.raises(QueryError) as caught:
        routing.locate(context)
    assert reason in str(caught.value)
    kinds = {"uint": pa.uint64(), "int": pa.int64()}
    arrays = {name: pa.array([context[name]], kinds.get(columns[name])) for name in columns}
    placed = routing.place(pa.record_batch(arrays))
    assert placed.shards.tolist() == [-1]
    assert reason in placed.faults[0]


def test_an_error_text_among_routing_values_is_still_an_error() -> None:
    text = "INVALID_ARGUMENT: malformed UTF-8 bytes"
    routing = CelRouting("string(b)", {"b": "bytes"}, 2, [text, "x"])
    assert routing.place(pa.record_batch({"b": [b"\xff", b"x"]})).shards.tolist() == [-1, 1]
    with pytest.raises(QueryError, match="fails"):
        routing.locate({"b": b"\xff"})


def test_text_and_bytes_that_are_numbers_name_shards() -> None:
    assert CelRouting("s", {"s": "string"}, 8).locate({"s": "3"}) == 3
    assert CelRouting("b", {"b": "bytes"}, 8).locate({"b": b"5"}) == 5
    assert CelRouting("b", {"b": "bytes"}, 2, [b"\xff", b"x"]).locate({"b": b"\xff"}) == 0


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("int", [0, -1, np.int16(3)], [True, 1.0, "1", b"1", None, 2**63, np.float32(1), np.bool_(True)]),
        ("uint", [0, 2**63 - 1, np.uint64(3)], [-1, True, 1.0, 2**64, None]),
        ("double", [1.0, 1, np.float32(1.5), 2**53], [True, "1", None, 2**53 + 1, 10**400]),
        ("bool", [True, np.bool_(False)], [1, 0, "true", None]),
        ("string", ["x", ""], [b"x", 1, None, "\ud800"]),
        ("bytes", [b"x", bytearray(b"x")], ["x", 1, None]),
    ],
)
def test_types_of_context_values(kind: CelType, good: list[object], bad: list[object]) -> None:
    routing = CelRouting({"bool": "v ? 1 : 0", "bytes": "size(v)"}.get(kind, "v == v ? 1 : 0"), {"v": kind}, 4)
    for value in good:
        assert routing.locate({"v": value}) in (0, 1)
    for value in bad:
        with pytest.raises(QueryError, match="v "):
            routing.locate({"v": value})


def test_missing_and_unknown_names_are_named() -> None:
    routing = CelRouting("a + b", {"a": "int", "b": "int"}, 4)
    with pytest.raises(QueryError, match="must hold a, b; b is missing; 'c' is unknown"):
        routing.locate({"a": 1, "c": 1})


def test_an_unknown_routing_value_is_named() -> None:
    routing = CelRouting("region", {"region": "string"}, 2, ["eu", "us"])
    with pytest.raises(QueryError, match="'ap', which is not among routing_values"):
        routing.locate({"region": "ap"})


@pytest.mark.parametrize(
    ("values", "reason"),
    [(["eu"], "1 values for 2 shards"), ([1, 2], "has 1, but"), (["eu", "eu"], "twice"), (["eu", b"us"], "gives str")],
)
def test_routing_values_that_do_not_fit(values: list[int | str | bytes], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        CelRouting("region", {"region": "string"}, 2, values)


@pytest.mark.parametrize(
    ("cel", "good", "bad"),
    [
        (
            "int",
            [pa.int8(), pa.uint64(), pa.dictionary(pa.int32(), pa.int64())],
            [pa.float32(), pa.bool_(), pa.string()],
        ),
        ("uint", [pa.int64(), pa.uint8()], [pa.float64(), pa.string()]),
        ("double", [pa.float32(), pa.int32()], [pa.bool_(), pa.string()]),
        ("bool", [pa.bool_()], [pa.int8()]),
        ("string", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], [pa.binary(), pa.date32()]),
        ("bytes", [pa.binary(), pa.binary(4)], [pa.string()]),
    ],
)
def test_arrow_types(cel: CelType, good: list[pa.DataType], bad: list[pa.DataType]) -> None:
    routing = CelRouting("1", {"v": cel}, 2)
    for kind in good:
        routing.check_schema(pa.schema({"v": kind}))
    for kind in bad:
        with pytest.raises(SourceSchemaError, match=f"column v has type .*no CEL {cel}"):
            routing.check_schema(pa.schema({"v": kind}))


def test_values_beyond_the_cel_type_are_faults_of_their_rows() -> None:
    rows = pa.record_batch({"n": pa.array([1, 2**63, None], pa.uint64())})
    placed = CelRouting("n % 4", {"n": "int"}, 4).place(rows)
    assert placed.shards.tolist() == [1, -1, -1]
    assert placed.faults == {1: "n 9223372036854775808 is beyond CEL's int", 2: "n is null"}
    rows = pa.record_batch({"n": pa.array([1, -1])})
    assert CelRouting("n % 4u", {"n": "uint"}, 4).place(rows).shards.tolist() == [1, -1]


def test_it_is_evaluated_once_for_each_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    routing = CelRouting("shard_hash(a) % 4u", {"a": "string", "b": "int"}, 4)
    seen: list[dict[str, Any]] = []
    evaluate = CelRouting._evaluate
    monkeypatch.setattr(CelRouting, "_evaluate", lambda self, data: seen.append(data) or evaluate(self, data))
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 5000), rng.integers(0, 7, 5000)
    rows = pa.record_batch({"a": [f"r{n}" for n in a], "b": b})
    placed = routing.place(rows)
    assert placed.shards.tolist() == [hash_key(f"r{n}") % 4 for n in a]
    assert len(seen) == 35
    assert routing.place(rows.slice(100)).shards.tolist() == placed.shards[100:].tolist()
    routing.locate({"a": "r1", "b": 1})
    assert len(seen) == 35


def test_many_distinct_combinations_of_many_columns() -> None:
    rng = np.random.default_rng(1)
    arrays = {name: rng.integers(0, 500, 2000) for name in ("a", "b", "c")}
    routing = CelRouting("(a + b * 3 + c * 5) % 7", {"a": "int", "b": "int", "c": "int"}, 7)
    expected = (arrays["a"] + arrays["b"] * 3 + arrays["c"] * 5) % 7
    assert routing.place(pa.record_batch(arrays)).shards.tolist() == expected.tolist()


def test_minus_zero_routes_like_zero() -> None:
    routing = CelRouting("string(d) == '0' ? 0 : 1", {"d": "double"}, 2)
    for order in ([0.0, -0.0], [-0.0, 0.0]):
        assert routing.place(pa.record_batch({"d": order})).shards.tolist() == [0, 0]
    assert routing.locate({"d": -0.0}) == 0


def test_what_the_manifest_says() -> None:
    plain = CelRouting("n", {"n": "int"}, 2)
    assert plain.describe() == {"sharding_strategy": "cel", "cel_expr": "n", "cel_columns": {"n": "int"}}
    described = CelRouting("b", {"b": "bytes"}, 2, [b"\x00", b"\xff"]).describe()
    assert described["routing_values"] == [{"__bytes_hex__": "00"}, {"__bytes_hex__": "ff"}]


@pytest.mark.parametrize(("kind", "value"), [("bytes", b"eu\x00x"), ("string", "eu\x00x")])
def test_a_value_that_the_library_would_cut_off_has_no_shard(kind: CelType, value: str | bytes) -> None:
    values = (value[:2], value[:1])
    routing = CelRouting("region", {"region": kind}, 2, values)
    placed = routing.place(pa.record_batch({"region": pa.array([value, value[:2]])}))
    assert placed.shards.tolist() == [-1, 0]
    assert "holds a NUL" in placed.faults[0]
    with pytest.raises(QueryError, match="holds a NUL"):
        routing.locate({"region": value})


def test_routing_values_of_a_manifest() -> None:
    assert decode_routing_values(None) is None
    assert decode_routing_values(["eu", "us"]) == ("eu", "us")
    assert decode_routing_values([{"__bytes_hex__": "00ff"}, {"__bytes_hex__": ""}]) == (b"\x00\xff", b"")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1, True], r"routing_values\[1\] is True"),
        ([1.5], "is 1.5"),
        ([None], "is None"),
        ([1, "1"], "different types"),
        (["a", "a"], "twice"),
        ([{"__bytes_hex__": 3}], r"routing_values\[0\]"),
        ([[1]], "must be"),
    ],
)
def test_routing_values_that_are_refused(values: list[Any], reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        decode_routing_values(values)
