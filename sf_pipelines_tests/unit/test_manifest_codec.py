import hashlib
import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone

import pytest

from sf_pipelines.snapshot.errors import ManifestError
from sf_pipelines.snapshot.manifest.codec import decode_manifest, encode_manifest
from sf_pipelines.snapshot.manifest.models import ShardingRecord
from sf_pipelines_tests.unit.manifest_samples import CREATED, rewritten, sabotaged, sample_manifest, shard


def test_what_is_written_is_read_back() -> None:
    manifest = sample_manifest()
    assert decode_manifest(encode_manifest(manifest), where="here") == manifest


def test_keys_and_cel_sharding_are_read_back() -> None:
    sharding = ShardingRecord(
        strategy="cel", cel_expr="region", cel_columns={"region": "string"}, routing_values=("é", "us")
    )
    rows = (shard(0, min_key=-4, max_key=2**70), shard(1, min_key="k0", max_key='"'))
    manifest = sample_manifest(num_dbs=2, sharding=sharding, key_encoding="u64be", custom={}, shards=rows)
    assert decode_manifest(encode_manifest(manifest), where="here") == manifest


def test_a_stock_shaped_reader_finds_every_column() -> None:
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(encode_manifest(sample_manifest()))
        database.row_factory = sqlite3.Row
        meta = database.execute("SELECT * FROM build_meta").fetchall()
        rows = database.execute("SELECT * FROM shards").fetchall()
    assert len(meta) == 1
    assert dict(meta[0]) | {"custom": ""} == {
        "run_id": "r1",
        "created_at": "2026-11-22T12:00:00.000005Z",
        "num_dbs": 4,
        "s3_prefix": "s3://serving/products",
        "key_col": "_vector_id",
        "sharding": '{"hash_algorithm":"xxh3_64","strategy":"hash"}',
        "db_path_template": "db={db_id:05d}",
        "shard_prefix": "shards",
        "format_version": 4,
        "key_encoding": "raw",
        "custom": "",
    }
    assert [row["db_id"] for row in rows] == [0, 1, 3]
    assert rows[0]["writer_info"] == "{}"
    assert rows[0]["min_key"] is None


def test_equal_manifests_have_equal_bytes() -> None:
    rows = [shard(number) for number in range(500)]
    custom = {"b": 1, "a": {"y": [1, 2.5], "x": None}}
    shuffled = rows.copy()
    random.Random(3).shuffle(shuffled)
    first = encode_manifest(sample_manifest(num_dbs=500, shards=tuple(rows), custom=custom))
    second = encode_manifest(
        sample_manifest(num_dbs=500, shards=tuple(shuffled), custom=dict(reversed(custom.items())))
    )
    assert first == second


def test_bytes_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib\n"
        "from sf_pipelines.snapshot.manifest.codec import encode_manifest\n"
        "from sf_pipelines_tests.unit.manifest_samples import sample_manifest, shard\n"
        "m = sample_manifest(num_dbs=300, shards=tuple(shard(n) for n in range(300)), custom={})\n"
        "print(hashlib.sha256(encode_manifest(m)).hexdigest())\n"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    manifest = sample_manifest(num_dbs=300, shards=tuple(shard(n) for n in range(300)), custom={})
    assert there.stdout.strip() == hashlib.sha256(encode_manifest(manifest)).hexdigest()


def test_shards_come_back_in_order_whatever_the_file_says() -> None:
    data = sabotaged(
        "CREATE TABLE other AS SELECT * FROM shards ORDER BY db_id DESC",
        "DROP TABLE shards",
        "ALTER TABLE other RENAME TO shards",
    )
    assert [row.db_id for row in decode_manifest(data, where="here").shards] == [0, 1, 3]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("ALTER TABLE shards ADD COLUMN extra TEXT DEFAULT 'x'", None),
        ("ALTER TABLE build_meta ADD COLUMN extra TEXT", None),
        ("CREATE TABLE notes (a, b UNIQUE)", None),
        ("UPDATE build_meta SET custom = ''", {}),
    ],
)
def test_what_others_add_is_ignored(statement: str, expected: dict[str, object] | None) -> None:
    manifest = decode_manifest(sabotaged(statement), where="here")
    assert manifest.custom == (sample_manifest().custom if expected is None else expected)


def test_a_stock_table_without_objects_is_read() -> None:
    manifest = decode_manifest(sabotaged("ALTER TABLE shards DROP COLUMN sf_objects"), where="here")
    assert [row.objects for row in manifest.shards] == [None, None, None]


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-22T12:00:00", datetime(2026, 11, 22, 12, tzinfo=UTC)),
        ("2026-11-22T12:00:00+02:00", datetime(2026, 11, 22, 10, tzinfo=UTC)),
        ("2026-11-22T12:00:00.25Z", datetime(2026, 11, 22, 12, 0, 0, 250_000, tzinfo=UTC)),
    ],
)
def test_dates_of_others(text: str, moment: datetime) -> None:
    data = sabotaged(("UPDATE build_meta SET created_at = ?", (text,)))
    assert decode_manifest(data, where="here").created_at == moment


def test_zones_do_not_change_the_bytes() -> None:
    elsewhere = CREATED.astimezone(timezone(timedelta(hours=5)))
    assert encode_manifest(sample_manifest(created_at=elsewhere)) == encode_manifest(sample_manifest())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"bytes", {1, 2}])
def test_what_json_cannot_say_is_not_written(value: object) -> None:
    with pytest.raises(ManifestError, match=r"run 'r1' cannot be written"):
        encode_manifest(sample_manifest(custom={"x": value}))


def test_a_contradiction_is_not_written() -> None:
    with pytest.raises(ManifestError, match="db_id=1: is there twice"):
        encode_manifest(sample_manifest(shards=(shard(1), shard(1))))


def test_freed_pages_do_not_matter_to_a_reader() -> None:
    def grow_and_shrink(database: sqlite3.Connection) -> None:
        database.execute("CREATE TABLE junk (x)")
        database.executemany("INSERT INTO junk VALUES (?)", [("j" * 3000,)] * 50)
        database.execute("DROP TABLE junk")

    assert decode_manifest(rewritten(grow_and_shrink), where="here") == sample_manifest()
