"""Shards as SQLite files of the extension sqlite-vec: ``<shard>/shard.db``.

sqlite-vec 0.1.9 keeps chunks of 1,024 vectors in one blob each, with row numbers and a bitmap of the slots in use. It
has no index, so numpy reads them without the extension: searches are three times faster. Sizes are checked first.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from sf_pipelines.snapshot.arrow import is_text, vectors_of
from sf_pipelines.snapshot.config import IndexParams
from sf_pipelines.snapshot.errors import IndexBuildError, IntegrityError, QueryError
from sf_pipelines.snapshot.index.protocol import STORED_COLUMNS, IndexFamily, ShardIndex, VectorType
from sf_pipelines.snapshot.index.ranking import Ids, Int64, ShardHits, first_k, id_ranks, take_ids
from sf_pipelines.snapshot.index.scan import MemoryScan, lengths_of
from sf_pipelines.snapshot.index.sqlite import CREATE_KV, FILE, SqliteFile, writing
from sf_pipelines.snapshot.metric import DistanceMetric, Float32

if TYPE_CHECKING:
    import apsw

EMBEDDING = "embedding"
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
# Columns, see ``SqliteFile.require``.
_TABLES = {
    "vec_index_info": "key, value",
    "vec_index_chunks": "chunk_id INTEGER PRIMARY KEY, size INTEGER, validity BLOB, rowids BLOB",
    "vec_index_rowids": "rowid INTEGER PRIMARY KEY, id, chunk_id INTEGER, chunk_offset INTEGER",
    "vec_index_vector_chunks00": "rowid, vectors BLOB",
    "vec_payloads": "rowid INTEGER PRIMARY KEY, payload TEXT",
    "vec_id_map": "internal_id INTEGER PRIMARY KEY, original_id TEXT",
}
_DECLARED = re.compile(
    r"""\s*CREATE\s+VIRTUAL\s+TABLE\s+["'`\[]?vec_index["'`\]]?\s+USING\s+vec0\s*\((.*)\)\s*;?\s*""",
    re.IGNORECASE | re.DOTALL,
)
_VECTOR_COLUMN = re.compile(
    rf"{EMBEDDING}\s+(?:float|float32|f32)\s*\[\s*(\d{{1,6}})\s*\](?:\s+distance_metric\s*=\s*(\w+))?", re.IGNORECASE
)
_OTHER_COLUMN = re.compile(r"\w+\s+(?:integer|int|boolean|bool|float|double|text)|chunk_size\s*=\s*\d+", re.IGNORECASE)
_SIZES = """
SELECT c.chunk_id, c.size, typeof(c.validity), length(c.validity), typeof(c.rowids), length(c.rowids),
       typeof(v.vectors), length(v.vectors)
FROM vec_index_chunks c LEFT JOIN vec_index_vector_chunks00 v ON v._rowid_ = c.chunk_id
ORDER BY c.chunk_id LIMIT ?
"""
# An int that is none comes back as bytes, which are no id.
_IDS = """
SELECT internal_id, CASE json_extract(original_id, '$.t')
    WHEN 'int' THEN CASE json_type(original_id, '$.v')
        WHEN 'integer' THEN json_extract(original_id, '$.v') ELSE CAST(original_id AS BLOB) END
    ELSE CAST(json_extract(original_id, '$.v') AS TEXT) END
FROM vec_id_map ORDER BY internal_id LIMIT ?
"""
# Slots of a chunk: sqlite-vec takes multiples of 8 up to 4,096.
_MAX_SLOTS = 4_096


