"""Snapshots of every kind by a minimal writer that uses nothing of the package, and ways to break them."""

import json
import shutil
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import apsw
import lancedb
import numpy as np
import pyarrow as pa
import sqlite_vec
import xxhash
from lancedb.index import HnswPq, IvfFlat, IvfSq
from numpy.typing import NDArray

DIM = 8
NUM_DBS = 3
ROWS = 90
RUN_ID = "run-1"
MOMENT = "2026-11-22T12:00:00.000000Z"
MANIFEST_KEY = f"manifests/{MOMENT}_run_id={RUN_ID}/manifest"
KINDS = ("lance", "sqlite", "unified-sqlite", "composite")
GONE = object()
_TABLES = """
CREATE TABLE build_meta (run_id TEXT, created_at TEXT, num_dbs INTEGER, s3_prefix TEXT, key_col TEXT, sharding TEXT,
    db_path_template TEXT, shard_prefix TEXT, format_version INTEGER, key_encoding TEXT, custom TEXT);
CREATE TABLE shards (db_id INTEGER, db_url TEXT, attempt INTEGER, row_count INTEGER, db_bytes INTEGER, min_key TEXT,
    max_key TEXT, checkpoint_id TEXT, writer_info TEXT);
"""


@dataclass
class Shard:
    """Rows of one shard and how to write them; every field can be changed before ``write``."""

    ids: list[Any]
    vectors: NDArray[np.float32]
    metric: str
    keys: list[bytes] | None = None
    payloads: list[str | None] | None = None
    index: Any = None
    columns: dict[str, Any] = field(default_factory=dict)
    vector_type: Any = None
    ddl: dict[str, str] = field(default_factory=dict)

    def take(self, rows: list[int]) -> "Shard":
        """Some of the rows."""
        keys = None if self.keys is None else [self.keys[row] for row in rows]
        return Shard([self.ids[row] for row in rows], self.vectors[rows], self.metric, keys)

    def payload_texts(self) -> list[str | None]:
        """Payloads as stored."""
        return self.payloads or [json.dumps({"n": str(row_id)}) for row_id in self.ids]

    def write_lance(self, folder: Path) -> None:
        """The table with its index; ``index`` False leaves that out."""
        kind = self.vector_type or pa.float32()
        flat = pa.array(self.vectors.astype(kind.to_pandas_dtype()).ravel(), kind)
        columns: dict[str, Any] = {
            "id": pa.array(self.ids),
            "vector": pa.FixedSizeListArray.from_arrays(flat, self.vectors.shape[1]),
            "payload": pa.array(self.payload_texts(), pa.string()),
        } | self.columns
        rows = pa.table({name: column for name, column in columns.items() if column is not GONE})
        table = lancedb.connect(str(folder)).create_table("vector_index", rows)
        if self.index is not False:
            distance: Any = {"dot_product": "dot"}.get(self.metric, self.metric)
            config = self.index or IvfFlat(distance_type=distance, num_partitions=1)
            table.create_index("vector", config=config, name="vector_idx")

    def write_database(self, path: Path, *, vectors: bool) -> None:
        """``shard.db``; ``ddl`` replaces statements by table."""
        path.parent.mkdir(parents=True, exist_ok=True)
        database = apsw.Connection(str(path))
        database.enable_load_extension(True)
        database.load_extension(sqlite_vec.loadable_path())
        statements = {"kv": "CREATE TABLE kv (k BLOB PRIMARY KEY, v BLOB NOT NULL) WITHOUT ROWID"}
        if vectors:
            statements["vec_index"] = (
                f"CREATE VIRTUAL TABLE vec_index USING vec0(embedding float[{DIM}] distance_metric={self.metric})"
            )
            statements["vec_payloads"] = "CREATE TABLE vec_payloads (rowid INTEGER PRIMARY KEY, payload TEXT NOT NULL)"
            statements["vec_id_map"] = (
                "CREATE TABLE vec_id_map (internal_id INTEGER PRIMARY KEY, original_id TEXT NOT NULL)"
            )
        with database:
            for statement in (statements | self.ddl).values():
                database.execute(statement)
            for key in self.keys or []:
                database.execute("INSERT INTO kv VALUES (?, ?)", (key, b"value of " + key))
            for row, row_id in enumerate(self.ids if vectors else []):
                name = {"v": row_id, "t": type(row_id).__name__}
                data = self.vectors[row].astype("<f4").tobytes()
                database.execute("INSERT INTO vec_index(rowid, embedding) VALUES (?, ?)", (row, data))
                database.execute("INSERT INTO vec_id_map VALUES (?, ?)", (row, json.dumps(name)))
                database.execute("INSERT INTO vec_payloads VALUES (?, ?)", (row, self.payload_texts()[row]))
        database.close()


