"""The sqlite-vec backend: what is stored, what strangers stored, and what is refused."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pyarrow as pa
import pytest

from sf_pipelines.snapshot.config import IndexParams
from sf_pipelines.snapshot.errors import IndexBuildError, IntegrityError, QueryError
from sf_pipelines.snapshot.index import backend_in, backend_named
from sf_pipelines.snapshot.index.key_value import KeyValueShard, write_key_values
from sf_pipelines.snapshot.index.protocol import IndexFamily
from sf_pipelines.snapshot.index.ranking import id_ranks
from sf_pipelines.snapshot.index.scan import MemoryScan
from sf_pipelines.snapshot.index.sqlite_vec import SqliteVecShard, VectorChunks, load_extension
from sf_pipelines.snapshot.metric import DistanceMetric, Float32
from sf_pipelines_tests.snapshots import brute_force, clustered, table_of

DIM = 8
METRICS = (DistanceMetric.COSINE, DistanceMetric.L2)
IN_MEMORY = [pytest.param(True, id="in memory"), pytest.param(False, id="in blocks")]


def build(folder: Path, rows: pa.Table, metric: DistanceMetric = DistanceMetric.L2) -> None:
    SqliteVecShard.build(rows, folder, family=IndexFamily.FLAT, metric=metric, params=IndexParams())


def opened(folder: Path, metric: DistanceMetric = DistanceMetric.L2, in_memory: bool = True) -> SqliteVecShard:
    return SqliteVecShard.open(folder, metric=metric, dim=DIM, in_memory=in_memory)


def database(folder: Path) -> apsw.Connection:
    folder.mkdir(parents=True, exist_ok=True)
    connection = apsw.Connection(str(folder / "shard.db"))
    load_extension(connection)
    return connection


def stock_file(
    folder: Path,
    vectors: Float32,
    id_map: list[tuple[int, str]],
    *,
    metric: str = "l2",
    rowids: list[int] | None = None,
) -> None:
    """Written statement by statement, as other writers of the format do."""
    with database(folder) as connection:
        connection.execute("CREATE TABLE kv (k BLOB PRIMARY KEY, v BLOB NOT NULL) WITHOUT ROWID")
        connection.execute(
            f"CREATE VIRTUAL TABLE vec_index USING vec0(embedding float[{vectors.shape[1]}] distance_metric={metric})"
        )
        connection.execute("CREATE TABLE vec_payloads (rowid INTEGER PRIMARY KEY, payload TEXT NOT NULL)")
        connection.execute("CREATE TABLE vec_id_map (internal_id INTEGER PRIMARY KEY, original_id TEXT NOT NULL)")
        for row, vector in zip(rowids or range(len(vectors)), vectors, strict=True):
            connection.execute("INSERT INTO vec_index (rowid, embedding) VALUES (?, ?)", (row, vector.tobytes()))
        connection.executemany("INSERT INTO vec_id_map VALUES (?, ?)", id_map)
    connection.close()


def as_json(ids: list[Any]) -> list[tuple[int, str]]:
    kinds = {int: "int", str: "str"}
    return [(row, json.dumps({"v": value, "t": kinds[type(value)]})) for row, value in enumerate(ids)]


def test_what_is_stored_is_what_the_format_says(tmp_path: Path) -> None:
    vectors = clustered(3, DIM)
    build(tmp_path, table_of([5, -1, 7], vectors, [None, {"t": "é"}, {}]))
    connection = database(tmp_path)
    rows = connection.execute("SELECT rowid, embedding FROM vec_index ORDER BY rowid").fetchall()
    assert rows == [(n, vectors[n].tobytes()) for n in range(3)]
    ids = connection.execute("SELECT internal_id, original_id FROM vec_id_map ORDER BY 1").fetchall()
    assert [(row, json.loads(str(text))) for row, text in ids] == [
        (0, {"v": 5, "t": "int"}),
        (1, {"v": -1, "t": "int"}),
        (2, {"v": 7, "t": "int"}),
    ]
    payloads = connection.execute("SELECT rowid, payload FROM vec_payloads ORDER BY 1").fetchall()
    assert [(row, json.loads(str(text))) for row, text in payloads] == [(1, {"t": "é"}), (2, {})]
    assert connection.execute("SELECT count(*) FROM kv").get == 0
    assert connection.execute("PRAGMA integrity_check").get == "ok"
    sql = "SELECT sql FROM sqlite_schema WHERE name = 'vec_index'"
    assert connection.execute(sql).get.endswith("USING vec0(embedding float[8] distance_metric=l2)")
    nearest = connection.execute(
        "SELECT rowid, distance FROM vec_index WHERE embedding MATCH ? AND k = 1", (vectors[1].tobytes(),)
    ).fetchall()
    assert nearest == [(1, 0.0)]
    connection.close()


def test_text_ids_are_stored_as_json(tmp_path: Path) -> None:
    ids = ["a", 'b"\\', "c\0d", "é\n", "007"]
    build(tmp_path, table_of(ids, clustered(5, DIM)))
    connection = database(tmp_path)
    texts = connection.execute("SELECT original_id FROM vec_id_map ORDER BY internal_id").fetchall()
    assert [json.loads(str(text)) for (text,) in texts] == [{"v": value, "t": "str"} for value in ids]
    connection.close()


def test_keys_and_vectors_share_a_file(tmp_path: Path) -> None:
    write_key_values(tmp_path, pa.array([b"k"]), pa.array([b"v"]))
    build(tmp_path, table_of([1, 2], np.eye(2, DIM, dtype=np.float32)))
    assert [path.name for path in tmp_path.iterdir()] == ["shard.db"]
    keys, shard = KeyValueShard(tmp_path), opened(tmp_path)
    assert keys.get_many([b"k", b"x"]) == [b"v", None]
    assert shard.search(np.eye(1, DIM, dtype=np.float32), 1).ids.tolist() == [[1]]
    keys.close()
    shard.close()


def test_filter_columns_are_metadata_with_a_column_of_nulls(tmp_path: Path) -> None:
    columns = {
        "flag": pa.array([True, None]),
        "number": pa.array([None, 7], pa.uint32()),
        "share": pa.array([0.5, float("nan")], pa.float32()),
        "text": pa.array(["a text of more than twelve bytes", None]),
        "day": pa.array([None, 365], pa.date32()),
        "moment": pa.array([1_500, None], pa.timestamp("ns")),
        "order": pa.array([1, 2], pa.int8()),
    }
    rows = table_of([1, 2], np.eye(2, DIM, dtype=np.float32))
    for name, values in columns.items():
        rows = rows.append_column(name, values)
    build(tmp_path, rows)
    connection = database(tmp_path)
    names = ", ".join(f'"{name}", "{name}__null"' for name in columns)
    stored = connection.execute("SELECT " + names + " FROM vec_index ORDER BY rowid").fetchall()  # noqa: S608
    assert stored == [
        (1, 0, 0, 1, 0.5, 0, "a text of more than twelve bytes", 0, 0, 1, 1, 0, 1, 0),
        (0, 1, 7, 0, 0.0, 1, "", 1, 365, 0, 0, 1, 2, 0),
    ]
    sql = 'SELECT rowid FROM vec_index WHERE embedding MATCH ? AND k = 2 AND "text__null" = 0 AND share > 0.1'
    assert connection.execute(sql, (np.ones(DIM, "f4").tobytes(),)).fetchall() == [(0,)]
    connection.close()
    assert opened(tmp_path).rows == 2


@pytest.mark.parametrize("in_memory", IN_MEMORY)
def test_ids_of_strangers(tmp_path: Path, in_memory: bool) -> None:
    vectors = np.eye(6, DIM, dtype=np.float32)
    id_map = [
        *as_json([3, "3", "a"]),
        (3, '{"v": "no type"}'),
        (4, '{"v": 12}'),
        (99, '{"v": 1, "t": "int"}'),
    ]
    stock_file(tmp_path, vectors, id_map)
    shard = opened(tmp_path, in_memory=in_memory)
    found = shard.search(vectors, 1).ids[:, 0].tolist()
    assert found == [3, "3", "a", "no type", "12", 5]
    assert [type(value) for value in found] == [int, str, str, str, str, int]
    assert shard.id_type == "mixed"
    assert shard.search(np.zeros((1, DIM), np.float32), 6).ids[0].tolist() == [3, 5, "12", "3", "a", "no type"]
    assert shard.sample(6)[0].tolist() == found
    assert shard.search_raw(vectors, 1).ids[:, 0].tolist() == found


@pytest.mark.parametrize("in_memory", IN_MEMORY)
def test_rows_of_strangers_may_lie_in_any_order_with_gaps(tmp_path: Path, in_memory: bool) -> None:
    vectors = clustered(2100, DIM)
    rowids = np.random.default_rng(0).permutation(5000)[:2100]
    stock_file(tmp_path, vectors, [], rowids=rowids.tolist())
    with database(tmp_path) as connection:
        connection.execute("DELETE FROM vec_index WHERE rowid % 7 = 0")
    connection.close()
    kept = rowids % 7 != 0
    shard, queries = opened(tmp_path, in_memory=in_memory), clustered(9, DIM, seed=2)
    order, scores = brute_force(queries, vectors[kept], DistanceMetric.L2, 12)
    hits = shard.search(queries, 12)
    assert shard.rows == kept.sum()
    assert hits.ids.tolist() == rowids[kept][order].tolist()
    np.testing.assert_allclose(hits.distances, scores, rtol=1e-6)
    np.testing.assert_array_equal(shard.vectors(hits.rows[0]), vectors[kept][order[0]])


@pytest.mark.parametrize("in_memory", IN_MEMORY)
@pytest.mark.parametrize("metric", DistanceMetric)
def test_zero_and_nan_rows_of_strangers_harm_no_answer(tmp_path: Path, metric: DistanceMetric, in_memory: bool) -> None:
    vectors = clustered(40, DIM)
    vectors[3], vectors[5], vectors[9, 2] = 0, np.nan, np.inf
    stock_file(tmp_path, vectors, as_json(list(range(40))), metric="cosine")
    finite = np.isfinite(vectors).all(axis=1)
    shard, queries = opened(tmp_path, metric, in_memory=in_memory), clustered(4, DIM, seed=1)
    order, scores = brute_force(queries, vectors[finite], metric, 38)
    hits = shard.search(queries, 40)
    assert hits.counts.tolist() == [38] * 4
    assert hits.ids[:, :38].tolist() == np.flatnonzero(finite)[order].tolist()
    np.testing.assert_allclose(hits.distances[:, :38] + metric.score_of_zero, scores, rtol=1e-6, atol=1e-9)
    assert (hits.counts <= 40).all()
    assert not set(shard.search_raw(queries, 40).ids[0].tolist()) & {3, 5} - {0}


@pytest.mark.parametrize("in_memory", IN_MEMORY)
def test_repeated_ids_of_strangers_do_not_crowd_out_others(tmp_path: Path, in_memory: bool) -> None:
    vectors = np.concatenate([np.tile(np.eye(1, DIM, dtype=np.float32), (6, 1)), np.eye(4, DIM, dtype=np.float32)[1:]])
    stock_file(tmp_path, vectors, as_json([1] * 6 + [2, 3, 4]))
    assert set(opened(tmp_path, in_memory=in_memory).search(vectors[:1], 3).ids[0].tolist()) >= {1, 2, 3}


def test_blocks_and_memory_agree_over_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sf_pipelines.snapshot.index.sqlite_vec._BLOCK_BYTES", 1)
    vectors, queries = clustered(5000, DIM), clustered(30, DIM, seed=1)
    vectors[4000:] = vectors[:1000]
    build(tmp_path, table_of([f"x{n}" for n in range(5000)], vectors))
    whole, blocks = opened(tmp_path).search(queries, 25), opened(tmp_path, in_memory=False).search(queries, 25)
    assert whole.ids.tolist() == blocks.ids.tolist()
    assert whole.distances.tolist() == blocks.distances.tolist()
    assert whole.rows.tolist() == blocks.rows.tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_raw_scores_are_those_of_the_extension(tmp_path: Path, metric: DistanceMetric) -> None:
    vectors, queries = clustered(300, DIM), clustered(5, DIM, seed=1)
    build(tmp_path, table_of(list(range(300)), vectors), metric)
    shard = opened(tmp_path, metric)
    exact, raw = shard.search(queries, 10), shard.search_raw(queries, 10)
    expected = np.sqrt(exact.distances) if metric is DistanceMetric.L2 else exact.distances
    np.testing.assert_allclose(raw.distances, expected, rtol=1e-4, atol=1e-6)
    assert shard.search(queries, 5000).counts.tolist() == [300] * 5
    with pytest.raises(QueryError, match="top_k 4097 is more than 4096"):
        shard.search_raw(queries, 4097)


def test_building_refuses_what_cannot_be_searched(tmp_path: Path) -> None:
    vectors = clustered(4, DIM)
    with pytest.raises(IndexBuildError, match="no metric dot_product; it has cosine, l2"):
        build(tmp_path, table_of([1, 2, 3, 4], vectors), DistanceMetric.DOT_PRODUCT)
    vectors[2, 1] = np.nan
    with pytest.raises(
        IndexBuildError, match="1 rows, the first with id 3: the vector has a number that is not finite"
    ):
        build(tmp_path, table_of([1, 2, 3, 4], vectors))
    vectors[2] = 0
    with pytest.raises(IndexBuildError, match="the first with id 3: a zero vector has no direction"):
        build(tmp_path, table_of([1, 2, 3, 4], vectors), DistanceMetric.COSINE)
    build(tmp_path, table_of([1, 2, 3, 4], vectors))
    with pytest.raises(IndexBuildError, match="vec_index"):
        build(tmp_path, table_of([1, 2, 3, 4], vectors))
    assert opened(tmp_path).rows == 4
    odd = table_of([1], vectors[:1]).append_column("a, b", pa.array([1]))
    with pytest.raises(IndexBuildError, match="filter column 'a, b' cannot be"):
        build(tmp_path / "odd", odd)


# Files of strangers.


def _run(*statements: str) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        connection = database(folder)
        for statement in statements:
            connection.execute(statement)
        connection.close()

    return tamper


def _schema(find: str, replace: str) -> Callable[[Path], None]:
    return _run(
        "PRAGMA writable_schema = ON",
        f"UPDATE sqlite_schema SET sql = replace(sql, '{find}', '{replace}')",  # noqa: S608
        "PRAGMA writable_schema = OFF",
    )


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        path = folder / "shard.db"
        path.write_bytes(change(path.read_bytes()))

    return tamper


_ENDLESS = (
    "CREATE VIEW vec_id_map AS WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n) "
    "SELECT i AS internal_id, '1' AS original_id FROM n"
)
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "id map is a view": (
        _run("DROP TABLE vec_id_map", _ENDLESS),
        "holds the view 'vec_id_map'",
    ),
    "any view": (_run("CREATE VIEW other AS SELECT 1"), "holds the view 'other'"),
    "trigger": (
        _run("CREATE TRIGGER t AFTER INSERT ON kv BEGIN SELECT 1; END"),
        "holds the trigger 't'",
    ),
    "index on an expression": (
        _run("CREATE INDEX i ON vec_id_map (lower(original_id))"),
        "holds the index 'i'",
    ),
    "virtual table for a plain one": (
        _run("DROP TABLE vec_payloads", "CREATE VIRTUAL TABLE vec_payloads USING fts5(payload)"),
        "'vec_payloads' is a virtual table",
    ),
    "computed column": (
        _run(
            "DROP TABLE vec_id_map",
            "CREATE TABLE vec_id_map (internal_id INTEGER PRIMARY KEY, original_id TEXT AS (hex(internal_id)))",
        ),
        "original_id TEXT (computed)",
    ),
    "table missing": (_run("DROP TABLE vec_payloads"), "'vec_payloads' is missing"),
    "no vectors": (_run("DROP TABLE vec_index"), "no virtual table 'vec_index'"),
    "other columns": (
        _run("ALTER TABLE vec_payloads RENAME COLUMN payload TO p"),
        "'vec_payloads' has columns rowid INTEGER PRIMARY KEY, p TEXT; expected",
    ),
    "another dimension": (_schema("float[8]", "float[9]"), "holds 9 numbers, the manifest says 8"),
    "another module": (_schema("USING vec0", "USING fts5"), "declared in a way no shard does"),
    "bits": (_schema("float[8]", "bit[8]"), "declared in a way no shard does"),
    "more columns": (
        _schema("distance_metric=l2", "distance_metric=l2, +more text"),
        "declared in a way no shard does",
    ),
    "short chunk": (_run("UPDATE vec_index_vector_chunks00 SET vectors = zeroblob(64)"), "chunk 1 of 'vec_index' is"),
    "long chunk": (
        _run("UPDATE vec_index_vector_chunks00 SET vectors = zeroblob(9999999)"),
        "chunk 1 of 'vec_index' is",
    ),
    "chunk of text": (
        _run("UPDATE vec_index_vector_chunks00 SET vectors = CAST(vectors AS TEXT)"),
        "chunk 1 of 'vec_index' is",
    ),
    "chunk without vectors": (_run("DELETE FROM vec_index_vector_chunks00"), "chunk 1 of 'vec_index' is"),
    "short bitmap": (_run("UPDATE vec_index_chunks SET validity = x'ff'"), "chunk 1 of 'vec_index' is"),
    "short row numbers": (_run("UPDATE vec_index_chunks SET rowids = x'00'"), "chunk 1 of 'vec_index' is"),
    "huge chunk size": (
        _run("UPDATE vec_index_chunks SET size = 1 << 60"),
        "has chunks of 1152921504606846976 vectors",
    ),
    "chunk size is text": (_run("UPDATE vec_index_chunks SET size = 'x'"), "has chunks of 'x' vectors"),
    "row twice": (_run("UPDATE vec_index_chunks SET rowids = zeroblob(8192)"), "names a row twice"),
    "id is no JSON": (_run("UPDATE vec_id_map SET original_id = '{'"), "malformed JSON"),
    "id is null": (_run("""UPDATE vec_id_map SET original_id = '{"v": null, "t": "str"}'"""), "no id for row 0"),
    "id is a fraction": (_run("""UPDATE vec_id_map SET original_id = '{"v": 1.5, "t": "int"}'"""), "no id for row 0"),
    "id is half a character": (_run("""UPDATE vec_id_map SET original_id = '{"v": "\\ud800"}'"""), "cannot read"),
    "id says int and is a truth value": (
        _run("""UPDATE vec_id_map SET original_id = '{"v": true, "t": "int"}'"""),
        "no id for row 0",
    ),
    "id says int and is text": (
        _run("""UPDATE vec_id_map SET original_id = '{"v": "7", "t": "int"}'"""),
        "no id for row 0",
    ),
    "text for a row number": (
        _run("DROP TABLE vec_id_map", "CREATE TABLE vec_id_map (internal_id TEXT PRIMARY KEY, original_id TEXT)"),
        "table 'vec_id_map' has columns internal_id TEXT PRIMARY KEY, original_id TEXT; expected internal_id INTEGER",
    ),
    "fractions for row numbers": (
        _run("DROP TABLE vec_id_map", "CREATE TABLE vec_id_map (internal_id REAL PRIMARY KEY, original_id TEXT)"),
        "has columns internal_id REAL PRIMARY KEY",
    ),
    "null for a row number": (
        _run(
            "DROP TABLE vec_id_map",
            "CREATE TABLE vec_id_map (internal_id INTEGER PRIMARY KEY DESC, original_id TEXT)",
            """INSERT INTO vec_id_map VALUES (NULL, '{"v": 1, "t": "int"}')""",
        ),
        "'vec_id_map' names row None",
    ),
    "fraction for a row number": (
        _run(
            "DROP TABLE vec_id_map",
            "CREATE TABLE vec_id_map (internal_id INTEGER PRIMARY KEY DESC, original_id TEXT)",
            """INSERT INTO vec_id_map VALUES (1.5, '{"v": 1, "t": "int"}')""",
        ),
        "'vec_id_map' names row 1.5",
    ),
    "text for a payload's row number": (
        _run("DROP TABLE vec_payloads", "CREATE TABLE vec_payloads (rowid TEXT PRIMARY KEY, payload TEXT)"),
        "table 'vec_payloads' has columns rowid TEXT PRIMARY KEY",
    ),
    "many objects": (_run(*(f"CREATE TABLE t{n} (a)" for n in range(501))), "more than 500 objects"),
    "long text in the schema": (
        _run(f"CREATE TABLE t ({', '.join(f'c{n}' for n in range(2000))} {'x' * 9000})"),
        "'t'",
    ),
    "truncated": (_bytes(lambda data: data[: len(data) // 3]), ""),
    "header only": (_bytes(lambda data: data[:16]), ""),
    "empty": (_bytes(lambda _: b""), "is no SQLite database"),
    "something else": (_bytes(lambda _: b"PK" + b"\0" * 5000), "is no SQLite database"),
    "noise": (_bytes(lambda data: data[:100] + os.urandom(len(data) - 100)), ""),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(30)
def test_files_that_are_no_shards_are_refused(tmp_path: Path, name: str) -> None:
    stock_file(tmp_path, clustered(20, DIM), as_json(list(range(20))))
    opened(tmp_path).close()
    tamper, message = HOSTILE[name]
    tamper(tmp_path)
    with pytest.raises(IntegrityError) as caught:
        opened(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.timeout(120)
def test_damaged_bytes_give_an_answer_or_a_typed_error(tmp_path: Path) -> None:
    vectors = clustered(1100, DIM)
    stock_file(tmp_path, vectors, as_json([f"x{n}" for n in range(1100)]))
    path = tmp_path / "shard.db"
    data, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        broken = bytearray(data)
        for at in rng.integers(100, len(data), 40):
            broken[at] = rng.integers(256)
        path.write_bytes(bytes(broken))
        try:
            shard = opened(tmp_path)
            hits = shard.search(vectors[:2], 5)
            shard.payloads(hits.rows[0])
            shard.search_raw(vectors[:2], 5)
            shard.close()
        except IntegrityError:
            refused += 1
    assert refused > 0


def test_opening_writes_nothing(tmp_path: Path) -> None:
    build(tmp_path, table_of([1, 2], np.eye(2, DIM, dtype=np.float32)))
    path = tmp_path / "shard.db"
    before = path.read_bytes()
    path.chmod(0o400)
    tmp_path.chmod(0o500)
    shard = opened(tmp_path)
    shard.search_raw(np.eye(1, DIM, dtype=np.float32), 1)
    with pytest.raises(IntegrityError, match="readonly database"):
        shard._file.query("DELETE FROM kv")
    shard.close()
    tmp_path.chmod(0o700)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["shard.db"]


def test_no_extension_can_be_loaded_by_a_query(tmp_path: Path) -> None:
    build(tmp_path, table_of([1, 2], np.eye(2, DIM, dtype=np.float32)))
    shard = opened(tmp_path)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="not authorized"):
            shard._file.query("SELECT load_extension('vec0')")
        shard.search_raw(np.eye(1, DIM, dtype=np.float32), 1)


def test_the_folder_says_which_library_wrote_it(tmp_path: Path) -> None:
    rows = table_of([1, 2], np.eye(2, DIM, dtype=np.float32))
    lance, options = backend_named("lancedb"), {"family": IndexFamily.FLAT, "metric": DistanceMetric.L2}
    with pytest.raises(IntegrityError, match="nothing holds no index"):
        backend_in(tmp_path / "nothing")
    build(tmp_path / "file", rows)
    assert backend_in(tmp_path / "file").name == "sqlite-vec"
    lance.build(rows, tmp_path / "lance", params=IndexParams(), **options)
    assert backend_in(tmp_path / "lance").name == "lancedb"
    lance.build(rows, tmp_path / "both" / lance.subfolder, params=IndexParams(), **options)
    write_key_values(tmp_path / "both", pa.array([b"k"]), pa.array([b"v"]))
    assert backend_in(tmp_path / "both").name == "lancedb"
    build(tmp_path / "lance", rows)
    with pytest.raises(IntegrityError, match="more than one index"):
        backend_in(tmp_path / "lance")


@pytest.mark.parametrize("metric", DistanceMetric)
@pytest.mark.parametrize("size", [1e-12, 1e15, 1e19, 1e30, 1e38])
def test_a_scan_is_right_for_numbers_of_any_size(size: float, metric: DistanceMetric) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = (size * rng.uniform(-1, 1, (n, DIM)).astype(np.float32) for n in (60, 4))
    hits = MemoryScan(pa.array(np.arange(60)), np.arange(60), vectors, metric).search(queries, 5)
    order, scores = brute_force(queries, vectors, metric, 5)
    assert hits.ids.tolist() == order.tolist()
    np.testing.assert_allclose(hits.distances + metric.score_of_zero, scores, rtol=1e-9)


def test_mixed_values_are_ranked_numbers_first() -> None:
    values = np.array(["b", 10**15, "a", -5, "10", 7, "a", 7], dtype=object)
    ranks = id_ranks(values)
    assert [values[n] for n in np.argsort(ranks, kind="stable")] == [-5, 7, 7, 10**15, "10", "a", "a", "b"]
    assert ranks[2] == ranks[6]
    assert ranks[5] == ranks[7]
    assert id_ranks(np.array([3, -1])).tolist() == [3, -1]
    assert id_ranks(np.array([3, -1], dtype=object)).tolist() == [3, -1]
    assert id_ranks(np.array([], dtype=object)).tolist() == []
    assert np.argsort(id_ranks(np.array(["b", "a"], dtype=object))).tolist() == [1, 0]


# Files whose rows share their values.


def share_a_value(path: Path, table: str, value: bytes, rows: int, *, text: bool) -> None:
    """Fills an empty rowid table of (rowid, value) with rows that all point to the same overflow pages.

    See the file format of SQLite, 1.6: a cell holds the first bytes of its record and the number of the page on
    which the rest begins.
    """
    connection = apsw.Connection(str(path))
    root: Any = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).get
    connection.close()
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[16:18], "big")
    kind = _varint(len(value) * 2 + (13 if text else 12))
    record = bytes([len(kind) + 2, 0]) + kind + value
    least = (size - 12) * 32 // 255 - 23
    local = least + (len(record) - least) % (size - 4)
    local = local if local <= size - 35 else least
    first = len(data) // size + 1
    rest = [record[at : at + size - 4] for at in range(local, len(record), size - 4)]
    for number, part in enumerate(rest):
        following = first + number + 1 if number + 1 < len(rest) else 0
        data += (following.to_bytes(4, "big") + part).ljust(size, b"\0")
    page, end = bytearray(size), size
    for row in range(rows):
        cell = _varint(len(record)) + _varint(row) + record[:local] + first.to_bytes(4, "big")
        end -= len(cell)
        page[end : end + len(cell)] = cell
        page[8 + 2 * row : 10 + 2 * row] = end.to_bytes(2, "big")
    assert end > 8 + 2 * rows, "the rows do not fit into one page"
    page[0], page[3:5], page[5:7] = 13, rows.to_bytes(2, "big"), end.to_bytes(2, "big")
    data[(root - 1) * size : root * size] = page
    data[28:32] = (len(data) // size).to_bytes(4, "big")
    data[92:96] = data[24:28]
    path.write_bytes(bytes(data))


def _varint(number: int) -> bytes:
    out = [number & 0x7F]
    while number := number >> 7:
        out.append(number & 0x7F | 0x80)
    return bytes(reversed(out))


def test_ids_that_share_their_pages_are_refused_before_they_are_read(tmp_path: Path) -> None:
    stock_file(tmp_path, clustered(4, DIM), [])
    value = json.dumps({"v": "x" * 500_000, "t": "str"}).encode()
    share_a_value(tmp_path / "shard.db", "vec_id_map", value, 1, text=True)
    assert opened(tmp_path).sample(1)[0].tolist() == ["x" * 500_000]
    share_a_value(tmp_path / "shard.db", "vec_id_map", value, 4, text=True)
    with pytest.raises(IntegrityError, match="rows share their values: they are larger than the file"):
        opened(tmp_path)


def test_payloads_that_share_their_pages_are_refused(tmp_path: Path) -> None:
    stock_file(tmp_path, clustered(4, DIM), as_json([0, 1, 2, 3]))
    value = json.dumps({"t": "x" * 500_000}).encode()
    share_a_value(tmp_path / "shard.db", "vec_payloads", value, 4, text=True)
    shard = opened(tmp_path)
    assert shard.payloads(np.array([2, 2])) == [{"t": "x" * 500_000}] * 2
    with pytest.raises(IntegrityError, match="rows share their values"):
        shard.payloads(np.arange(4))


def test_threads_on_a_cold_shard_read_its_vectors_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, table_of(list(range(40)), clustered(40, DIM)))
    shard, loads, read = opened(tmp_path), [], VectorChunks.vectors

    def slow(self: VectorChunks, positions: Any) -> Float32:
        loads.append(len(positions))
        time.sleep(0.05)
        return read(self, positions)

    monkeypatch.setattr(VectorChunks, "vectors", slow)
    threads = [threading.Thread(target=shard.search, args=(clustered(1, DIM), 3)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [40]