class SqliteVecShard(ShardIndex):
    """The SQLite extension sqlite-vec. It has no index: every search is an exact scan.

    Vectors that are not kept in memory are read from the file in blocks by each search. Rows are referred to by their
    ``rowid``.
    """

    name = "sqlite-vec"
    directory = FILE
    subfolder = ""
    metrics = frozenset(_DISTANCES)
    # There is no index. Searching 50,000 x 384 in memory takes 8 ms, reading them from the file each time 80.
    scan_bytes = sys.maxsize

    @classmethod
    def _write(
        cls,
        rows: pa.Table,
        folder: Path,
        family: IndexFamily,
        metric: DistanceMetric,
        params: IndexParams,
        vector_type: VectorType,
    ) -> int:
        """Vectors, ids and payloads. Family and parameters mean nothing here.

        A filter column ``c`` becomes a metadata column of ``vec_index``: ``boolean``, ``integer``, ``float`` or
        ``text``; dates are days and timestamps microseconds since 1970 (UTC), both ``integer``. The extension knows
        no null there: a null or NaN is 0 or empty, and a second, boolean column ``c__null`` is 1.
        """
        del family, params, vector_type
        vectors = _checked_vectors(rows, folder, metric)
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
            stored: Any = connection.execute("SELECT count(*) FROM vec_index_rowids").get
        return stored

    @classmethod
    def open(cls, folder: Path, *, metric: DistanceMetric, dim: int, in_memory: bool = True) -> Self:
        file = SqliteFile(folder / FILE)
        try:
            return cls(file, metric, dim, in_memory=in_memory)
        except IntegrityError:
            file.close()
            raise

    def __init__(self, file: SqliteFile, metric: DistanceMetric, dim: int, *, in_memory: bool) -> None:
        super().__init__(file.path, metric, dim, scans=in_memory)
        self._file = file
        self._chunks = VectorChunks(file, dim)
        ids = self._ids = _read_ids(file, self._chunks.rowids)
        if isinstance(ids, np.ndarray):
            self.id_type = "mixed"
        else:
            self.id_type = "int64" if pa.types.is_integer(ids.type) else "string"
        self.rows = self.indexed_rows = len(self._chunks.rowids)
        self._ranks = id_ranks(ids)
        self._repeats = int(np.unique(self._ranks, return_counts=True)[1].max(initial=1))
        # Known once a vector was read, NaN before; inf where the vector is not finite.
        self._lengths = np.full(self.rows, np.nan)
        self._extended = False
        self._held = ids.nbytes + self._ranks.nbytes + 3 * self._chunks.rowids.nbytes

    def _search_file(self, queries: Float32, k: int) -> ShardHits:
        """The scan in blocks: at any time one block of vectors and the best so far are in memory."""
        shape = len(queries), min(k * self._repeats, self.rows)
        step = max(self._chunks.slots, _BLOCK_BYTES // (self._dim * 4) // self._chunks.slots * self._chunks.slots)
        query, at, distances = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
        for start in range(0, self.rows, step):
            positions = np.arange(start, min(start + step, self.rows))
            scan = self._scan_of(positions, positions, self._ranks[positions])
            found = scan.candidates(queries, shape[1])
            query, at = np.append(query, found.query), np.append(at, scan.rows[found.position])
            distances = np.append(distances, scan.distances(queries, found.query, found.position))
            best = first_k(query, distances, self._ranks[at], *shape)
            query, at, distances = query[best], at[best], distances[best]
        return ShardHits.of(query, self._chunks.rowids[at], take_ids(self._ids, at), distances, shape)

    def search_raw(self, queries: Float32, k: int) -> ShardHits:
        """The extension's own search and distance (l2 is not squared); rows without a distance are left out."""
        if k > _MAX_K:
            raise QueryError(f"top_k {k} is more than {_MAX_K}, the most that sqlite-vec itself searches for")
        sql = "SELECT rowid, distance FROM vec_index WHERE embedding MATCH ? AND k = ?"
        found: list[tuple[int, int, float]] = []
        with self._file.connection() as connection:
            if not self._extended:
                load_extension(connection)
                self._extended = True
            for number, query in enumerate(queries.astype("<f4")):
                hits = connection.execute(sql, (query.tobytes(), k))
                found += [(number, row, distance) for row, distance in hits if distance is not None]
        query, rows = (np.array([hit[n] for hit in found], dtype=np.int64) for n in range(2))
        distances = np.array([hit[2] for hit in found])
        best = first_k(query, distances, np.arange(len(found)), len(queries), k)
        ids = take_ids(self._ids, self._positions(rows[best]))
        return ShardHits.of(query[best], rows[best], ids, distances[best], (len(queries), k))

    def close(self) -> None:
        self._file.close()
        super().close()

    def _payload_texts(self, rows: Int64) -> list[Any]:
        sql = "SELECT rowid, payload FROM vec_payloads WHERE rowid IN (SELECT value FROM json_each(?))"
        texts = dict(self._file.query_within(sql, (json.dumps(rows.tolist()),)))
        return [texts.get(row) for row in rows.tolist()]

    def _read_vectors(self, rows: Int64) -> Float32:
        return self._chunks.vectors(self._positions(rows))

    def _read_ids(self) -> tuple[Ids, Int64]:
        with self._file.connection():
            return self._ids, self._chunks.rowids

    def _read_scan(self) -> MemoryScan:
        return self._scan_of(np.arange(self.rows), self._chunks.rowids, self._ids)

    def _scan_of(self, positions: Int64, rows: Int64, ids: Ids) -> MemoryScan:
        vectors = self._chunks.vectors(positions)
        lengths = self._lengths[positions]
        if np.isnan(lengths).any():
            lengths = self._lengths[positions] = np.nan_to_num(lengths_of(vectors), nan=np.inf, posinf=np.inf)
        return MemoryScan(ids, rows, vectors, self._metric, lengths)

    def _positions(self, rows: Int64) -> Int64:
        """Where these rows are in ``rowids``."""
        at = np.searchsorted(self._chunks.rowids, rows)
        if not np.array_equal(self._chunks.rowids[np.minimum(at, self.rows - 1)], rows):
            raise IntegrityError(f"{self._where}: rows of 'vec_index' are in none of its chunks")
        return at


def load_extension(connection: "apsw.Connection") -> None:
    """Loads sqlite-vec into a connection, and nothing after it."""
    import sqlite_vec

    connection.enable_load_extension(True)
    try:
        connection.load_extension(sqlite_vec.loadable_path())
    finally:
        connection.enable_load_extension(False)


def _checked_vectors(rows: pa.Table, folder: Path, metric: DistanceMetric) -> Float32:
    """The vectors, each of which has a distance: the extension would store others, and give them no hit."""
    if missing := rows.column("vector").null_count:
        raise IndexBuildError(f"{folder}: {missing} of {rows.num_rows} rows have no vector")
    vectors = vectors_of(rows)
    faults = {"the vector has a number that is not finite": ~np.isfinite(vectors).all(axis=1)}
    if metric.normalises:
        faults[f"a zero vector has no direction under {metric.value}"] = ~vectors.any(axis=1)
    for fault, which in faults.items():
        if which.any():
            first = rows.column("id")[int(np.argmax(which))].as_py()
            raise IndexBuildError(f"{folder}: {which.sum()} rows, the first with id {first!r}: {fault}")
    return vectors


def _filter_columns(rows: pa.Table, folder: Path) -> list[tuple[str, str, pa.Array]]:
    """Name, declared type and values of each metadata column: those of the user, each with its column of nulls."""
    out: list[tuple[str, str, pa.Array]] = []
    for name in rows.column_names:
        if name in STORED_COLUMNS:
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
    if is_text(kind):
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


class VectorChunks:
    """Where each vector of a file lies. Thread-safe.

    Args:
        file: opened.
        dim: numbers of a vector, as the manifest says.

    Attributes:
        rowids: row numbers, ascending, shape (rows,).
        slots: vectors of a chunk.

    Raises:
        IntegrityError: the file has other tables, sizes or dimension.
    """

    def __init__(self, file: SqliteFile, dim: int) -> None:
        self._file = file
        self._dim = dim
        _check_declaration(file, dim)
        for name, columns in _TABLES.items():
            file.require(name, columns)
        self._chunks, self.slots = self._check_sizes()
        used, rowids = self._read_layout()
        order = np.argsort(rowids, kind="stable")
        self.rowids = rowids[order]
        self._places = used[order]
        if len(rowids) and (np.diff(self.rowids) == 0).any():
            raise IntegrityError(f"{file.path}: table 'vec_index_chunks' names a row twice")

    def _check_sizes(self) -> tuple[list[int], int]:
        """Numbers of the chunks, and slots of each; all sizes are checked before any blob is read."""
        path, width = self._file.path, self._dim * 4
        most = self._file.size // (8 * width) + 1
        found = self._file.query(_SIZES, (most + 1,))
        slots: Any = found[0][1] if found else 8
        if not isinstance(slots, int) or slots % 8 or not 0 < slots <= _MAX_SLOTS:
            raise IntegrityError(f"{path}: table 'vec_index_chunks' has chunks of {slots!r} vectors")
        expected = (slots, "blob", slots // 8, "blob", slots * 8, "blob", slots * width)
        for chunk, *sizes in found:
            if tuple(sizes) != expected:
                raise IntegrityError(f"{path}: chunk {chunk} of 'vec_index' is {sizes}; expected {list(expected)}")
        if len(found) * slots * width > self._file.size:
            raise IntegrityError(f"{path}: {len(found)} chunks of {slots} vectors have no room in the file")
        return [row[0] for row in found], slots

    def _read_layout(self) -> tuple[Int64, Int64]:
        """Places in use (slots of all chunks, counted through) and the row number in each."""
        blobs = self._file.query(
            "SELECT validity, rowids FROM vec_index_chunks ORDER BY chunk_id LIMIT ?", (len(self._chunks),)
        )
        valid = np.frombuffer(b"".join(validity for validity, _ in blobs), dtype=np.uint8)
        used = np.flatnonzero(np.unpackbits(valid, bitorder="little")).astype(np.int64)
        return used, np.frombuffer(b"".join(rowids for _, rowids in blobs), dtype="<i8")[used].astype(np.int64)

    def vectors(self, positions: Int64) -> Float32:
        """Vectors at these positions of ``rowids``, shape (n, dim)."""
        out = np.empty((len(positions), self._dim), dtype=np.float32)
        chunks, slots = np.divmod(self._places[positions], self.slots)
        order = np.argsort(chunks, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(chunks[order])) + 1) if len(order) else []:
            chunk = self._chunks[chunks[part[0]]]
            found = self._file.query("SELECT vectors FROM vec_index_vector_chunks00 WHERE _rowid_ = ?", (chunk,))
            block = np.frombuffer(found[0][0], dtype="<f4").reshape(self.slots, self._dim)
            whole = len(part) == self.slots and bool((slots[part] == np.arange(self.slots)).all())
            if whole and part[-1] - part[0] == self.slots - 1:
                # Rows as they were written: one copy, four times faster than row by row.
                out[part[0] : part[-1] + 1] = block
            else:
                out[part] = block[slots[part]]
        return out


def _read_ids(file: SqliteFile, rowids: Int64) -> Ids:
    """The id of each row: int64 or string, or numpy objects where another writer mixed them.

    A row that the map does not name has its row number for an id; an id that does not say its type is a str: so do
    readers of the format.
    """
    # A row of the map takes more than four bytes.
    most = file.size // 4
    file.check_size("vec_id_map", "original_id", most)
    found = file.query(_IDS, (most,))
    rows, values = zip(*found, strict=True) if found else ((), ())
    if not frozenset(map(type, rows)) <= {int}:
        odd = next(row for row in rows if type(row) is not int)
        raise IntegrityError(f"{file.path}: table 'vec_id_map' names row {repr(odd)[:80]}; rows are whole numbers")
    if not frozenset(map(type, values)) <= {int, str}:
        strange = next(n for n, value in enumerate(values) if type(value) not in {int, str})
        raise IntegrityError(
            f"{file.path}: table 'vec_id_map' has no id for row {rows[strange]}, but {repr(values[strange])[:200]}"
        )
    if not np.array_equal(np.fromiter(rows, dtype=np.int64, count=len(rows)), rowids):
        named = dict(zip(rows, values, strict=True))
        values = [named.get(row, row) for row in rowids.tolist()]
    kinds = frozenset(map(type, values))
    if len(kinds) < 2:
        return pa.array(values, pa.string() if str in kinds else pa.int64())
    ids = np.empty(len(values), dtype=object)
    ids[:] = values
    return ids


def _check_declaration(file: SqliteFile, dim: int) -> None:
    sql = file.virtual.get("vec_index")
    if sql is None:
        raise IntegrityError(f"{file.path} has no virtual table 'vec_index'; it holds no vectors")
    declared = _DECLARED.fullmatch(sql)
    columns = [column.strip() for column in declared.group(1).split(",")] if declared else [""]
    vector = _VECTOR_COLUMN.fullmatch(columns[0])
    strange = [column for column in columns[1:] if not _OTHER_COLUMN.fullmatch(column)]
    if vector is None or strange:
        raise IntegrityError(f"{file.path}: 'vec_index' is declared in a way no shard does: {sql[:200]}")
    if int(vector.group(1)) != dim:
        raise IntegrityError(f"{file.path}: 'vec_index' holds {vector.group(1)} numbers, the manifest says {dim}")
