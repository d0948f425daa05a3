"""The format checker passes what is in order, and names whatever one thing is broken."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sf_pipelines import build_snapshot
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.checking import (
    DIM,
    GONE,
    KINDS,
    MANIFEST_KEY,
    MOMENT,
    RUN_ID,
    Kind,
    Snapshot,
    coarse_index,
    flat_index,
    scalar_index,
    shard_key,
)
from sf_pipelines_tests.conftest import make_bucket
from sf_pipelines_tests.format_checker.checker import assert_format, check_format
from sf_pipelines_tests.format_checker.report import STOCK_DEFECTS, Duty
from sf_pipelines_tests.format_checker.routing import CelFormula, hash_of
from sf_pipelines_tests.golden.snapshots import UNIFIED, VECTOR, fill
from sf_pipelines_tests.tables import small_config, write_source

EVERYWHERE = {Duty.POINTER, Duty.MANIFEST_KEY, Duty.MANIFEST, Duty.SHARDING, Duty.VECTOR, Duty.SHARD_ROWS, Duty.ROWS}
LANCE = {Duty.LANCE_TABLE, Duty.LANCE_INDEX, Duty.LANCE_SEARCH, Duty.DB_BYTES, Duty.ROUTING}
VEC = {Duty.SQLITE_FILE, Duty.SQLITE_VECTORS, Duty.SQLITE_SEARCH, Duty.KEY_VALUES, Duty.DB_BYTES, Duty.ROUTING}
CHECKED = {
    "lance": EVERYWHERE | LANCE | {Duty.ROUTING_ARRAYS},
    "sqlite": EVERYWHERE | VEC | {Duty.ROUTING_ARRAYS},
    "unified-sqlite": EVERYWHERE | VEC,
    "composite": EVERYWHERE | LANCE | {Duty.SQLITE_FILE, Duty.KEY_VALUES},
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return {kind: Kind(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


# What is in order.


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_in_order_passes(kind: str, kinds: dict[str, Kind], tmp_path: Path) -> None:
    snapshot = kinds[kind].publish(tmp_path / "a place: 50% off")
    report = check_format(snapshot.root)
    assert report.faults == []
    assert report.passed
    assert report.excused == []
    assert {Duty(duty) for duty in report.checked} >= CHECKED[kind]
    assert_format(snapshot.url)
    assert_format(snapshot.root, manifest_key=MANIFEST_KEY)


def upload(root: Path, url: str, options: S3Options) -> None:
    store = Store.open(url, options)
    for path in root.rglob("*"):
        if path.is_file():
            store.upload(path, path.relative_to(root).as_posix())


@pytest.mark.parametrize("kind", KINDS)
def test_on_s3(kind: str, kinds: dict[str, Kind], tmp_path: Path, bucket: str, moto_options: S3Options) -> None:
    url = f"s3://{bucket}/deep/{kind}"
    snapshot = kinds[kind].publish(tmp_path / "here", url)
    upload(snapshot.root, url, moto_options)
    report = check_format(url, s3=moto_options)
    assert report.faults == []
    snapshot.sql("UPDATE shards SET db_url = replace(db_url, 's3://', 's3://other-') WHERE db_id = 1")
    upload(snapshot.root, url, moto_options)
    assert only(check_format(url, s3=moto_options).faults) == (
        f"shards row db_id=1: db_url 's3://other-{bucket}/deep/{kind}/{shard_key(1)}' is not an absolute address "
        f"below {url}: stock reads it where it points"
    )


def test_a_bucket_without_a_prefix(
    kinds: dict[str, Kind], tmp_path: Path, bucket: str, moto_options: S3Options
) -> None:
    snapshot = kinds["lance"].publish(tmp_path / "here", f"s3://{bucket}")
    upload(snapshot.root, f"s3://{bucket}", moto_options)
    assert "has no key prefix" in only(check_format(f"s3://{bucket}", s3=moto_options).faults)


def test_half_precision_and_other_indexes_pass(kinds: dict[str, Kind], tmp_path: Path) -> None:
    snapshot = kinds["lance"].publish(tmp_path / "half")
    for db_id, shard in enumerate(snapshot.shards):
        snapshot.rewrite(db_id, vector_type=pa.float16(), vectors=shard.vectors.astype(np.float16).astype(np.float32))
    assert_format(snapshot.root)
    for kind, metric in (("lance", "cosine"), ("composite", "l2"), ("composite", "dot")):
        snapshot = kinds[kind].publish(tmp_path / metric)
        for db_id in range(3):
            snapshot.rewrite(db_id, index=scalar_index(metric))
        snapshot.custom(metric={"dot": "dot_product"}.get(metric, metric))
        assert_format(snapshot.root)


def test_extras_are_nobodys_business(kinds: dict[str, Kind], tmp_path: Path) -> None:
    snapshot = kinds["lance"].publish(tmp_path / "root")
    snapshot.sql("ALTER TABLE shards ADD COLUMN sf_objects TEXT", "CREATE TABLE more (a)", "DELETE FROM shards WHERE 0")
    snapshot.pointer(seq=4, write_id="w")
    snapshot.rewrite(0, columns={"filter": pa.array([1.5] * len(snapshot.shards[0].ids))})
    assert_format(snapshot.root)


# db_bytes of Lance shards was taken before the last index, or counts both parts; without a trained index the scores are
# squared L2, which is what l2 declares.
NO_INDEX, WEIGHT = "the index covers 0 of", "db_bytes is"
KNOWN_DEFECTS = {
    "vector-lancedb-cluster-cosine": [NO_INDEX, "are not those of cosine", WEIGHT],
    "vector-lancedb-cluster-cosine-fp16": [WEIGHT],
    "vector-lancedb-lsh-l2": [NO_INDEX, WEIGHT],
    "vector-lancedb-cel": [NO_INDEX, WEIGHT],
    "vector-sqlitevec-explicit-l2": [],
    "unified-sqlitevec-hash": [],
    "unified-sqlitevec-cel": [],
    "unified-sqlite-lancedb": [NO_INDEX, WEIGHT, "custom.sqlite_sidecar is there"],
}


@pytest.mark.parametrize("name", [*VECTOR, *UNIFIED])
def test_stock_snapshots_pass_but_for_the_known_defects(name: str, moto_options: S3Options) -> None:
    make_bucket(moto_options, "golden")
    url, defects = f"s3://golden/{name}", KNOWN_DEFECTS[name]
    fill(Store.open(url, moto_options), name)
    report = check_format(url, s3=moto_options, writer="stock")
    assert report.faults == []
    assert len(report.excused) == 4 * len(defects)
    for number, fault in enumerate(report.excused):
        assert f"shard {number // len(defects)}: " in fault
        assert defects[number % len(defects)] in fault
    assert check_format(url, s3=moto_options).faults == report.excused


def test_what_is_built_passes(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    config = small_config(tmp_path)
    build_snapshot(config)
    assert_format(config.store)


def test_only_the_known_defects_are_excused(kinds: dict[str, Kind], tmp_path: Path) -> None:
    snapshot = kinds["lance"].publish(tmp_path / "root")
    snapshot.sql("UPDATE shards SET db_bytes = 1 WHERE db_id = 1")
    snapshot.custom(num_probes=0)
    report = check_format(snapshot.root, writer="stock")
    assert "num_probes" in only(report.faults)
    assert "db_bytes" in only(report.excused)
    assert Duty.ROUTING not in STOCK_DEFECTS


def only(items: list[str]) -> str:
    assert len(items) == 1, items
    return items[0]


# What is broken, one thing at a time.


def update(field: str, value: str) -> Callable[[Snapshot], None]:
    return lambda it: it.update("shards", field, value, "db_id = 1")


def meta(field: str, value: str) -> Callable[[Snapshot], None]:
    return lambda it: it.update("build_meta", field, value)


def custom(**changes: Any) -> Callable[[Snapshot], None]:
    return lambda it: it.custom(**changes)


def pointer(**changes: Any) -> Callable[[Snapshot], None]:
    return lambda it: it.pointer(**changes)


def rewrite(**changes: Any) -> Callable[[Snapshot], None]:
    return lambda it: it.rewrite(1, **changes)


def database(*statements: str) -> Callable[[Snapshot], None]:
    return lambda it: it.database(1, *statements)


def array(change: Callable[[Any], Any]) -> Callable[[Snapshot], None]:
    def apply(it: Snapshot) -> None:
        path = next(it.root.glob("vector_meta/*/*.npy"))
        np.save(path, change(np.load(path)))

    return apply


def renamed(key: str, run_id: str = RUN_ID) -> Callable[[Snapshot], None]:
    """The manifest under another name, and a pointer to it."""

    def apply(it: Snapshot) -> None:
        (it.root / key).parent.mkdir(parents=True, exist_ok=True)
        it.manifest.rename(it.root / key)
        if not any(it.manifest.parent.iterdir()):
            it.manifest.parent.rmdir()
        it.pointer(manifest_ref=f"{it.url}/{key}", run_id=run_id)

    return apply


def history(name: str) -> Callable[[Snapshot], None]:
    def apply(it: Snapshot) -> None:
        shutil.copytree(it.manifest.parent, it.root / "manifests" / name)

    return apply


def swapped(it: Snapshot) -> None:
    """One row of shard 0 and one of shard 1 change places."""
    first, second = it.shards[0], it.shards[1]
    for name in ("ids", "keys"):
        ours, theirs = getattr(first, name), getattr(second, name)
        if ours is not None:
            ours[3], theirs[3] = theirs[3], ours[3]
    moved = first.vectors[3].copy()
    first.vectors[3] = second.vectors[3]
    second.vectors[3] = moved
    it.rewrite(0)
    it.rewrite(1)


def with_vector(value: float) -> Callable[[Snapshot], None]:
    def apply(it: Snapshot) -> None:
        vectors = it.shards[1].vectors.copy()
        vectors[2] = value
        it.rewrite(1, vectors=vectors)

    return apply


def repeated_id(it: Snapshot) -> None:
    it.shards[1].ids[0] = it.shards[1].ids[1]
    it.rewrite(1)


def elsewhere(path: str) -> Callable[[Snapshot], None]:
    def apply(it: Snapshot) -> None:
        target = it.folder(1) / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return apply


def half_indexed(it: Snapshot) -> None:
    import lancedb

    shard = it.shards[1]
    more = shard.take([0, 1])
    more.ids = [row_id + 1000 for row_id in more.ids]
    more.write_lance(it.root / "more")
    rows = lancedb.connect(str(it.root / "more")).open_table("vector_index").to_arrow()
    table = lancedb.connect(str(it.folder(1))).open_table("vector_index")
    table.add(rows)
    it.recount(1, len(shard.ids) + 2)


def cloned(it: Snapshot) -> None:
    """Shard 1 as a shallow clone of a table elsewhere."""
    import lancedb

    elsewhere = it.root / "elsewhere"
    shutil.move(it.folder(1) / "vector_index.lance", elsewhere / "vector_index.lance")
    # Only the local connection has this method; the declared type is that of all.
    database: Any = lancedb.connect(str(it.folder(1)))
    database.clone_table("vector_index", str(elsewhere / "vector_index.lance"), is_shallow=True)
    it.recount(1, len(it.shards[1].ids))


def cut_manifest(it: Snapshot) -> None:
    path = next(it.folder(1).rglob("*.manifest"))
    path.write_bytes(path.read_bytes()[:-9])
    it.recount(1, len(it.shards[1].ids))


def foreign_ids(it: Snapshot) -> None:
    """The vectors of shard 1 have other ids than keys."""
    shard = it.shards[1]
    it.rewrite(1, ids=[f"zz{row_id}" if isinstance(row_id, str) else row_id + 1000 for row_id in shard.ids])


def hex_ids(it: Snapshot) -> None:
    """Keys are bytes, so that the ids must be their hex digits."""
    it.update("build_meta", "key_encoding", "'raw'")
    it.sharding(cel_columns={"key": "bytes"})
    for db_id, shard in enumerate(it.shards):
        it.rewrite(db_id, ids=[key.hex() for key in shard.keys or []])


def loose_attempt(value: str) -> Callable[[Snapshot], None]:
    """A value that a column of type INTEGER would not keep, or would change."""

    def apply(it: Snapshot) -> None:
        it.sql("CREATE TABLE loose AS SELECT * FROM shards", "DROP TABLE shards", "ALTER TABLE loose RENAME TO shards")
        it.update("shards", "attempt", value, "db_id = 1")

    return apply


def header(text: str) -> Callable[[Snapshot], None]:
    """Centroids with another header, which numpy parses as Python."""

    def apply(it: Snapshot) -> None:
        data = text.encode()
        path = next(it.root.glob("vector_meta/*/*.npy"))
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data + bytes(96))

    return apply


def view(it: Snapshot) -> None:
    it.sql("ALTER TABLE shards RENAME TO other", "CREATE VIEW shards AS SELECT * FROM other")


def write_ahead(it: Snapshot) -> None:
    it.database(1, "PRAGMA journal_mode = WAL")


def nothing_of(name: str) -> Callable[[Snapshot], None]:
    return lambda it: (it.root / name).unlink()


def text(name: str, value: bytes) -> Callable[[Snapshot], None]:
    def apply(it: Snapshot) -> None:
        (it.root / name).write_bytes(value)

    return apply


SIDE = "CREATE TABLE vec_payloads (rowid INTEGER PRIMARY KEY, payload BLOB)"
KV = {"kv": "CREATE TABLE kv (k BLOB PRIMARY KEY, v BLOB NOT NULL)"}
CEL = {"strategy": "cel", "cel_expr": "key", "cel_columns": {"key": "string"}}
L2_VEC0 = {"vec_index": f"CREATE VIRTUAL TABLE vec_index USING vec0(embedding float[{DIM}] distance_metric=l2)"}
WIDE_VEC0 = {"vec_index": "CREATE VIRTUAL TABLE vec_index USING vec0(other float[4])"}

_HEADER = "{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, 8)}}"

BROKEN: list[tuple[str, Callable[[Snapshot], None], str]] = [
    # The pointer.
    ("lance", nothing_of("_CURRENT"), "_CURRENT is missing"),
    ("lance", text("_CURRENT", b"[1]"), "_CURRENT is no JSON object"),
    ("lance", pointer(manifest_content_type=GONE), "_CURRENT.manifest_content_type is None"),
    ("lance", pointer(run_id=7), "_CURRENT.run_id is 7"),
    ("lance", pointer(run_id="other"), "_CURRENT.run_id is 'other', but build_meta.run_id"),
    ("lance", pointer(updated_at="2026-11-22T12:00:00.000000"), "_CURRENT.updated_at"),
    ("lance", pointer(updated_at="soon Z"), "_CURRENT.updated_at"),
    ("lance", pointer(format_version="1"), "_CURRENT.format_version"),
    ("lance", pointer(manifest_content_type="text/plain"), "_CURRENT.manifest_content_type is 'text/plain'"),
    ("lance", pointer(manifest_ref="s3://other/bucket/manifest"), "_CURRENT.manifest_ref"),
    # The manifest's name and its neighbours.
    ("lance", renamed(f"manifests/2026-11-22T12:00:00Z_run_id={RUN_ID}/manifest"), "six digits"),
    ("lance", renamed(f"manifests/{MOMENT}_run_id={RUN_ID}/other"), "manifest 'manifests/"),
    ("lance", renamed(f"manifests/{MOMENT}_run_id=run-2/manifest"), "is named for another run"),
    ("lance", history(f"2026-11-22T12:00:01.000000Z_run_id={RUN_ID}"), "has the run_id of"),
    ("lance", history("2026-11-22T12:00:01.000000Z_run_id=run-0"), "shards.checkpoint_id '"),
    ("lance", history("2026-11-22T12:00:01.000000Z_run_id=run-0"), "shards.db_url '"),
    ("lance", history("leftover"), "manifests/leftover has no name of the format"),
    # The manifest.
    ("lance", nothing_of(MANIFEST_KEY), "is missing: stock raises"),
    ("lance", text(MANIFEST_KEY, b"{}"), "is no SQLite database"),
    ("lance", text(MANIFEST_KEY, b"SQLite format 3\0" + b"x" * 500), "cannot be read"),
    ("lance", view, "manifest has no table shards, but view"),
    ("lance", lambda it: it.sql("DROP TABLE build_meta"), "manifest has no table build_meta"),
    ("lance", lambda it: it.sql("ALTER TABLE shards DROP COLUMN min_key"), "shards lacks the columns ['min_key']"),
    ("lance", lambda it: it.sql("ALTER TABLE build_meta DROP COLUMN key_col"), "build_meta lacks the columns"),
    ("lance", lambda it: it.sql("INSERT INTO build_meta SELECT * FROM build_meta"), "build_meta has 2 rows"),
    ("lance", meta("num_dbs", "0"), "build_meta.num_dbs is 0"),
    ("lance", meta("num_dbs", "2"), "shards has 3 rows"),
    ("lance", meta("format_version", "5"), "build_meta.format_version is 5"),
    ("lance", meta("key_encoding", "'u16'"), "build_meta.key_encoding is 'u16'"),
    ("lance", meta("created_at", "'yesterday'"), "build_meta.created_at"),
    ("lance", meta("s3_prefix", "NULL"), "build_meta.s3_prefix is None"),
    ("lance", meta("s3_prefix", "s3_prefix || '/'"), "build_meta.s3_prefix"),
    ("lance", meta("shard_prefix", "'a/b'"), "build_meta.shard_prefix"),
    ("lance", meta("db_path_template", "'db'"), "build_meta.db_path_template"),
    ("lance", meta("sharding", "'nonsense'"), "build_meta.sharding is 'nonsense'"),
    ("lance", meta("custom", "'[]'"), "build_meta.custom is '[]'"),
    ("lance", meta("key_col", "'id'"), "build_meta.key_col is 'id'"),
    # Sharding and custom.vector.
    ("lance", lambda it: it.sharding(hash_algorithm=GONE), "build_meta.sharding.hash_algorithm is None"),
    ("lance", lambda it: it.sharding(strategy="cluster"), "build_meta.sharding.strategy is 'cluster'"),
    ("lance", lambda it: it.sharding(cel_expr="key"), "of strategy hash has ['cel_expr']"),
    ("lance", lambda it: it.sharding(more=1), "unknown keys ['more']"),
    ("lance", meta("key_encoding", "'utf8'"), "placeholder"),
    ("lance", lambda it: it.sharding(**CEL), "placeholder"),
    ("lance", meta("custom", "'{}'"), "custom.vector is None"),
    ("lance", custom(dim=0), "custom.vector.dim is 0"),
    ("lance", custom(metric="dot"), "custom.vector.metric is 'dot'"),
    ("lance", custom(sharding_strategy=GONE), "custom.vector.sharding_strategy is None"),
    ("lance", custom(num_probes=0), "custom.vector.num_probes is 0"),
    ("lance", custom(num_probes=4), "custom.vector.num_probes is 4"),
    ("lance", custom(unified=False), "custom.vector.unified is there"),
    ("lance", custom(backend="lancedb"), "custom.vector.backend is there"),
    ("lance", custom(index_params={}), "custom.vector.index_params is there"),
    ("lance", custom(hyperplanes_ref="s3://b/h.npy"), "custom.vector.hyperplanes_ref is there"),
    ("lance", custom(centroids_ref=GONE), "custom.vector.centroids_ref is None"),
    ("lance", custom(centroids_ref="s3://b/p/c.npy"), "custom.vector.centroids_ref is 's3://b/p/c.npy'"),
    ("lance", custom(total_vectors=4), "custom.vector.total_vectors is 4"),
    ("lance", custom(index_type=None), "custom.vector.index_type is None"),
    ("sqlite", custom(num_hash_bits=5), "hyperplanes.npy has the shape (4, 8), must be (5, 8)"),
    ("sqlite", custom(num_hash_bits=GONE), "custom.vector.num_hash_bits is None"),
    ("unified-sqlite", custom(unified=1), "custom.vector.unified is 1"),
    ("unified-sqlite", custom(backend="faiss"), "custom.vector.backend is 'faiss'"),
    ("unified-sqlite", custom(kv_backend=GONE), "custom.vector.kv_backend is None"),
    ("composite", custom(kv_backend="sqlite-vec"), "custom.vector.kv_backend is 'sqlite-vec'"),
    ("composite", custom(index_params={}), "custom.vector.index_params is {}"),
    ("composite", custom(sharding_strategy="cel"), "custom.vector.sharding_strategy is there"),
    ("unified-sqlite", custom(metric="dot_product"), "which sqlite-vec does not have"),
    ("composite", lambda it: it.sharding(cel_expr=""), "build_meta.sharding.cel_expr is ''"),
    ("composite", lambda it: it.sharding(cel_columns={"key": "text"}), "build_meta.sharding.cel_columns is"),
    ("composite", lambda it: it.sharding(cel_expr="shard_hash(key) % 3"), "does not compile"),
    ("composite", lambda it: it.sharding(routing_values=["a", "b"]), "build_meta.sharding.routing_values is"),
    ("composite", lambda it: it.sharding(routing_values=["a", "b", "a"]), "build_meta.sharding.routing_values is"),
    ("composite", lambda it: it.sharding(routing_values=["a", 1, "b"]), "build_meta.sharding.routing_values is"),
    ("lance", lambda it: it.sharding(strategy=["hash"]), "build_meta.sharding.strategy is ['hash']"),
    ("lance", custom(sharding_strategy={}), "custom.vector.sharding_strategy is {}"),
    ("unified-sqlite", custom(backend=["x"]), "custom.vector.backend is ['x']"),
    ("unified-sqlite", custom(kv_backend={}), "custom.vector.kv_backend is {}"),
    # Expressions that compile but name no shard.
    ("composite", lambda it: it.sharding(cel_expr="key == 'k1'"), "gives bool, must give int, uint, string or bytes"),
    ("composite", lambda it: it.sharding(cel_expr="key == 'k1' ? 0.5 : 1.5"), "gives double, must give int"),
    ("composite", lambda it: it.sharding(cel_expr="[0, key][0]"), "gives dyn, must give int"),
    (
        "composite",
        lambda it: it.sharding(cel_expr="key", routing_values=[1, 2, 3]),
        "gives string, but routing_values has 1, 2, 3",
    ),
    (
        "composite",
        lambda it: it.sharding(cel_expr="size(key)", routing_values=["a", "b", "c"]),
        "gives int, but routing_values has 'a', 'b', 'c'",
    ),
    (
        "composite",
        lambda it: it.sharding(cel_expr="bytes(key)", routing_values=["a", "b", "c"]),
        "gives bytes, but routing_values has 'a', 'b', 'c'",
    ),
    # Rows of shards.
    ("lance", loose_attempt("NULL"), "does not end in the attempt, which is None"),
    ("lance", loose_attempt("'x'"), "does not end in the attempt, which is 'x'"),
    (
        "lance",
        update("db_url", f"replace(db_url, 'attempt=00', 'attempt={'1' * 5000}')"),
        "more than 1200 characters",
    ),
    ("lance", update("db_id", "7"), "shards row db_id=7: db_id is not below num_dbs 3"),
    ("lance", update("db_id", "0"), "shards.db_id repeats '0'"),
    ("lance", update("db_url", "db_url || '/'"), "ends in a slash"),
    ("lance", update("db_url", "'shards/run_id=run-1/db=00001/attempt=00'"), "is not an absolute address"),
    ("lance", update("db_url", "replace(db_url, '/shards', '/../shards')"), "dotted segments"),
    ("lance", update("db_url", "(SELECT db_url FROM shards WHERE db_id = 0)"), "shards.db_url repeats"),
    ("lance", update("db_url", "NULL"), "an empty shard is listed"),
    ("lance", update("row_count", "0"), "an empty shard is listed"),
    ("lance", update("attempt", "1"), "does not end in attempt=01"),
    ("lance", update("attempt", "-1"), "attempt is -1, not a count"),
    ("lance", update("row_count", "row_count + 1"), "shard 1: row_count is 31, but there are 30 vectors"),
    ("lance", update("db_bytes", "db_bytes - 1"), "shard 1: db_bytes is"),
    ("composite", update("db_bytes", "db_bytes + 1"), "shard.db weigh"),
    ("lance", update("writer_info", "NULL"), "writer_info is None"),
    ("lance", update("writer_info", "'null'"), "writer_info is 'null'"),
    ("lance", update("checkpoint_id", "NULL"), "checkpoint_id is None"),
    ("lance", update("checkpoint_id", "'abc'"), "checkpoint_id is 'abc'"),
    ("lance", update("checkpoint_id", "(SELECT checkpoint_id FROM shards WHERE db_id = 0)"), "checkpoint_id repeats"),
    ("lance", update("min_key", "'1'"), "min_key is '1'; must be NULL"),
    ("unified-sqlite", update("max_key", "'k1'"), "max_key is 'k1'; must be a JSON number or text"),
    ("unified-sqlite", update("max_key", "'1'"), "max_key is 1, the keys begin or end with"),
    ("lance", update("db_url", "replace(db_url, 'run_id=run-1', 'run_id=run-0')"), "is not below run_id=run-1"),
    # Routing arrays.
    ("lance", lambda it: next(it.root.glob("vector_meta/*/*")).unlink(), "centroids.npy cannot be loaded"),
    ("lance", array(lambda found: found.astype(np.float64)), "centroids.npy is float64"),
    ("lance", array(lambda found: found[:2]), "centroids.npy has the shape (2, 8)"),
    ("lance", array(lambda found: found.astype(object)), "centroids.npy cannot be loaded"),
    ("lance", array(lambda found: found * np.float32(np.nan)), "centroids.npy has NaN"),
    ("lance", array(lambda found: found[::-1].copy()), "rows are nearer to another centroid"),
    ("sqlite", array(lambda found: -found), "rows have the code of another shard"),
    # Headers at which numpy raises TypeError, UserWarning, TokenError, OverflowError, MemoryError.
    ("lance", header("{'descr': '<f4', b'a': 1, 'shape': (3, 8)}"), "centroids.npy cannot be loaded"),
    ("lance", header("{'descr': [('a',)], 'fortran_order': False, 'shape': (3L, 8)}"), "centroids.npy cannot be"),
    ("lance", header("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 8"), "centroids.npy cannot be loaded"),
    ("lance", header(_HEADER.format("99999999999999999999")), "centroids.npy cannot be loaded"),
    ("lance", header(_HEADER.format("1000000000000")), "centroids.npy cannot be loaded"),
    # Lance tables.
    ("lance", cloned, "shard 1: vector_index.lance takes files from other folders, '"),
    ("composite", elsewhere("vector/vector_index.lance/data"), "it has no data files of its own"),
    ("lance", cut_manifest, ".manifest cannot be read (it does not end as a manifest does)"),
    ("lance", elsewhere("vector_index.lance"), "shard 1: shards/"),
    ("lance", elsewhere("vector_index.lance/data"), "vector_index.lance cannot be read"),
    ("composite", elsewhere("vector/vector_index.lance"), "has no vector/vector_index.lance/: stock answers []"),
    ("composite", elsewhere("shard.db"), "has no shard.db"),
    ("lance", rewrite(columns={"payload": GONE}), "has no column ['payload']"),
    ("lance", rewrite(columns={"more": pa.array([[1.0, 2.0]] * 30, pa.list_(pa.float32(), 2))}), "look like vectors"),
    ("lance", rewrite(vector_type=pa.float64()), "column vector is fixed_size_list<item: double>[8]"),
    ("lance", rewrite(columns={"id": pa.array(range(30), pa.int32())}), "column id is int32"),
    ("lance", rewrite(columns={"payload": pa.array([b"{}"] * 30)}), "column payload is binary"),
    ("lance", rewrite(payloads=["[1]"] * 30), "are no text of a JSON object"),
    ("lance", custom(dim=9), "must be a fixed_size_list of 9"),
    ("lance", rewrite(index=False), "shard 1: vector has 0 indexes"),
    ("lance", rewrite(index=coarse_index("cosine")), "shard 1: the index covers 0 of 30 rows"),
    ("lance", rewrite(index=flat_index("l2")), "shard 1: the index has the distance l2, declared is cosine"),
    ("lance", rewrite(index=scalar_index("cosine")), "shards have different indexes (IVF_FLAT, IVF_SQ)"),
    ("lance", half_indexed, "shard 1: the index covers 30 of 32 rows"),
    ("composite", rewrite(index=flat_index("cosine")), "are not those of dot_product in the scale"),
    ("lance", with_vector(0.0), "1 vectors are zero"),
    ("lance", swapped, "1 of 30 rows are nearer to another centroid"),
    ("lance", repeated_id, "are stored more than once"),
    # Databases.
    ("unified-sqlite", elsewhere("shard.db"), "has no shard.db"),
    ("sqlite", elsewhere("shard.db"), "shard 1: shards/"),
    ("unified-sqlite", write_ahead, "is in write-ahead mode"),
    ("unified-sqlite", rewrite(ddl=KV), "kv is not the table"),
    ("unified-sqlite", database("DROP TABLE kv"), "kv is not the table"),
    ("composite", database("DROP TABLE kv"), "kv is not the table"),
    ("unified-sqlite", database("DROP TABLE vec_payloads"), "vec_payloads is not a table"),
    ("unified-sqlite", rewrite(ddl={"vec_payloads": SIDE}), "vec_payloads is not a table"),
    ("sqlite", database("DROP TABLE vec_id_map"), "vec_id_map is not a table"),
    ("sqlite", database("DROP TABLE vec_index"), "vec_index is no vec0 table"),
    ("unified-sqlite", database("DROP TABLE vec_index", *WIDE_VEC0.values()), "vec_index is no vec0 table"),
    ("unified-sqlite", rewrite(ddl=L2_VEC0), "vec_index has the distance_metric l2, declared is cosine"),
    ("sqlite", custom(dim=9), "vec_index has float[8], custom.vector.dim is 9"),
    ("sqlite", database("DELETE FROM vec_id_map WHERE internal_id = 1"), "vec_id_map has"),
    ("sqlite", database("UPDATE vec_id_map SET original_id = '{\"v\": 1}' WHERE internal_id = 1"), "original_id"),
    ("sqlite", database('UPDATE vec_id_map SET original_id = \'{"v": 1, "t": "str"}\''), "original_id"),
    ("sqlite", database("UPDATE vec_payloads SET payload = 'none'"), "vec_payloads rows"),
    ("sqlite", database("INSERT INTO vec_payloads VALUES (999, '{}')"), "vec_payloads rows 999"),
    ("sqlite", database("DELETE FROM vec_index WHERE rowid = 1"), "row_count is 4, but there are 3 vectors"),
    ("unified-sqlite", database("DELETE FROM kv WHERE k = (SELECT min(k) FROM kv)"), "kv has 39 rows, must have 40"),
    ("sqlite", database("INSERT INTO kv VALUES (x'00', x'00')"), "kv has 1 rows, must have 0"),
    ("unified-sqlite", database("UPDATE kv SET v = 'text'"), "must be blobs"),
    ("unified-sqlite", database("UPDATE kv SET k = x'01' WHERE k = (SELECT max(k) FROM kv)"), "no key of the encoding"),
    ("unified-sqlite", meta("key_encoding", "'utf8'"), "hash to other shards"),
    ("unified-sqlite", swapped, "hash to other shards"),
    ("unified-sqlite", foreign_ids, "are no keys of the shard: hits cannot be looked up"),
    ("unified-sqlite", foreign_ids, "have no vector of that id"),
    ("composite", foreign_ids, "shard 1: the vectors' ids 'zzk"),
    ("composite", swapped, "go to other shards by"),
    (
        "composite",
        lambda it: it.sharding(cel_columns={"key": "int"}, cel_expr="key % 3"),
        "keys are not of the type int",
    ),
    ("sqlite", swapped, "of 4 rows have the code of another shard"),
    ("unified-sqlite", with_vector(0.0), "1 vectors are zero"),
    ("sqlite", with_vector(np.nan), "1 vectors have NaN"),
]


@pytest.mark.parametrize(
    ("kind", "breaks", "fault"), BROKEN, ids=[f"{number}-{item[0]}-{item[2]}" for number, item in enumerate(BROKEN)]
)
def test_what_is_broken_is_named(
    kind: str, breaks: Callable[[Snapshot], None], fault: str, kinds: dict[str, Kind], tmp_path: Path
) -> None:
    snapshot = kinds[kind].publish(tmp_path / "root")
    breaks(snapshot)
    report = check_format(snapshot.root, sample=2)
    assert [found for found in report.faults if fault in found], report.faults


def test_ids_of_bytes_are_hex_digits(kinds: dict[str, Kind], tmp_path: Path) -> None:
    snapshot = kinds["composite"].publish(tmp_path / "root")
    hex_ids(snapshot)
    assert_format(snapshot.root)
    snapshot.rewrite(1, ids=[str(row_id).upper() for row_id in snapshot.shards[1].ids])
    assert [fault for fault in check_format(snapshot.root).faults if "are no keys of the shard" in fault]


@pytest.mark.parametrize("kind", ["unified-sqlite", "composite"])
def test_the_stock_writer_may_name_vectors_otherwise(kind: str, kinds: dict[str, Kind], tmp_path: Path) -> None:
    snapshot = kinds[kind].publish(tmp_path / "root")
    foreign_ids(snapshot)
    assert_format(snapshot.root, writer="stock")


def test_the_assertion_lists_the_faults(kinds: dict[str, Kind], tmp_path: Path) -> None:
    snapshot = kinds["sqlite"].publish(tmp_path / "root")
    snapshot.custom(num_probes=0, index_type=1)
    with pytest.raises(
        AssertionError, match=r"is not what a stock reader reads:\n- .*index_type is 1.*\n- .*num_probes is 0"
    ):
        assert_format(snapshot.root)


def test_a_copy_is_not_what_stock_would_read(kinds: dict[str, Kind], tmp_path: Path) -> None:
    snapshot = kinds["lance"].publish(tmp_path / "root")
    shutil.copytree(snapshot.root, tmp_path / "copy")
    assert "is not below" in only(check_format(tmp_path / "copy").faults)
    faults = check_format(tmp_path / "copy", manifest_key=MANIFEST_KEY).faults
    assert any("stock reads the shards of the original" in fault for fault in faults)


def test_sidecars_that_do_not_exist(kinds: dict[str, Kind], tmp_path: Path) -> None:
    snapshot = kinds["unified-sqlite"].publish(tmp_path / "root")
    snapshot.update("build_meta", "custom", "json_set(custom, '$.sqlite_sidecar', json('{}'))")
    assert len(check_format(snapshot.root).faults) == 3
    for db_id in range(3):
        (snapshot.folder(db_id) / "shard.sidecar").write_bytes(b"SQPC")
    assert_format(snapshot.root)


def test_two_layouts_in_one_directory(kinds: dict[str, Kind], tmp_path: Path) -> None:
    snapshot = kinds["lance"].publish(tmp_path / "root")
    snapshot.shards[1].write_database(snapshot.folder(1) / "shard.db", vectors=True)
    assert any("nothing says which one counts" in fault for fault in check_format(snapshot.root).faults)


# The formulas of the format, section 4.


@pytest.mark.parametrize(
    ("key", "digest"),
    [
        (0, 0xC77B3ABB6F87ACD9),
        (42, 0xD5A6F8C838DF27C8),
        (-1, 0x5111C7E47D784413),
        (2**63 - 1, 0xA233CF376558DF46),
        ("é", 0xF7940A006CF10CB3),
        ("", 0x2D06800538D394C2),
        (b"\x00\xff", 0xA99B043A346C8BF3),
    ],
)
def test_digests(key: int | str | bytes, digest: int) -> None:
    assert hash_of(key) == digest


@pytest.mark.parametrize(
    ("text", "column", "values", "num_dbs", "key", "shard"),
    [
        ("key % 4", "int", None, 4, 42, 2),
        ("key % 4", "int", None, 4, -3, None),
        ("shard_hash(key) % 8u", "int", None, 8, 42, 0),
        ("shard_hash(key) % 8u", "string", None, 8, "hello", 5),
        ("shard_hash(key) % 8u", "bytes", None, 8, b"hello", 5),
        ("key", "string", ["eu", "us"], 2, "us", 1),
        ("key", "string", ["eu", "us"], 2, "ap", None),
        ("key", "int", [5, 7, 9], 3, 7, 1),
        ("key", "string", None, 4, "3", 3),
        ("key", "string", None, 4, "three", None),
        ("key", "bytes", [{"__bytes_hex__": "6162"}], 1, b"ab", 0),
        ("1 / key", "int", None, 2, 0, None),
    ],
)
def test_expressions(text: str, column: str, values: Any, num_dbs: int, key: Any, shard: int | None) -> None:
    formula = CelFormula(text, {"key": column}, values, num_dbs)
    assert formula.problem() is None
    assert formula.shards("key", [key]) == [shard]
