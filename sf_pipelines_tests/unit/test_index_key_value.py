"""Keys as bytes, and the table of keys and values."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import apsw
import numpy as np
import pyarrow as pa
import pytest

from sf_pipelines.snapshot.config import KeyEncoding
from sf_pipelines.snapshot.errors import IndexBuildError, IntegrityError, QueryError, ReaderClosedError
from sf_pipelines.snapshot.index.key_value import KeyValueShard, encode_key, encode_keys, key_array, write_key_values

GOOD: list[tuple[Any, KeyEncoding, str]] = [
    (42, "u64be", "000000000000002a"),
    (0, "u64be", "0000000000000000"),
    (2**63 - 1, "u64be", "7fffffffffffffff"),
    (42, "u32be", "0000002a"),
    (2**32 - 1, "u32be", "ffffffff"),
    ("42", "utf8", "3432"),
    ("é", "utf8", "c3a9"),
    ("", "utf8", ""),
    (b"42", "utf8", "3432"),
    ("é", "raw", "c3a9"),
    (b"\x00\xff", "raw", "00ff"),
    (b"\x00\xff", "utf8", "00ff"),
]
BAD: list[tuple[Any, KeyEncoding, str]] = [
    (-1, "u64be", r"key -1 \(int\) is not within 0 and 9223372036854775807"),
    (2**63, "u64be", "is not within"),
    (2**32, "u32be", r"key 4294967296 \(int\) is not within 0 and 4294967295 \(u32be\)"),
    (True, "u64be", "key True is bool; keys of this snapshot are whole numbers"),
    (np.True_, "u64be", "is bool"),
    (1.0, "u64be", r"key 1\.0 is float"),
    ("7", "u64be", "key '7' is str"),
    (b"12345678", "u64be", "is bytes"),
    (None, "u64be", "is NoneType"),
    (7, "utf8", r"key 7 is int; keys of this snapshot are str or bytes \(utf8\)"),
    (7, "raw", "key 7 is int"),
    (None, "raw", "is NoneType"),
    ("\ud800", "utf8", "surrogates not allowed"),
    ("x" * 500, "u32be", "key 'x{79}… is str"),
]


@pytest.mark.parametrize(("key", "encoding", "stored"), GOOD)
def test_a_key_is_stored_as_the_format_says(key: Any, encoding: KeyEncoding, stored: str) -> None:
    assert encode_key(key, encoding).hex() == stored
    assert [value.as_py().hex() for value in encode_keys(pa.array([key, key]), encoding)] == [stored, stored]


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint32, np.uint64])
def test_numbers_of_numpy_are_numbers(kind: type[np.integer]) -> None:
    assert encode_key(kind(42), "u64be") == encode_key(42, "u64be")
    assert encode_keys(pa.array(np.array([42], kind)), "u32be").to_pylist() == [encode_key(42, "u32be")]


@pytest.mark.parametrize(("key", "encoding", "message"), BAD)
def test_a_key_that_cannot_be_stored_is_refused(key: Any, encoding: KeyEncoding, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        encode_key(key, encoding)


@pytest.mark.parametrize(
    ("keys", "encoding", "message"),
    [
        (pa.array([1, -1]), "u64be", r"key -1 \(int64\) is not within"),
        (pa.array([2**63], pa.uint64()), "u64be", "key 9223372036854775808"),
        (pa.array([2**32]), "u32be", "key 4294967296"),
        (pa.array([1, None]), "u64be", "1 of 2 keys are null"),
        (pa.array(["a"]), "u64be", "the keys are string; keys of this snapshot are whole numbers"),
        (pa.array([True]), "u64be", "the keys are bool"),
        (pa.array([1]), "utf8", "the keys are int64; keys of this snapshot are string or binary"),
    ],
)
def test_columns_of_keys_that_cannot_be_stored_are_refused(keys: pa.Array, encoding: KeyEncoding, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        encode_keys(keys, encoding)


@pytest.mark.parametrize("encoding", get_args(KeyEncoding))
def test_a_column_is_encoded_as_its_keys_are(encoding: KeyEncoding) -> None:
    numbers = np.random.default_rng(0).integers(0, 2**32, 1000)
    keys: list[Any] = (
        numbers.tolist() if encoding.startswith("u") and encoding != "utf8" else [f"é{n}" for n in numbers]
    )
    for column in (
        pa.array(keys),
        pa.chunked_array([pa.array(keys[:10]), pa.array(keys[10:])]),
        pa.array([keys[0], *keys])[1:],
    ):
        assert encode_keys(column, encoding).to_pylist() == [encode_key(key, encoding) for key in keys]


def test_keys_of_one_type_become_an_array() -> None:
    assert key_array([1, np.int32(2)]).type == pa.int64()
    assert key_array(["a"]).type == pa.string()
    assert key_array([b"a"]).type == pa.binary()
    assert len(key_array([])) == 0
    for keys in ([1, "a"], [b"a", "a"], [True], [1.5], [None], [2**63], ["\ud800"]):
        with pytest.raises(QueryError, match="keys"):
            key_array(keys)


def write(folder: Path, pairs: dict[bytes, bytes]) -> None:
    write_key_values(folder, pa.array(list(pairs), pa.binary()), pa.array(list(pairs.values()), pa.binary()))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 25_001])
def test_values_come_back_in_the_order_asked(tmp_path: Path, count: int) -> None:
    rng = np.random.default_rng(count)
    pairs = {
        f"k{n}".encode() * (1 + n % 3): rng.bytes(int(rng.integers(0, 60))) for n in rng.permutation(count).tolist()
    }
    write(tmp_path, pairs)
    assert [path.name for path in tmp_path.iterdir()] == ["shard.db"]
    shard = KeyValueShard(tmp_path)
    assert shard.rows == count
    asked = [*reversed(pairs), b"missing", *list(pairs)[:3], b""]
    assert shard.get_many(asked) == [pairs.get(key) for key in asked]
    assert shard.get_many([]) == []
    shard.close()


def test_the_table_is_that_of_the_format(tmp_path: Path) -> None:
    write(tmp_path, {b"b": b"2", b"a": b"", b"\x00\xff": b"\x00"})
    connection = apsw.Connection(str(tmp_path / "shard.db"))
    assert connection.execute("SELECT k, v FROM kv").fetchall() == [(b"\x00\xff", b"\x00"), (b"a", b""), (b"b", b"2")]
    sql = connection.execute("SELECT sql FROM sqlite_schema").get
    assert sql == "CREATE TABLE kv (k BLOB PRIMARY KEY, v BLOB NOT NULL) WITHOUT ROWID"
    assert connection.execute("PRAGMA page_size").get in {4096, 8192, 16384, 32768, 65536}
    connection.close()


def test_writing_refuses_what_cannot_be_found_again(tmp_path: Path) -> None:
    two = pa.array([b"a", b"a"])
    with pytest.raises(IndexBuildError, match=r"UNIQUE constraint failed: kv\.k"):
        write_key_values(tmp_path / "twice", two, two)
    with pytest.raises(IndexBuildError, match=r"2 keys .* and 1 values"):
        write_key_values(tmp_path / "short", two, two[:1])
    with pytest.raises(IndexBuildError, match="1 null"):
        write_key_values(tmp_path / "null", two, pa.array([None, b"a"]))


def test_threads_share_a_shard(tmp_path: Path) -> None:
    pairs = {f"k{n}".encode(): f"v{n}".encode() for n in range(3000)}
    write(tmp_path, pairs)
    shard, wrong = KeyValueShard(tmp_path), []

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            keys = [f"k{n}".encode() for n in rng.integers(0, 4000, 50).tolist()]
            if shard.get_many(keys) != [pairs.get(key) for key in keys]:
                wrong.append(keys)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    shard.close()
    shard.close()
    with pytest.raises(ReaderClosedError):
        shard.get_many([b"k1"])
    with pytest.raises(ReaderClosedError):
        _ = shard.rows


def _run(*statements: str) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        connection = apsw.Connection(str(folder / "shard.db"))
        for statement in statements:
            connection.execute(statement)
        connection.close()

    return tamper


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        path = folder / "shard.db"
        path.write_bytes(change(path.read_bytes()))

    return tamper


_ENDLESS = (
    "CREATE VIEW kv AS WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n) SELECT i AS k, i AS v FROM n"
)
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "view": (_run("DROP TABLE kv", _ENDLESS), "holds the view 'kv'"),
    "trigger": (_run("CREATE TRIGGER t AFTER INSERT ON kv BEGIN SELECT 1; END"), "holds the trigger 't'"),
    "virtual table": (_run("DROP TABLE kv", "CREATE VIRTUAL TABLE kv USING fts5(k, v)"), "'kv' is a virtual table"),
    "index on an expression": (_run("CREATE INDEX i ON kv (hex(k))"), "holds the index 'i'"),
    "computed value": (
        _run("DROP TABLE kv", "CREATE TABLE kv (k BLOB PRIMARY KEY, v BLOB AS (zeroblob(1000000000)))"),
        "v BLOB (computed)",
    ),
    "missing": (_run("DROP TABLE kv"), "'kv' is missing"),
    "other columns": (
        _run("DROP TABLE kv", "CREATE TABLE kv (k BLOB PRIMARY KEY, v BLOB, w)"),
        "has columns k BLOB PRIMARY KEY, v BLOB, w; expected k BLOB PRIMARY KEY, v BLOB",
    ),
    "no key": (
        _run("DROP TABLE kv", "CREATE TABLE kv (k BLOB, v BLOB)"),
        "has columns k BLOB, v BLOB; expected k BLOB PRIMARY KEY",
    ),
    "keys that are text": (
        _run("DROP TABLE kv", "CREATE TABLE kv (k TEXT PRIMARY KEY, v BLOB NOT NULL) WITHOUT ROWID"),
        "table 'kv' has columns k TEXT PRIMARY KEY, v BLOB; expected",
    ),
    "truncated": (_bytes(lambda data: data[:9000]), ""),
    "empty": (_bytes(lambda _: b""), "is no SQLite database"),
    "noise": (_bytes(lambda data: data[:100] + os.urandom(len(data) - 100)), ""),
    "random": (_bytes(lambda data: os.urandom(len(data))), "is no SQLite database"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(30)
def test_files_that_hold_no_keys_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, {f"k{n}".encode(): b"v" * 50 for n in range(2000)})
    tamper, message = HOSTILE[name]
    tamper(tmp_path)

    def use() -> None:
        shard = KeyValueShard(tmp_path)
        shard.get_many([f"k{n}".encode() for n in range(2000)])

    with pytest.raises(IntegrityError) as caught:
        use()
    assert message in str(caught.value)
    with pytest.raises(IntegrityError, match="cannot read"):
        KeyValueShard(tmp_path / "nothing")


def test_a_value_that_is_no_bytes_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {b"a": b"1"})
    _run("UPDATE kv SET v = 'text'")(tmp_path)
    with pytest.raises(IntegrityError, match="'kv' holds values that are str, not bytes"):
        KeyValueShard(tmp_path).get_many([b"a"])
    assert KeyValueShard(tmp_path).get_many([b"b"]) == [None]


@pytest.mark.timeout(30)
def test_a_tree_that_goes_in_circles_is_not_counted_for_ever(tmp_path: Path) -> None:
    pairs = {f"{n:06}".encode(): b"v" * 2000 for n in range(3000)}
    write(tmp_path, pairs)
    path = tmp_path / "shard.db"
    data = bytearray(path.read_bytes())
    page_size = int.from_bytes(data[16:18], "big")
    root = page_size  # page 2: the root of the only table, an interior page of an index tree
    assert data[root] == 2
    cells = int.from_bytes(data[root + 3 : root + 5], "big")
    pointers = [int.from_bytes(data[root + 12 + 2 * n : root + 14 + 2 * n], "big") for n in range(cells)]
    for pointer in pointers[1:]:
        data[root + pointer : root + pointer + 4] = (2).to_bytes(4, "big")
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError):
        _ = KeyValueShard(tmp_path).rows


@pytest.mark.parametrize("few", [0, 8])
def test_values_that_share_their_pages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    """Cells of a table without rowid end with the page on which the rest of the record begins: all get the first's."""
    count = 5
    monkeypatch.setattr("sf_pipelines.snapshot.index.key_value._FEW", few)
    keys = [f"k{n}".encode() for n in range(count)]
    write(tmp_path, dict.fromkeys(keys, b"v" * 100_000))
    path = tmp_path / "shard.db"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[16:18], "big")
    assert KeyValueShard(tmp_path).get_many(keys) == [b"v" * 100_000] * count
    page = data[size : 2 * size]
    assert page[0] == 10
    cells = [int.from_bytes(page[8 + 2 * n : 10 + 2 * n], "big") for n in range(count)]
    ends = [*sorted(cells)[1:], size]
    first = min(int.from_bytes(page[end - 4 : end], "big") for end in ends)
    for end in ends:
        data[size + end - 4 : size + end] = first.to_bytes(4, "big")
    kept = first + -(-100_000 // (size - 4))
    data = data[: kept * size]
    data[28:32] = kept.to_bytes(4, "big")
    data[92:96] = data[24:28]
    path.write_bytes(bytes(data))
    shard = KeyValueShard(tmp_path)
    assert shard.get_many([keys[0]] * 8) == [b"v" * 100_000] * 8
    with pytest.raises(IntegrityError, match="rows share their values"):
        shard.get_many(keys)