@dataclass
class Snapshot:
    """A published snapshot on disk.

    Attributes:
        root: its folder.
        kind: one of ``KINDS``.
        shards: its rows, by shard.
        url: address of the root.
    """

    root: Path
    kind: str
    shards: list[Shard]
    url: str

    @property
    def manifest(self) -> Path:
        """The manifest's file."""
        return self.root / MANIFEST_KEY

    def folder(self, db_id: int) -> Path:
        """Directory of a shard."""
        return self.root / shard_key(db_id)

    def sql(self, *statements: str) -> None:
        """Changes the manifest."""
        with closing(sqlite3.connect(self.manifest)) as database, database:
            for statement in statements:
                database.execute(statement)

    def update(self, table: str, field: str, expression: str, where: str = "1") -> None:
        """Sets a field of the manifest to an SQL expression."""
        self.sql(f"UPDATE {table} SET {field} = {expression} WHERE {where}")  # noqa: S608 (a test's own text)

    def recount(self, db_id: int, rows: int) -> None:
        """Sets rows and bytes of a shard to what its directory holds."""
        with closing(sqlite3.connect(self.manifest)) as database, database:
            counts = (rows, weight(self.folder(db_id)), db_id)
            database.execute("UPDATE shards SET row_count = ?, db_bytes = ? WHERE db_id = ?", counts)

    def custom(self, **changes: Any) -> None:
        """Changes fields of ``custom.vector``; ``GONE`` removes one."""
        with closing(sqlite3.connect(self.manifest)) as database, database:
            custom = json.loads(database.execute("SELECT custom FROM build_meta").fetchone()[0])
            vector = custom["vector"] | changes
            custom["vector"] = {name: value for name, value in vector.items() if value is not GONE}
            database.execute("UPDATE build_meta SET custom = ?", (json.dumps(custom),))

    def sharding(self, **changes: Any) -> None:
        """Replaces fields of the sharding record."""
        with closing(sqlite3.connect(self.manifest)) as database, database:
            record = json.loads(database.execute("SELECT sharding FROM build_meta").fetchone()[0]) | changes
            kept = {name: value for name, value in record.items() if value is not GONE}
            database.execute("UPDATE build_meta SET sharding = ?", (json.dumps(kept),))

    def pointer(self, **changes: Any) -> None:
        """Changes fields of ``_CURRENT``."""
        path = self.root / "_CURRENT"
        fields = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in fields.items() if value is not GONE}))

    def rewrite(self, db_id: int, **changes: Any) -> None:
        """Writes a shard again, otherwise, and lets the manifest count it."""
        shard = self.shards[db_id]
        for name, value in changes.items():
            setattr(shard, name, value)
        shutil.rmtree(self.folder(db_id))
        write_shard(shard, self.folder(db_id), self.kind)
        self.recount(db_id, len(shard.ids))

    def database(self, db_id: int, *statements: str) -> None:
        """Changes a shard's database and lets the manifest weigh it."""
        path = self.folder(db_id) / "shard.db"
        database = apsw.Connection(str(path))
        database.enable_load_extension(True)
        database.load_extension(sqlite_vec.loadable_path())
        for statement in statements:
            database.execute(statement).fetchall()
        database.close()
        self.recount(db_id, len(self.shards[db_id].ids))


def shard_key(db_id: int) -> str:
    """Directory of a shard below the root."""
    return f"shards/run_id={RUN_ID}/db={db_id:05d}/attempt=00"


