"""Manifests made to hurt: each is a ManifestError that says where, and none takes long."""
# ruff: noqa: S608 - the SQL here is meant to be hostile.

import json
import random
import sqlite3
import time
from contextlib import closing, suppress

import pytest

from sf_pipelines.snapshot.errors import ManifestError
from sf_pipelines.snapshot.manifest import codec
from sf_pipelines.snapshot.manifest.codec import decode_manifest, encode_manifest
from sf_pipelines_tests.snapshots import vector_fields
from sf_pipelines_tests.unit.manifest_samples import PREFIX, rewritten, sabotaged, sample_manifest, shard

META_COLUMNS = (
    "run_id",
    "created_at",
    "num_dbs",
    "s3_prefix",
    "key_col",
    "sharding",
    "db_path_template",
    "shard_prefix",
    "format_version",
    "key_encoding",
    "custom",
)
SHARD_COLUMNS = (
    "db_url",
    "attempt",
    "row_count",
    "db_bytes",
    "min_key",
    "max_key",
    "checkpoint_id",
    "writer_info",
)
ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)"


def refuse(data: bytes, match: str) -> None:
    with pytest.raises(ManifestError, match=match) as caught:
        decode_manifest(data, where="s3://b/p/manifest")
    assert str(caught.value).startswith("manifest s3://b/p/manifest: ")


def with_schema(**changes: str) -> bytes:
    """A sample whose stored schema text was edited: what SQLite itself would never write."""

    def edit(database: sqlite3.Connection) -> None:
        # Read through a named column list, because a table's text may become a view's.
        database.execute("PRAGMA writable_schema = ON")
        for name, sql in changes.items():
            database.execute("UPDATE sqlite_master SET sql = ?, rootpage = 0 WHERE name = ?", (sql, name))

    return rewritten(edit)


@pytest.mark.parametrize("data", [b"", b"SQLite", b"PK\x03\x04" * 100, b"{}", b"SQLite format 2\x00" + bytes(100)])
def test_no_database(data: bytes) -> None:
    refuse(data, "is no SQLite database")


@pytest.mark.parametrize("length", [16, 99, 100, 512, 4096, 6000, 8192])
def test_cut_off(length: int) -> None:
    refuse(encode_manifest(sample_manifest())[:length], "cannot be read as a database of plain tables|has no table")


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_manifest(sample_manifest())
    monkeypatch.setattr(codec, "MAX_MANIFEST_BYTES", len(data) - 1)
    refuse(data, rf"has {len(data)} bytes, more than")


@pytest.mark.parametrize("table", ["build_meta", "shards"])
def test_view_in_place_of_a_table(table: str) -> None:
    columns = ", ".join(f"1 AS {name}" for name in ("db_id", *SHARD_COLUMNS, *META_COLUMNS))
    data = sabotaged(f"DROP TABLE {table}", f"CREATE VIEW {table} AS {ENDLESS} SELECT {columns} FROM n")
    began = time.monotonic()
    refuse(data, f"schema holds 'view' '{table}'")
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("table", ["build_meta", "shards"])
def test_view_dressed_as_a_table(table: str) -> None:
    """The row of sqlite_master says ``table``, its text says ``CREATE VIEW``; SQLite believes the text."""
    columns = ", ".join(f"1 AS {name}" for name in ("db_id", *SHARD_COLUMNS, *META_COLUMNS))
    data = with_schema(**{table: f"CREATE VIEW {table} AS {ENDLESS} SELECT {columns} FROM n"})
    began = time.monotonic()
    refuse(data, "schema holds 'table'|plain tables")
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("CREATE VIEW v AS SELECT 1", "view"),
        ("CREATE TRIGGER t AFTER INSERT ON shards BEGIN SELECT 1; END", "trigger"),
        ("CREATE VIRTUAL TABLE f USING fts5(a)", "(table|virtual)"),
        ("CREATE INDEX i ON shards (abs(row_count))", "index"),
        ("CREATE INDEX i ON shards (row_count)", "index"),
    ],
)
def test_anything_but_tables(statement: str, kind: str) -> None:
    refuse(sabotaged(statement), f"schema holds '{kind}'")


