from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sf_pipelines.snapshot.errors import QueryError, SourceSchemaError
from sf_pipelines.snapshot.routing.hash import HashRouting, hash_key, hash_keys
from sf_pipelines.snapshot.testing.routing import RowRoutingConformance

# Section 4.1 of the format: key, digest, and shards of 8, 4 and 3.
TABLE: list[tuple[int | str | bytes, int, int, int, int]] = [
    (0, 0xC77B3ABB6F87ACD9, 1, 1, 2),
    (1, 0x2FBC593564DB792E, 6, 2, 2),
    (42, 0xD5A6F8C838DF27C8, 0, 0, 1),
    (-1, 0x5111C7E47D784413, 3, 3, 2),
    (2**63 - 1, 0xA233CF376558DF46, 6, 2, 0),
    ("42", 0x1217CB28C0EF2191, 1, 1, 2),
    (b"42", 0x1217CB28C0EF2191, 1, 1, 2),
    ("hello", 0x9555E8555C62DCFD, 5, 1, 2),
    (b"hello", 0x9555E8555C62DCFD, 5, 1, 2),
    ("é", 0xF7940A006CF10CB3, 3, 3, 0),
    ("", 0x2D06800538D394C2, 2, 2, 1),
    (b"", 0x2D06800538D394C2, 2, 2, 1),
    (b"\x00\xff", 0xA99B043A346C8BF3, 3, 3, 1),
]


class TestHashConforms(RowRoutingConformance):
    def routing(self) -> HashRouting:
        return HashRouting(8)

    def good_rows(self) -> pa.RecordBatch:
        return pa.record_batch({"other": ["x"] * 4, "key": pa.array([0, 1, -1, 2**63 - 1], pa.int64())})

    def bad_rows(self) -> pa.RecordBatch:
        return pa.record_batch({"key": pa.array([None, 2**63, 2**64 - 1], pa.uint64())})

    def bad_schema(self) -> pa.Schema:
        return pa.schema({"key": pa.float64()})

    def bad_contexts(self) -> Iterable[Mapping[str, Any]]:
        return ({}, {"key": 1, "k": 2}, {"key": True}, {"key": 1.0}, {"key": None}, {"key": 2**63}, {"key": "\ud800"})


@pytest.mark.parametrize(("key", "digest", "of_8", "of_4", "of_3"), TABLE)
def test_the_table_of_the_format(key: int | str | bytes, digest: int, of_8: int, of_4: int, of_3: int) -> None:
    assert hash_key(key) == digest
    assert hash_keys(pa.array([key])).tolist() == [digest]
    assert [HashRouting(n).locate({"key": key}) for n in (8, 4, 3)] == [of_8, of_4, of_3]
    rows = pa.record_batch({"key": pa.array([key])})
    assert [HashRouting(n).place(rows).shards.tolist() for n in (8, 4, 3)] == [[of_8], [of_4], [of_3]]


def test_the_series_of_the_format() -> None:
    four = HashRouting(4)
    rows = pa.record_batch({"key": pa.array(range(12))})
    assert four.place(rows).shards.tolist() == [1, 2, 3, 1, 0, 0, 3, 3, 2, 3, 1, 0]
    rows = pa.record_batch({"key": [f"k{n}" for n in range(6)]})
    assert four.place(rows).shards.tolist() == [3, 1, 1, 2, 3, 2]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64()])
def test_integers_of_any_width_are_the_same_key(kind: pa.DataType) -> None:
    assert hash_keys(pa.array([0, 1, 42], kind)).tolist() == [hash_key(0), hash_key(1), hash_key(42)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()])
def test_text_and_bytes_in_any_layout_are_the_same_key(kind: pa.DataType) -> None:
    keys = pa.array(["skipped", "42", "", "é"]).cast(kind)[1:]
    assert hash_keys(keys).tolist() == [hash_key("42"), hash_key(""), hash_key("é")]


def test_dictionaries_and_fixed_size_bytes() -> None:
    rows = pa.record_batch({"key": pa.array(["hello", None, "42"]).dictionary_encode()})
    placed = HashRouting(8).place(rows)
    assert placed.shards.tolist() == [5, -1, 1]
    assert placed.faults == {1: "key is null"}
    assert hash_keys(pa.array([b"42"], pa.binary(2))).tolist() == [hash_key("42")]


def test_a_number_and_its_text_are_different_keys() -> None:
    assert hash_key(42) != hash_key("42")
    assert hash_key(np.int32(42)) == hash_key(42)


def test_faults_name_the_key() -> None:
    rows = pa.record_batch({"key": pa.array([1, 2**63], pa.uint64())})
    placed = HashRouting(8).place(rows)
    assert placed.shards.tolist() == [6, -1]
    assert placed.faults == {1: "key 9223372036854775808 is beyond a signed 64-bit number"}
    with pytest.raises(QueryError, match="not bool"):
        HashRouting(8).locate({"key": True})
    with pytest.raises(SourceSchemaError, match="1 of 2 keys are null"):
        hash_keys(pa.array([1, None]))
    with pytest.raises(SourceSchemaError, match="beyond"):
        hash_keys(pa.array([2**63], pa.uint64()))
    with pytest.raises(SourceSchemaError, match="double"):
        hash_keys(pa.array([1.0]))