def weight(folder: Path) -> int:
    """``db_bytes`` of a shard's directory."""
    database = folder / "shard.db"
    files = [database] if database.exists() else [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def write_shard(shard: Shard, folder: Path, kind: str) -> None:
    """One shard's directory in the layout of the kind."""
    if kind != "lance":
        shard.write_database(folder / "shard.db", vectors=kind != "composite")
    if kind == "lance":
        shard.write_lance(folder)
    if kind == "composite":
        shard.write_lance(folder / "vector")


class Kind:
    """Rows, routing and shards of one kind of snapshot, made once and published as often as needed."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.folder = folder
        rng = np.random.default_rng(KINDS.index(kind))
        vectors = (
            rng.standard_normal((ROWS, DIM)) + 4 * rng.standard_normal((NUM_DBS, DIM))[np.arange(ROWS) % 3]
        ).astype(np.float32)
        self.array, shard_of, whole = _ROUTED[kind](vectors, rng)
        self.shards = [whole.take(np.flatnonzero(shard_of == db_id).tolist()) for db_id in range(NUM_DBS)]
        assert all(shard.ids for shard in self.shards)
        for db_id, shard in enumerate(self.shards):
            write_shard(shard, folder / shard_key(db_id), kind)

    def publish(self, root: Path, url: str | None = None) -> Snapshot:
        """Copies the shards below ``root`` and writes routing, manifest and pointer for ``url``."""
        shutil.copytree(self.folder, root, dirs_exist_ok=True)
        url = url or f"file://{quote(str(root), safe='/:=@+,~')}"
        snapshot = Snapshot(root, self.kind, [shard.take(list(range(len(shard.ids)))) for shard in self.shards], url)
        vector: dict[str, Any] = {"dim": DIM, "metric": self.shards[0].metric}
        encoding, sharding, key_col = "raw", {"strategy": "hash", "hash_algorithm": "xxh3_64"}, "_vector_id"
        if self.array is not None:
            name = {"lance": "centroids", "sqlite": "hyperplanes"}[self.kind]
            key = f"vector_meta/run_id={RUN_ID}/{name}.npy"
            (root / key).parent.mkdir(parents=True)
            np.save(root / key, self.array)
            vector |= {"num_probes": 2, f"{name}_ref": f"{url}/{key}"}
            vector |= {"sharding_strategy": "cluster"} if self.kind == "lance" else {}
            vector |= {"sharding_strategy": "lsh", "num_hash_bits": len(self.array)} if self.kind == "sqlite" else {}
        elif self.kind == "unified-sqlite":
            vector |= {"unified": True, "backend": "sqlite-vec", "kv_backend": "sqlite-vec"}
            encoding, key_col = "u64be", "_key"
        else:
            vector |= {"unified": True, "backend": "lancedb", "kv_backend": "sqlite"}
            encoding, key_col = "utf8", "_key"
            sharding |= {"strategy": "cel", "cel_expr": _FORMULA, "cel_columns": {"key": "string"}}
        meta = (RUN_ID, MOMENT, NUM_DBS, url, key_col, json.dumps(sharding), "db={db_id:05d}", "shards", 4, encoding)
        meta = (*meta, json.dumps({"vector": vector}))
        snapshot.manifest.parent.mkdir(parents=True)
        with closing(sqlite3.connect(snapshot.manifest)) as database, database:
            database.executescript(_TABLES)
            database.execute("INSERT INTO build_meta VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", meta)
            for db_id, shard in enumerate(snapshot.shards):
                size = weight(snapshot.folder(db_id))
                row = (db_id, f"{url}/{shard_key(db_id)}", 0, len(shard.ids), size, None, None, uuid.uuid4().hex, "{}")
                database.execute("INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        pointer = {"manifest_ref": f"{url}/{MANIFEST_KEY}", "manifest_content_type": "application/x-sqlite3"}
        pointer |= {"run_id": RUN_ID, "updated_at": MOMENT}
        (root / "_CURRENT").write_text(json.dumps(pointer))
        return snapshot


_FORMULA = f"shard_hash(key) % {NUM_DBS}u"
Routed = tuple[NDArray[np.float32] | None, NDArray[np.int64], Shard]


def _digests(data: list[bytes]) -> NDArray[np.int64]:
    return np.array([xxhash.xxh3_64_intdigest(item) % NUM_DBS for item in data])


def _clustered(vectors: NDArray[np.float32], _rng: np.random.Generator) -> Routed:
    centroids = np.stack([vectors[number::3].mean(axis=0) for number in range(NUM_DBS)])
    products = vectors @ centroids.T / np.linalg.norm(centroids, axis=1)
    return centroids, products.argmax(axis=1), Shard(list(range(ROWS)), vectors, "cosine")


def _hyperplanes(vectors: NDArray[np.float32], rng: np.random.Generator) -> Routed:
    planes = rng.standard_normal((4, DIM)).astype(np.float32)
    codes = ((vectors @ planes.T) > 0) @ (1 << np.arange(4))
    ids = [number if number % 2 else f"s{number}" for number in range(ROWS)]
    return planes, codes % NUM_DBS, Shard(ids, vectors, "l2")


def _hashed(vectors: NDArray[np.float32], _rng: np.random.Generator) -> Routed:
    ids = list(range(ROWS))
    shard_of = _digests([number.to_bytes(8, "little") for number in ids])
    return None, shard_of, Shard(ids, vectors, "cosine", [number.to_bytes(8, "big") for number in ids])


def _composite(vectors: NDArray[np.float32], _rng: np.random.Generator) -> Routed:
    ids = [f"k{number}" for number in range(ROWS)]
    keys = [name.encode() for name in ids]
    return None, _digests(keys), Shard(ids, vectors, "dot_product", keys)


_ROUTED: dict[str, Callable[[NDArray[np.float32], np.random.Generator], Routed]] = {
    "lance": _clustered,
    "sqlite": _hyperplanes,
    "unified-sqlite": _hashed,
    "composite": _composite,
}


def scalar_index(metric: str) -> Any:
    """8-bit index of another family."""
    return IvfSq(distance_type=metric, num_partitions=1)  # pyright: ignore[reportArgumentType]  (a str by name)


def coarse_index(metric: str) -> Any:
    """Product codes; under 256 rows it covers none."""
    return HnswPq(distance_type=metric, num_partitions=1, num_sub_vectors=1)  # pyright: ignore[reportArgumentType]


def flat_index(metric: str) -> Any:
    """The exact index with any distance."""
    return IvfFlat(distance_type=metric, num_partitions=1)  # pyright: ignore[reportArgumentType]
