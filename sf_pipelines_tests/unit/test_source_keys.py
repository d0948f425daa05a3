"""Keys and values of rows, and shards that columns decide."""

from typing import Any

import pyarrow as pa
import pytest

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError, SourceSchemaError
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.source.contract import RowContract
from sf_pipelines.snapshot.source.files import SourceBatch


def table(keys: pa.Array, **columns: Any) -> pa.RecordBatch:
    vectors = pa.array([[1.0, float(n)] for n in range(len(keys))], pa.list_(pa.float32(), 2))
    return pa.record_batch({"key": keys, "vector": vectors, **columns})


def contract_of(rows: pa.RecordBatch, sharding: dict[str, Any] | None = None, **key_value: Any) -> RowContract:
    fields: dict[str, Any] = {
        "num_dbs": 4,
        "key_value": {"key_col": "key", **(key_value or {"value_cols": ["title"]})},
        "vector_spec": {"dim": 2, "sharding": sharding},
    }
    return Build(WriteConfig(name="n", source="s", store="/t", **fields)).contract(rows.schema)


def rejects(contract: RowContract, rows: pa.RecordBatch) -> list[tuple[str, str]]:
    found = contract.check(SourceBatch(rows, 0, "f", 0)).rejects
    return list(zip(found.column("reason").to_pylist(), found.column("detail").to_pylist(), strict=True))


@pytest.mark.parametrize(
    ("keys", "key_type", "encoding", "ids"),
    [
        (pa.array([5, 2**63 - 1]), "int64", "u64be", [5, 2**63 - 1]),
        (pa.array(["a", "é"]), "string", "utf8", ["a", "é"]),
        (pa.array(["a", "é"]).dictionary_encode(), "string", "utf8", ["a", "é"]),
        (pa.array([b"\xff\x00", b""]), "bytes", "raw", ["ff00", ""]),
        (pa.array([b"ab", b"cd"], pa.binary(2)), "bytes", "raw", ["6162", "6364"]),
    ],
)
def test_the_id_of_a_vector_is_its_key(keys: pa.Array, key_type: str, encoding: str, ids: list[Any]) -> None:
    rows = table(keys, title=pa.array(["one", None]))
    contract = contract_of(rows)
    stored = contract.check(SourceBatch(rows, 0, "f", 0)).stored

    assert contract.keys is not None
    assert (contract.keys.key_type, contract.keys.encoding) == (key_type, encoding)
    assert rejects(contract, rows) == []
    assert stored.column("id").to_pylist() == ids
    assert stored.column("_kv_key").to_pylist() == keys.to_pylist()
    assert stored.column("_kv_value").to_pylist() == [b'{"title":"one"}', b'{"title":null}']


def test_one_column_of_bytes_is_the_value_as_it_is() -> None:
    rows = table(pa.array([1, 2]), blob=pa.array([b"\x00\xff", b""]))
    contract = contract_of(rows, value_col="blob")
    assert contract.check(SourceBatch(rows, 0, "f", 0)).stored.column("_kv_value").to_pylist() == [b"\x00\xff", b""]


def test_a_row_without_value_is_rejected() -> None:
    rows = table(pa.array([1, 2]), blob=pa.array([b"x", None]))
    assert rejects(contract_of(rows, value_col="blob"), rows) == [("null_value", "blob: no value")]


def test_keys_that_the_encoding_cannot_hold_are_rejected() -> None:
    rows = table(pa.array([-1, 0, 2**32]), title=pa.array(["a", "b", "c"]))
    assert rejects(contract_of(rows), rows) == [
        ("key_out_of_range", f"key -1 is not within 0 and {2**63 - 1} (u64be)"),
    ]
    narrow = contract_of(rows, value_cols=["title"], key_encoding="u32be")
    assert [detail for _, detail in rejects(narrow, rows)] == [
        f"key -1 is not within 0 and {2**32 - 1} (u32be)",
        f"key {2**32} is not within 0 and {2**32 - 1} (u32be)",
    ]


@pytest.mark.parametrize(
    ("keys", "encoding", "message"),
    [
        (pa.array([1]), "utf8", "does not fit the keys in 'key', which are int64; use u64be or u32be"),
        (pa.array(["a"]), "u64be", "which are string; use utf8 or raw"),
        (pa.array([1.5]), "auto", "keys are integers, strings or bytes"),
    ],
)
def test_keys_of_a_wrong_type_are_refused(keys: pa.Array, encoding: str, message: str) -> None:
    rows = table(keys, title=pa.array(["a"]))
    with pytest.raises(SourceSchemaError, match=message):
        contract_of(rows, value_cols=["title"], key_encoding=encoding)


def test_keys_that_repeat_are_told_by_the_id() -> None:
    rows = table(pa.array([b"\xff", b"\xff"]), title=pa.array(["a", "b"]))
    assert contract_of(rows).check(SourceBatch(rows, 0, "f", 0)).ids.to_pylist() == ["ff", "ff"]


def test_rows_without_a_shard_are_rejected_with_the_value() -> None:
    rows = table(pa.array([1, 2, 3]), title=pa.array(["eu", "xx", None]))
    sharding = {
        "strategy": "cel",
        "cel_expr": "title",
        "cel_columns": {"title": "string"},
        "routing_values": ["eu", "us", "ap", "sa"],
    }
    contract = contract_of(rows, sharding)
    found = rejects(contract, rows)
    assert [reason for reason, _ in found] == ["no_shard", "no_shard"]
    assert "xx" in found[0][1]
    assert "title" in found[1][1]
    kept = contract.check(SourceBatch(rows, 0, "f", 0)).kept
    assert kept.to_pylist() == [{"id": 1, "shard": 0, "context.title": "eu"}]


def test_explicit_shards_are_checked_on_every_row() -> None:
    rows = pa.record_batch(
        {
            "id": pa.array([1, 2, 3, 4]),
            "vector": pa.array([[1.0, 0.0]] * 4, pa.list_(pa.float32(), 2)),
            "fold": pa.array([3, 4, -1, None]),
        }
    )
    spec: Any = {"dim": 2, "sharding": {"strategy": "explicit", "shard_id_col": "fold"}}
    config = WriteConfig(name="n", source="s", store="/t", num_dbs=4, vector_spec=spec)
    checked = Build(config).contract(rows.schema).check(SourceBatch(rows, 0, "f", 0))
    assert checked.kept.column("shard").to_pylist() == [3]
    assert checked.rejects.column("reason").to_pylist() == ["no_shard"] * 3


def test_an_expression_that_does_not_compile_is_refused_before_any_row_is_read() -> None:
    rows = table(pa.array([1]), title=pa.array(["a"]))
    sharding = {"strategy": "cel", "cel_expr": "title +", "cel_columns": {"title": "string"}}
    with pytest.raises(ConfigError, match="title"):
        contract_of(rows, sharding)


def test_the_id_column_is_the_key_column() -> None:
    fields: dict[str, Any] = {"name": "n", "source": "s", "store": "/t", "num_dbs": 1, "vector_spec": {"dim": 2}}
    key_value: Any = {"key_col": "sku", "value_cols": ["title"]}
    assert WriteConfig(**fields, key_value=key_value).id_col == "sku"
    with pytest.raises(ConfigError, match=r"id_col is 'id', but in a snapshot with keys the id is the key"):
        WriteConfig(**fields, key_value=key_value, id_col="id")
