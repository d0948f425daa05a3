"""Shards as SQLite files of the extension sqlite-vec: ``<shard>/shard.db``."""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.config import IndexParams
from sf_pipelines.snapshot.errors import IndexBuildError, IntegrityError, QueryError, ReaderClosedError
from sf_pipelines.snapshot.index.payloads import parse_payload
from sf_pipelines.snapshot.index.protocol import (
    BuildReport,
    IdArray,
    IdType,
    IndexFamily,
    ShardHits,
    VectorType,
)
from sf_pipelines.snapshot.index.ranking import Ids, find_ids, first_k, id_ranks, id_values, no_hits, take_ids
from sf_pipelines.snapshot.index.scan import MemoryScan, lengths_of
from sf_pipelines.snapshot.index.sqlite import CREATE_KV, FILE, SqliteFile, reading, writing
from sf_pipelines.snapshot.index.vec_file import EMBEDDING, VectorChunks, read_ids
from sf_pipelines.snapshot.metric import DistanceMetric, Float32

if TYPE_CHECKING:
    import apsw

_INDEX_TYPE = "SQLITE_VEC_SCAN"
_DISTANCES = {DistanceMetric.COSINE: "cosine", DistanceMetric.L2: "l2"}
# Rows turned into Python objects at a time.
_BATCH = 4_096
# Bytes of vectors read at a time where a shard is too large to be kept in memory.
_BLOCK_BYTES = 16 * 1024 * 1024
# Fixed by the extension.
_MAX_K = 4_096
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# The JSON is made in the database: quoting a million ids in Python takes longer than storing them.
_INSERT_ID = {
    "int": """INSERT INTO vec_id_map VALUES (?, '{"v": ' || ? || ', "t": "int"}')""",
    "str": """INSERT INTO vec_id_map VALUES (?, '{"v": ' || json_quote(?) || ', "t": "str"}')""",
}
_STORED_COLUMNS = frozenset({"id", "vector", "payload"})


class SqliteVecBackend:
    """The SQLite extension sqlite-vec. It has no index: every search is an exact scan."""

    name = "sqlite-vec"
    directory = FILE
    subfolder = ""
    metrics = frozenset(_DISTANCES)
    # There is no index. Searching 50,000 x 384 in memory takes 8 ms, reading them from the file each time 80.
    scan_bytes = sys.maxsize

    def build(
        self,
        rows: pa.Table,
        folder: Path,
        *,
        family: IndexFamily,
        metric: DistanceMetric,
        params: IndexParams,
        vector_type: VectorType = "float32",
    ) -> BuildReport:
        """Writes vectors, ids and payloads; see ``IndexBackend.build``. Family and parameters mean nothing here.

        A filter column ``c`` becomes a metadata column of ``vec_index``: ``boolean``, ``integer``, ``float`` or
        ``text``; dates are days and timestamps microseconds since 1970 (UTC), both ``integer``. The extension knows
        no null there, so a second, boolean column ``c__null`` tells: where it is 1, ``c`` is 0 or empty. NaN is null.
        """
        del family, params
        started = time.perf_counter()
        vectors = _checked_vectors(rows, folder, metric, vector_type)
        filters = _filter_columns(rows, folder)
        columns = [f"{EMBEDDING} float[{vectors.shape[1]}] distance_metric={_DISTANCES[metric]}"]
        columns += [f"{name} {kind}" for name, kind, _ in filters]
        quoted = ["rowid", EMBEDDING, *(f'"{name}"' for name, _, _ in filters)]
        names, marks = f"({', '.join(quoted)})", f"({', '.join('?' * len(quoted))})"
        with writing(folder) as connection:
            load_extension(connection)
            connection.execute(CREATE_KV)
            connection.execute(f"CREATE VIRTUAL TABLE vec_index USING vec0({', '.join(columns)})")
            connection.execute("CREATE TABLE vec_payloads (rowid INTEGER PRIMARY KEY, payload TEXT NOT NULL)")
            connection.execute("CREATE TABLE vec_id_map (internal_id INTEGER PRIMARY KEY, original_id TEXT NOT NULL)")
            numbers = pa.array(np.arange(rows.num_rows))
            arrays = [numbers, _blobs(vectors), *(values for _, _, values in filters)]
            connection.executemany(
                f"INSERT INTO vec_index {names} VALUES {marks}",  # noqa: S608 - made of names that were checked
                _tuples(arrays),
            )
            kind = "int" if pa.types.is_integer(rows.schema.field("id").type) else "str"
            connection.executemany(_INSERT_ID[kind], _tuples([numbers, rows.column("id")]))
            if "payload" in rows.column_names:
                given = rows.column("payload").is_valid()
                pairs = [numbers.filter(given.combine_chunks()), rows.column("payload").filter(given)]
                connection.executemany("INSERT INTO vec_payloads VALUES (?, ?)", _tuples(pairs))
            count: Any = connection.execute("SELECT count(*) FROM vec_index_rowids").get
        return BuildReport(rows.num_rows, count, _INDEX_TYPE, time.perf_counter() - started)

    def open(self, folder: Path, *, metric: DistanceMetric, dim: int, in_memory: bool = True) -> "SqliteVecShard":
        """Opens a local shard directory; see ``IndexBackend.open``.

        There is no index to ask: what is not kept in memory is searched in blocks that are read from the file each
        time.
        """
        file = SqliteFile(folder / FILE)
        try:
            return SqliteVecShard(file, metric, dim, in_memory=in_memory)
        except IntegrityError:
            file.close()
            raise