@pytest.mark.parametrize("kind", ["STORED", "VIRTUAL"])
def test_generated_column(kind: str) -> None:
    def edit(database: sqlite3.Connection) -> None:
        columns = ", ".join(SHARD_COLUMNS[1:])
        database.execute("ALTER TABLE shards RENAME TO old")
        database.execute(
            f"CREATE TABLE shards (db_id INTEGER PRIMARY KEY, {columns}, "
            f"db_url TEXT GENERATED ALWAYS AS ('{PREFIX}/' || db_id) {kind})"
        )
        if kind == "VIRTUAL":
            names = f"db_id, {columns}"
            database.execute(f"INSERT INTO shards ({names}) SELECT {names} FROM old")
        database.execute("DROP TABLE old")

    refuse(rewritten(edit), "table shards column 'db_url' is generated")


def test_no_tables() -> None:
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE x (a)")
        data = database.serialize()
    refuse(data, "has no table build_meta")
    refuse(sabotaged("DROP TABLE shards"), "has no table shards")


@pytest.mark.parametrize("column", META_COLUMNS)
def test_missing_meta_column(column: str) -> None:
    refuse(sabotaged(f"ALTER TABLE build_meta DROP COLUMN {column}"), f"table build_meta has no column {column}")


@pytest.mark.parametrize("column", SHARD_COLUMNS)
def test_missing_shard_column(column: str) -> None:
    refuse(sabotaged(f"ALTER TABLE shards DROP COLUMN {column}"), f"table shards has no column {column}")


def test_missing_db_id() -> None:
    data = sabotaged(
        "CREATE TABLE other AS SELECT db_url, attempt, row_count, db_bytes, min_key, max_key, checkpoint_id, "
        "writer_info FROM shards",
        "DROP TABLE shards",
        "ALTER TABLE other RENAME TO shards",
    )
    refuse(data, "table shards has no column db_id")


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, -1])
def test_wrong_version(number: int) -> None:
    refuse(sabotaged(f"UPDATE build_meta SET format_version = {number}"), f"format_version is {number}, must be 4")


def untyped(table: str, column: str, value: object) -> bytes:
    """Puts a value of any type into a column, as a file made with other column types would hold it."""

    def edit(database: sqlite3.Connection) -> None:
        database.execute(f"CREATE TABLE loose AS SELECT * FROM {table}")
        database.execute(f"DROP TABLE {table}")
        names = [row[1] for row in database.execute("PRAGMA table_info(loose)")]
        database.execute(f"CREATE TABLE {table} ({', '.join(names)})")
        database.execute(f"INSERT INTO {table} SELECT * FROM loose")
        database.execute("DROP TABLE loose")
        database.execute(f"UPDATE {table} SET {column} = ?", (value,))

    return rewritten(edit)


@pytest.mark.parametrize(
    ("column", "value", "match"),
    [
        ("run_id", None, "build_meta.run_id"),
        ("run_id", 5, "build_meta.run_id"),
        ("run_id", "", "build_meta.run_id"),
        ("run_id", "r" * 5000, "build_meta.run_id"),
        ("run_id", b"r1", "build_meta.run_id"),
        ("created_at", "yesterday", "build_meta.created_at is no ISO datetime: 'yesterday'"),
        ("created_at", 17, "build_meta.created_at is no text"),
        ("num_dbs", "4", "build_meta.num_dbs"),
        ("num_dbs", 4.0, "build_meta.num_dbs"),
        ("num_dbs", 0, "build_meta.num_dbs"),
        ("num_dbs", -1, "build_meta.num_dbs"),
        ("num_dbs", 2**62, "build_meta.num_dbs"),
        ("num_dbs", 3, "db_id=3: is not below build_meta.num_dbs 3"),
        ("s3_prefix", "", "build_meta.s3_prefix"),
        ("s3_prefix", "/etc", "build_meta.s3_prefix"),
        ("s3_prefix", "s3://other/place", "is not below the manifest's own"),
        ("key_col", None, "build_meta.key_col"),
        ("format_version", "4", "build_meta.format_version is '4'"),
        ("key_encoding", "ascii", "build_meta.key_encoding"),
        ("key_encoding", "u64be", "must be the placeholder"),
        ("sharding", "{", "build_meta.sharding is no JSON"),
        ("sharding", "[]", "build_meta.sharding is JSON of the wrong kind"),
        ("sharding", None, "build_meta.sharding is no text"),
        ("sharding", '{"strategy":"hash"}', "build_meta.sharding.hash_algorithm is missing"),
        ("sharding", '{"strategy":"hash","hash_algorithm":"md5"}', "build_meta.sharding.hash_algorithm"),
        ("sharding", '{"strategy":"cluster","hash_algorithm":"xxh3_64"}', "build_meta.sharding.strategy"),
        ("sharding", '{"hash_algorithm":"xxh3_64","x":1}', "build_meta.sharding.x: unknown field"),
        ("sharding", '{"hash_algorithm":"xxh3_64","cel_expr":"a"}', "strategy 'hash' has no cel_expr"),
        ("sharding", '{"hash_algorithm":"xxh3_64","strategy":"cel"}', "needs cel_expr and cel_columns"),
        ("custom", "[1]", "build_meta.custom is JSON of the wrong kind"),
        ("custom", '{"a":NaN}', "build_meta.custom is no JSON that can be used: holds NaN"),
        ("custom", '{"a":-Infinity}', "holds -Infinity"),
        ("custom", '{"a":1e999}', "holds a number that is too large"),
        ("custom", '{"a":1,"a":2}', "names the key 'a' twice"),
        ("custom", '{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "nests too deeply"),
        ("custom", '{"a":' + "9" * 5000 + "}", "build_meta.custom is no JSON"),
        ("custom", '{"vector":{}}', "custom.vector.dim: Field required"),
        ("custom", '{"vector":7}', "custom.vector"),
        ("custom", '{"vector":null}', "custom.vector is missing"),
        ("custom", b"{}", "build_meta.custom is no text"),
    ],
)
def test_wrong_meta_value(column: str, value: object, match: str) -> None:
    refuse(untyped("build_meta", column, value), match)


@pytest.mark.parametrize(
    ("column", "value", "match"),
    [
        ("db_id", 1, "db_id=1: is there twice"),
        ("db_id", -1, "shards row 0.db_id"),
        ("db_id", 4, "db_id=4: is not below build_meta.num_dbs 4"),
        ("db_id", "0", "shards row 0.db_id"),
        ("db_id", None, "shards row 0.db_id"),
        ("db_url", 5, "shards row 0.db_url"),
        ("db_url", None, "shards row 0: has 10 rows but no db_url"),
        ("db_url", PREFIX + "/" + "x" * 5000, "shards row 0.db_url"),
        ("attempt", -1, "shards row 0.attempt"),
        ("attempt", None, "shards row 0.attempt"),
        ("row_count", -1, "shards row 0.row_count"),
        ("row_count", 2**63 - 1, "shards row 0.row_count"),
        ("row_count", 1.5, "shards row 0.row_count"),
        ("row_count", 11, "custom.sf_pipelines.row_count is 30, but the shards have 33"),
        ("db_bytes", -1, "shards row 0.db_bytes"),
        ("min_key", "k0", "shards row 0 min_key is no JSON"),
        ("min_key", "[1]", "shards row 0 min_key is JSON of the wrong kind"),
        ("max_key", "true", "shards row 0 max_key is JSON of the wrong kind"),
        ("max_key", 4, "shards row 0 max_key is no text"),
        ("checkpoint_id", 9, "shards row 0.checkpoint_id"),
        ("writer_info", "null", "shards row 0 writer_info is JSON of the wrong kind"),
        ("writer_info", None, "shards row 0 writer_info is no text"),
        ("writer_info", '{"a":NaN}', "holds NaN"),
        ("sf_objects", "{", "shards row 0 sf_objects"),
        ("sf_objects", "{}", "shards row 0 sf_objects"),
        ("sf_objects", b"[]", "shards row 0 sf_objects is no text"),
        ("sf_objects", '[{"path":"a","size":1}]', "shards row 0 sf_objects"),
        ("sf_objects", '[{"path":"a","size":-1,"sha256":"' + "a" * 64 + '"}]', "shards row 0 sf_objects"),
        ("sf_objects", '[{"path":"a","size":NaN,"sha256":"' + "a" * 64 + '"}]', "shards row 0 sf_objects"),
        ("sf_objects", '[{"path":"a","size":1,"sha256":"' + "a" * 64 + '\\n"}]', "shards row 0 sf_objects"),
    ],
)
def test_wrong_shard_value(column: str, value: object, match: str) -> None:
    refuse(untyped("shards", column, value), match)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../x", "a//b", "a/", "a\\b", "a%2f..", "", ".", "a\nb"])
def test_objects_outside_of_their_shard(path: str) -> None:
    text = json.dumps([{"path": path, "size": 1, "sha256": "a" * 64}])
    refuse(untyped("shards", "sf_objects", text), "shards row 0 sf_objects")


def test_one_object_twice() -> None:
    item = {"path": "a", "size": 1, "sha256": "a" * 64}
    refuse(untyped("shards", "sf_objects", json.dumps([item, item])), "names one object twice")


@pytest.mark.parametrize("name", ["centroids_ref", "hyperplanes_ref"])
def test_routing_artifact_elsewhere(name: str) -> None:
    vector = vector_fields(sample_manifest().vector) | {name: "s3://elsewhere/x.npy"}
    data = untyped("build_meta", "custom", json.dumps({"vector": vector}))
    refuse(data, rf"custom.vector.{name} 's3://elsewhere/x.npy' is not below")


def test_shard_elsewhere() -> None:
    refuse(untyped("shards", "db_url", f"{PREFIX}/../../etc"), "db_id=0 db_url .*'..' segment")


def test_no_meta_row_and_two() -> None:
    refuse(sabotaged("DELETE FROM build_meta"), "table build_meta has no row")
    doubled = sabotaged("INSERT INTO build_meta SELECT * FROM build_meta")
    refuse(doubled, r"table build_meta has more than 1 row")


def test_too_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    data = sabotaged(
        f"INSERT INTO shards WITH n(x) AS (SELECT 4 UNION ALL SELECT x + 1 FROM n WHERE x < {codec.MAX_SHARDS + 9}) "
        "SELECT x, NULL, 0, 0, 0, NULL, NULL, NULL, '{}', NULL FROM n"
    )
    refuse(data, f"table shards has more than {codec.MAX_SHARDS} row")


def test_too_long_a_text() -> None:
    data = sabotaged(("UPDATE build_meta SET custom = ?", ('{"a":"' + "x" * codec.MAX_TEXT_BYTES + '"}',)))
    refuse(data, "too big")


def test_too_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_MAX_TICKS", 2)
    manifest = sample_manifest(num_dbs=5000, custom={}, shards=tuple(shard(n) for n in range(5000)))
    refuse(encode_manifest(manifest), "interrupted")


def test_more_text_than_bytes() -> None:
    """A default value is stored once and given out for every row."""
    text = '{"a":"' + "x" * 100_000 + '"}'
    data = sabotaged(
        "UPDATE build_meta SET custom = '{}'",
        "ALTER TABLE shards DROP COLUMN writer_info",
        f"ALTER TABLE shards ADD COLUMN writer_info TEXT DEFAULT '{text}'",
    )
    refuse(data, "more text than the file has bytes")


def test_text_that_is_no_utf8() -> None:
    refuse(sabotaged("UPDATE build_meta SET run_id = CAST(x'ff' AS TEXT)"), "UTF-8")


def test_one_column_name_is_not_taken_for_a_text() -> None:
    """SQLite reads an unknown name in double quotes as a text; a missing column must not become its own name."""
    refuse(sabotaged("ALTER TABLE build_meta RENAME COLUMN run_id TO other"), "has no column run_id")


def test_flipped_bytes_never_leak_another_error() -> None:
    honest = encode_manifest(sample_manifest())
    chance = random.Random(11)
    refused = 0
    for _ in range(400):
        data = bytearray(honest)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(16, len(data))] = chance.randrange(256)
        try:
            decode_manifest(bytes(data), where="here")
        except ManifestError:
            refused += 1
    assert refused > 50


def test_errors_do_not_leave_connections_open() -> None:
    with suppress(ManifestError):
        decode_manifest(sabotaged("CREATE VIEW v AS SELECT 1"), where="here")
    # An unclosed connection is a ResourceWarning, which the test run turns into an error.