class SqliteVecShard:
    """An opened file; see ``ShardIndex``. Rows are referred to by their ``rowid``."""

    def __init__(self, file: SqliteFile, metric: DistanceMetric, dim: int, *, in_memory: bool) -> None:
        self._chunks = VectorChunks(file, dim)
        self._ids = read_ids(file, self._chunks.rowids)
        self.id_type: IdType = _id_type(self._ids)
        self.rows = self.indexed_rows = len(self._chunks.rowids)
        self._where = str(file.path)
        self._metric = metric
        self._dim = dim
        self._in_memory = in_memory
        self._ranks = id_ranks(self._ids)
        # Known once a vector was read, NaN before; inf where the vector is not finite.
        self._lengths = np.full(self.rows, np.nan)
        self._repeats = int(np.unique(self._ranks, return_counts=True)[1].max(initial=1))
        # Held while all vectors are read, so that threads on a cold shard read them once.
        self._lock = threading.RLock()
        self._file: SqliteFile | None = file
        self._scan: MemoryScan | None = None
        self._extended = False
        self._held = self._ids.nbytes + self._ranks.nbytes + 3 * self._chunks.rowids.nbytes

    @property
    def memory_bytes(self) -> int:
        """Vectors, ids and row numbers held."""
        if self._file is None:
            return 0
        scan = self._scan
        return self._held + (scan.nbytes if scan else 0)

    @property
    def in_memory(self) -> bool:
        """Whether a search is a scan of what is held already."""
        return self._scan is not None

    def warm(self) -> None:
        """Loads the vectors of a shard that is scanned in memory."""
        self.scan()

    def scan(self) -> MemoryScan | None:
        """The scan of a shard that is searched in memory; see ``ShardIndex.scan``."""
        return self._memory() if self._in_memory else None

    def search(self, queries: Float32, k: int) -> ShardHits:
        """Nearest rows with exact distances, by scan. A stranger's row that is no number is in no answer."""
        if self.rows == 0:
            with self._lock:
                self._opened()
            return no_hits(len(queries), self._ids)
        if self._in_memory:
            return self._memory().search(queries, k)
        return self._block_search(queries, min(k * self._repeats, self.rows))

    def _block_search(self, queries: Float32, k: int) -> ShardHits:
        """The scan in blocks: at any time one block of vectors and the best so far are in memory."""
        step = max(self._chunks.slots, _BLOCK_BYTES // (self._dim * 4) // self._chunks.slots * self._chunks.slots)
        best: ShardHits | None = None
        for start in range(0, self.rows, step):
            positions = np.arange(start, min(start + step, self.rows))
            found = self._scan_of(positions, positions, pa.array(self._ranks[positions])).search(queries, k)
            best = found if best is None else _nearest(best, found, k)
        if best is None:
            return no_hits(len(queries), self._ids)
        # Until here rows were positions and ids were ranks.
        hit = best.rows >= 0
        positions = best.rows[hit]
        values = id_values(take_ids(self._ids, positions))
        ids = np.full(hit.shape, 0 if values.dtype == np.int64 else None, dtype=values.dtype)
        ids[hit] = values
        best.rows[hit] = self._chunks.rowids[positions]
        return ShardHits(best.rows, ids, best.distances, best.counts)

    def search_raw(self, queries: Float32, k: int) -> ShardHits:
        """The extension's own search and distance (l2 is not squared); rows without a distance are left out.

        Raises:
            QueryError: ``k`` is above 4,096, which the extension refuses.
        """
        if k > _MAX_K:
            raise QueryError(f"top_k {k} is more than {_MAX_K}, the most that sqlite-vec itself searches for")
        sql = "SELECT rowid, distance FROM vec_index WHERE embedding MATCH ? AND k = ?"
        found: list[tuple[int, int, float]] = []
        with self._lock:
            file = self._opened()
            if not self._extended:
                with reading(file.path):
                    load_extension(file.connection)
                self._extended = True
            for number, query in enumerate(queries):
                blob = query.astype("<f4").tobytes()
                found += [(number, row, score) for row, score in file.query(sql, (blob, k)) if score is not None]
        query, rows, distances = (np.array(part) for part in zip(*found, strict=True)) if found else [np.empty(0)] * 3
        best = first_k(query.astype(np.int64), distances.astype(np.float64), np.arange(len(found)), len(queries), k)
        rows = rows.astype(np.int64)[best.flat]
        return best.hits(rows, take_ids(self._ids, self._positions(rows)), distances)

    def payloads(self, rows: NDArray[np.int64]) -> list[dict[str, Any] | None]:
        """Payload of each row, parsed; text that is no JSON object gives None."""
        sql = "SELECT rowid, payload FROM vec_payloads WHERE rowid IN (SELECT value FROM json_each(?))"
        with self._lock:
            texts = dict(self._opened().query_within(sql, (json.dumps(rows.tolist()),)))
        return [parse_payload(texts.get(row)) for row in rows.tolist()]

    def vectors(self, rows: NDArray[np.int64]) -> Float32:
        """Stored vectors."""
        positions, scan = self._positions(rows), self._scan
        if scan is not None and len(scan.rows) == self.rows:
            return scan.vectors[positions]
        with self._lock:
            self._opened()
            return self._chunks.vectors(positions)

    def find(self, ids: Sequence[int | str]) -> NDArray[np.int64]:
        """Row references by id."""
        with self._lock:
            self._opened()
            return find_ids(ids, self._ids, self._chunks.rowids)

    def sample(self, n: int) -> tuple[IdArray, Float32]:
        """Evenly spaced rows."""
        positions = np.unique(np.linspace(0, self.rows - 1, min(n, self.rows)).astype(np.int64))
        with self._lock:
            self._opened()
            return id_values(take_ids(self._ids, positions)), self._chunks.vectors(positions)

    def close(self) -> None:
        """Closes the file and lets go of everything held in memory."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = self._scan = None

    def _opened(self) -> SqliteFile:
        if self._file is None:
            raise ReaderClosedError(f"the shard in {self._where} was closed")
        return self._file

    def _memory(self) -> MemoryScan:
        scan = self._scan
        if scan is not None:
            return scan
        with self._lock:
            if self._scan is None:
                self._scan = self._scan_of(np.arange(self.rows), self._chunks.rowids, self._ids)
            return self._scan

    def _scan_of(self, positions: NDArray[np.int64], rows: NDArray[np.int64], ids: Ids) -> MemoryScan:
        """A scan over these positions."""
        with self._lock:
            self._opened()
            vectors = self._chunks.vectors(positions)
        lengths = self._lengths[positions]
        if np.isnan(lengths).any():
            lengths = self._lengths[positions] = np.nan_to_num(lengths_of(vectors), nan=np.inf, posinf=np.inf)
        return MemoryScan(ids, rows, vectors, self._metric, lengths)

    def _positions(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where these rows are in ``rowids``."""
        at = np.searchsorted(self._chunks.rowids, rows)
        known = at < self.rows
        known[known] = self._chunks.rowids[at[known]] == np.asarray(rows)[known]
        if not known.all():
            raise IntegrityError(f"{self._where}: {(~known).sum()} of {len(rows)} rows are gone")
        return at


def load_extension(connection: "apsw.Connection") -> None:
    """Loads sqlite-vec into a connection, and nothing after it."""
    import sqlite_vec

    connection.enable_load_extension(True)
    try:
        connection.load_extension(sqlite_vec.loadable_path())
    finally:
        connection.enable_load_extension(False)


def _checked_vectors(rows: pa.Table, folder: Path, metric: DistanceMetric, vector_type: VectorType) -> Float32:
    """The vectors as float32, shape (rows, dim)."""
    if rows.num_rows == 0:
        raise IndexBuildError(f"{folder}: a shard without rows has no index; leave it out of the manifest")
    if metric not in _DISTANCES:
        names = ", ".join(_DISTANCES)
        raise IndexBuildError(f"{folder}: sqlite-vec has no metric {metric.value}; it has {names}. Or use lancedb")
    if vector_type != "float32":
        raise IndexBuildError(f"{folder}: sqlite-vec stores float32, not {vector_type}")
    column: Any = rows.column("vector").combine_chunks()
    if column.null_count:
        raise IndexBuildError(f"{folder}: {column.null_count} of {rows.num_rows} rows have no vector")
    flat = column.flatten().to_numpy(zero_copy_only=False)
    vectors = flat.astype("<f4", copy=False).reshape(rows.num_rows, -1)
    strange = ~np.isfinite(vectors).all(axis=1)
    if strange.any():
        raise IndexBuildError(f"{folder}: {_rows(rows, strange)}: the vector has a number that is not finite")
    if metric.normalises:
        zero = ~vectors.any(axis=1)
        if zero.any():
            raise IndexBuildError(f"{folder}: {_rows(rows, zero)}: a zero vector has no direction under {metric.value}")
    return vectors


def _rows(rows: pa.Table, which: NDArray[np.bool_]) -> str:
    first = int(np.flatnonzero(which)[0])
    return f"{which.sum()} rows, the first with id {rows.column('id')[first].as_py()!r}"


def _filter_columns(rows: pa.Table, folder: Path) -> list[tuple[str, str, pa.Array]]:
    """Name, declared type and values of each metadata column: those of the user, each with its column of nulls."""
    out: list[tuple[str, str, pa.Array]] = []
    for name in rows.column_names:
        if name in _STORED_COLUMNS:
            continue
        if not _NAME.fullmatch(name):
            raise IndexBuildError(f"{folder}: filter column {name!r} cannot be a column of sqlite-vec")
        kind, values = _metadata(rows.column(name).combine_chunks(), name, folder)
        out.append((name, kind, values.fill_null("" if kind == "text" else 0)))
        out.append((f"{name}__null", "boolean", values.is_null().cast(pa.int8())))
    return out


def _metadata(values: pa.Array, name: str, folder: Path) -> tuple[str, pa.Array]:
    """Declared type of a metadata column, and its values as that."""
    kind = values.type
    if pa.types.is_boolean(kind):
        return "boolean", values.cast(pa.int8())
    if pa.types.is_date(kind):
        return "integer", values.cast(pa.date32()).cast(pa.int32())
    if pa.types.is_timestamp(kind):
        # Nanoseconds below a microsecond are cut off.
        return "integer", values.cast(pa.timestamp("us", kind.tz), safe=False).cast(pa.int64())
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return "integer", values
    if pa.types.is_floating(kind):
        wide = values.cast(pa.float64())
        return "float", pa.array(wide.to_numpy(zero_copy_only=False), from_pandas=True)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text", values
    raise IndexBuildError(f"{folder}: filter column {name!r} is {kind}, which sqlite-vec cannot store")


def _blobs(vectors: Float32) -> pa.Array:
    """Each vector's bytes, without a copy."""
    contiguous = np.ascontiguousarray(vectors)
    kind = pa.binary(contiguous.shape[1] * contiguous.itemsize)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(contiguous), [None, pa.py_buffer(contiguous)])


def _tuples(columns: Sequence[pa.Array | pa.ChunkedArray]) -> Iterator[tuple[Any, ...]]:
    """The values of each row."""
    for start in range(0, len(columns[0]), _BATCH):
        yield from zip(*(column.slice(start, _BATCH).to_pylist() for column in columns), strict=True)


def _id_type(ids: pa.Array | IdArray) -> IdType:
    if isinstance(ids, np.ndarray):
        return "mixed"
    return "int64" if pa.types.is_integer(ids.type) else "string"


def _nearest(one: ShardHits, other: ShardHits, k: int) -> ShardHits:
    """The k best of two answers to the same queries, whose ids are ranks."""
    rows = np.concatenate([one.rows, other.rows], axis=1)
    hit = rows >= 0
    query = np.broadcast_to(np.arange(len(rows))[:, None], rows.shape)[hit]
    distances = np.concatenate([one.distances, other.distances], axis=1)[hit]
    ranks = np.concatenate([one.ids, other.ids], axis=1)[hit]
    best = first_k(query, distances, ranks, len(rows), k)
    return best.hits(rows[hit][best.flat], pa.array(ranks[best.flat]), distances)
