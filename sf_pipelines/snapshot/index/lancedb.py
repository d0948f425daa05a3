"""Shards as LanceDB tables: ``<shard>/vector_index.lance``."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import is_text
from sf_pipelines.snapshot.config import IndexParams
from sf_pipelines.snapshot.errors import IndexBuildError, IntegrityError, is_panic
from sf_pipelines.snapshot.index.lance_file import check_within
from sf_pipelines.snapshot.index.protocol import STORED_COLUMNS, IdType, IndexFamily, ShardIndex, VectorType
from sf_pipelines.snapshot.index.ranking import Int64, ShardHits, distinct, first_k, id_ranks, take_ids
from sf_pipelines.snapshot.index.scan import MemoryScan, lengths_of
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, Float64, pair_distances

if TYPE_CHECKING:
    from lancedb.index import HnswFlat, HnswSq, IvfFlat, IvfSq
    from lancedb.table import Table

TABLE = "vector_index"
_INDEX = "vector_idx"
_DISTANCES = {DistanceMetric.COSINE: "cosine", DistanceMetric.L2: "l2", DistanceMetric.DOT_PRODUCT: "dot"}
# Product and RaBit codes are too coarse to pick candidates from (stock writes one sub-vector: recall 0.2).
_TRUSTED = frozenset({"IVF_FLAT", "IVF_SQ", "IVF_HNSW_SQ", "IVF_HNSW_FLAT"})
# Errors of the library: it has no tree of its own.
_LIBRARY_ERRORS = (RuntimeError, ValueError, OSError)
# Payload columns up to this size are kept once they were asked for; a fetch by row costs 2 ms.
_PAYLOAD_BYTES = 16 * 1024 * 1024
_HNSW_PARTITION_ROWS = 100_000
# Up to 20,000 rows a filter is evaluated in no time. Then an index of 1 or 2 bytes a row, built in 20 ms, begins to
# tell, most of all where the shard is searched in place: without one the whole column is fetched.
_FILTER_INDEX_ROWS = 20_000
_BITMAP_VALUES = 1_000
_BITMAP_TYPES = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_string)
_EPS, _TINY = float(np.finfo(np.float32).eps), float(np.finfo(np.float32).tiny)
# Queries of one call: the library plans and buffers each of them separately, all at once.
_BATCH = 64
# Scanning 1,000 rows of 8-bit numbers costs less than telling 1,000 rows apart by more centres, and building an index
# of 6,250 x 384 takes 0.2 s instead of 0.7 s; a reader that probes 20 partitions then sees all of a shard of 20,000.
_IVF_PARTITION_ROWS = 1_000
# Centres need not be perfect: partitions are many and several are searched.
_IVF_TRAINING: dict[str, Any] = {"max_iterations": 10}


class LanceDBShard(ShardIndex):
    """The index library LanceDB. Rows are referred to by the library's row ids."""

    name = "lancedb"
    directory = f"{TABLE}.lance"
    subfolder = "vector"
    metrics = frozenset(_DISTANCES)
    vector_types = ("float32", "float16")
    # Up to here a scan of the whole shard takes less time than the index, which costs 4 ms whatever it finds.
    scan_bytes = 64 * 1024 * 1024

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
        """Table and index, the index exactly once.

        Filter columns of large shards get an index of their own: a bitmap where values are few, else a tree.
        """
        import lancedb

        if vector_type == "float16":
            rows = _halved(rows, folder)
        with _library(IndexBuildError, f"cannot build a {family} index of {rows.num_rows} rows in {folder}"):
            table = lancedb.connect(str(folder)).create_table(TABLE, rows)
            config = _index_config(family, metric, params, rows.num_rows)
            table.create_index("vector", config=config, name=_INDEX, replace=False)
            if rows.num_rows >= _FILTER_INDEX_ROWS:
                _index_filters(table, rows)
            stats = table.index_stats(_INDEX)
        return 0 if stats is None else stats.num_indexed_rows

    @classmethod
    def open(cls, folder: Path, *, metric: DistanceMetric, dim: int, in_memory: bool = True) -> Self:
        import lancedb

        if not (folder / cls.directory).is_dir():
            raise IntegrityError(f"{folder} holds no {cls.directory}")
        check_within(folder / cls.directory)
        with _library(IntegrityError, f"cannot open the LanceDB table in {folder}"):
            return cls(lancedb.connect(str(folder)).open_table(TABLE), folder, metric, dim, in_memory=in_memory)

    def __init__(self, table: "Table", where: Path, metric: DistanceMetric, dim: int, *, in_memory: bool) -> None:
        self.rows = table.count_rows()
        self.id_type = _check_schema(table.schema, str(where), dim)
        self.indexed_rows, index_bytes, trusted = _index_of(table, metric)
        super().__init__(where, metric, dim, scans=in_memory or not trusted or self.indexed_rows != self.rows)
        # The library keeps the index that it searches.
        self._held = 0 if self._scans else index_bytes
        self._has_payload = "payload" in table.schema.names
        self._table: Table | None = table
        self._payloads: tuple[Int64, pa.Array] | None = None
        self._keeps_payloads = self._scans

    def warm(self) -> None:
        if self.scan() and self._has_payload:
            self._payload_column()

    def close(self) -> None:
        with self._lock:
            self._table = self._payloads = None
            super().close()

    def _search_file(self, queries: Float32, k: int) -> ShardHits:
        if _over_fetch(k) * 2 >= self.rows:
            return self._memory().search(queries, k)
        hits, blurred = self._search_index(queries, k)
        # The library leaves out rows that it cannot rank (zero vectors under cosine), and an id that another
        # writer repeated crowds out others; a scan knows all rows.
        doubtful = np.flatnonzero((hits.counts < k) | blurred)
        return hits if not len(doubtful) else hits.replaced(doubtful, self._memory().search(queries[doubtful], k))

    def _search_index(self, queries: Float32, k: int) -> tuple[ShardHits, NDArray[np.bool_]]:
        """The hits, and for which queries the library could not tell close rows from others, shape (n,)."""
        shape = len(queries), k
        found = self._query(queries, _over_fetch(k), ["id", "vector", "_distance"], declared=True)
        query = found["query_index"].to_numpy()
        ids, rows = self._ids(found), _row_ids(found)
        ranks = id_ranks(ids)
        vectors = _matrix(found["vector"], self._dim)
        distances = pair_distances(queries[query], vectors, self._metric)
        kept = distinct(query, distances, ranks)
        best = kept[first_k(query[kept], distances[kept], ranks[kept], *shape)]
        hits = ShardHits.of(query[best], rows[best], take_ids(ids, best), distances[best], shape)
        theirs = found["_distance"].to_numpy().astype(np.float64)
        return hits, _blurred(queries, query, vectors, theirs, distances, self._metric, k)

    def search_raw(self, queries: Float32, k: int) -> ShardHits:
        shape = len(queries), k
        found = self._query(queries, k, ["id", "_distance"], declared=False)
        query, distances = found["query_index"].to_numpy(), found["_distance"].to_numpy().astype(np.float64)
        best = first_k(query, distances, np.arange(len(query)), *shape)
        return ShardHits.of(
            query[best], _row_ids(found)[best], take_ids(self._ids(found), best), distances[best], shape
        )

    def _query(self, queries: Float32, k: int, columns: list[str], *, declared: bool) -> pa.Table:
        """Candidates of all queries; ``query_index`` says whose each is."""
        parts: list[pa.Table] = []
        for start in range(0, len(queries), _BATCH):
            with _library(IntegrityError, f"searching the shard in {self._where} failed"):
                query: Any = self._open_table().search(list(queries[start : start + _BATCH]), "vector")
                query = query.select(columns).with_row_id(True).limit(k)
                if declared:
                    # The metric is always said: left out, an index with another one would silently decide.
                    query = query.distance_type(_DISTANCES[self._metric])
                    # 20 partitions is what a reader without options takes; of many a quarter is searched.
                    query = query.nprobes(max(20, self.rows // (4 * _IVF_PARTITION_ROWS))).ef(max(128, 2 * k))
                found: pa.Table = query.to_arrow()
            # A batch of one comes back as a single query, with its columns in another order.
            alone = "query_index" not in found.column_names
            whose = np.zeros(found.num_rows, np.int64) if alone else found["query_index"].to_numpy().astype(np.int64)
            part = found.select(["_rowid", *columns])
            parts.append(part.append_column("query_index", pa.array(whose + start)))
        return pa.concat_tables(parts)

    def _payload_texts(self, rows: Int64) -> list[Any]:
        if not self._has_payload or len(rows) == 0:
            return [None] * len(rows)
        held = self._payload_column()
        texts = self._take(rows, "payload") if held is None else held[1].take(pa.array(np.searchsorted(held[0], rows)))
        return texts.to_pylist()

    def _read_vectors(self, rows: Int64) -> Float32:
        return _matrix(self._take(rows, "vector"), self._dim)

    def _read_ids(self) -> tuple[pa.Array, Int64]:
        found = self._column("id")
        return self._ids(found), _row_ids(found)

    def _read_scan(self) -> MemoryScan:
        found = self._column("id", "vector")
        # A copy: memory of numpy lies in large pages, which a scan reads a tenth faster.
        vectors = np.array(_matrix(found["vector"], self._dim))
        return MemoryScan(self._ids(found), _row_ids(found), vectors, self._metric)

    def _open_table(self) -> "Table":
        table = self._table
        if table is None:
            raise self._closed()
        return table

    def _payload_column(self) -> tuple[Int64, pa.Array] | None:
        """Rows and the whole column of a shard that is scanned in memory, where it is small; else None."""
        with self._lock:
            if self._payloads is None and self._keeps_payloads:
                found = self._column("payload")
                self._keeps_payloads = found["payload"].nbytes <= _PAYLOAD_BYTES
                if self._keeps_payloads:
                    self._payloads = _row_ids(found), found["payload"].combine_chunks()
                    self._held += found.nbytes
            return self._payloads

    def _ids(self, found: pa.Table) -> pa.Array:
        column = found["id"].combine_chunks()
        if column.null_count:
            raise IntegrityError(f"{self._where}: {column.null_count} rows of the shard have no id")
        try:
            return column.cast(pa.int64() if pa.types.is_integer(column.type) else pa.string())
        except pa.ArrowInvalid as error:
            raise IntegrityError(
                f"{self._where}: column 'id' is {column.type} with values that are no {self.id_type}: {error}"
            ) from error

    def _column(self, *names: str) -> pa.Table:
        with _library(IntegrityError, f"reading the shard in {self._where} failed"):
            query: Any = self._open_table().search()
            return _in_row_order(query.select(list(names)).with_row_id(True).limit(self.rows).to_arrow())

    def _take(self, rows: Int64, name: str) -> pa.ChunkedArray:
        """One column at these rows; the library sorts rows and drops repeats, so they are put back."""
        once, back = np.unique(rows, return_inverse=True)
        with _library(IntegrityError, f"reading the shard in {self._where} failed"):
            query: Any = self._open_table().take_row_ids(once.tolist())
            found = _in_row_order(query.select([name]).with_row_id().to_arrow())
        if found.num_rows != len(once):
            raise IntegrityError(f"{self._where}: {len(once) - found.num_rows} of {len(once)} rows are gone")
        return found[name].take(pa.array(back))


def _index_config(
    family: IndexFamily, metric: DistanceMetric, params: IndexParams, rows: int
) -> "IvfFlat | IvfSq | HnswSq | HnswFlat":
    from lancedb.index import HnswFlat, HnswSq, IvfFlat, IvfSq

    distance: Any = _DISTANCES[metric]
    partitions = min(rows, params.num_partitions or max(1, rows // _IVF_PARTITION_ROWS))
    if family is IndexFamily.FLAT:
        return IvfFlat(distance_type=distance, num_partitions=1)
    if family is IndexFamily.IVF_FLAT:
        return IvfFlat(distance_type=distance, num_partitions=partitions, **_IVF_TRAINING)
    if family is IndexFamily.IVF_SQ:
        return IvfSq(distance_type=distance, num_partitions=partitions, **_IVF_TRAINING)
    graphs = min(rows, params.num_partitions or math.ceil(rows / _HNSW_PARTITION_ROWS))
    kind = HnswSq if family is IndexFamily.HNSW else HnswFlat
    return kind(distance_type=distance, num_partitions=graphs, m=params.m, ef_construction=params.ef_construction)


def _halved(rows: pa.Table, folder: Path) -> pa.Table:
    """The rows with their vectors as float16, which they must be already: routing and ranking have seen them."""
    column: Any = rows.column("vector").combine_chunks()
    half = column.cast(pa.list_(pa.float16(), column.type.list_size))
    if not half.cast(column.type).equals(column):
        raise IndexBuildError(f"{folder}: the vectors are not float16 numbers; round them before routing")
    return rows.set_column(rows.column_names.index("vector"), "vector", half)


def _index_filters(table: "Table", rows: pa.Table) -> None:
    from lancedb.index import Bitmap, BTree

    for name in rows.column_names:
        if name in STORED_COLUMNS:
            continue
        kind = rows.schema.field(name).type
        countable = any(test(kind) for test in _BITMAP_TYPES)
        few = countable and pc.call_function("count_distinct", [rows.column(name)]).as_py() <= _BITMAP_VALUES
        table.create_index(name, config=Bitmap() if few else BTree(), name=f"{name}_idx", replace=False)


def _over_fetch(k: int) -> int:
    """Candidates to re-score: coarse distances swap neighbours, twice as many keep the true ones in."""
    return max(2 * k, k + 10)


def _blurred(
    queries: Float32, query: Int64, vectors: Float32, theirs: Float64, exact: Float64, metric: DistanceMetric, k: int
) -> NDArray[np.bool_]:
    """For which queries the library's k-th candidate is as close as its last one, up to rounding, and in truth is not.

    Rows that it has left out may then be closer. So it is with nearly parallel vectors, and with vectors so short that
    float32 has no room for the squares of what lies between them.
    Each candidate has a query, a vector, the library's float32 distance and the exact one.
    """
    n, dim = queries.shape
    # How far the library's distances may usually be off: typical, not proven.
    size = np.abs(theirs)
    if metric is not DistanceMetric.L2:
        size += 1.0
    if metric is DistanceMetric.DOT_PRODUCT:
        size += lengths_of(queries)[query] * lengths_of(vectors)
    error = (4 + math.sqrt(dim)) * _EPS * size + dim * _TINY
    order = np.lexsort((theirs, query))
    grouped, theirs, exact, error = query[order], theirs[order], exact[order], error[order]
    ends = np.searchsorted(grouped, np.arange(n), side="right")
    counts = np.diff(ends, prepend=0)
    enough = np.flatnonzero(counts > k)
    last, kth = ends[enough] - 1, ends[enough] - counts[enough] + k - 1
    # From here on distances are those of the last candidate, up to rounding.
    limits = np.full(n, np.inf)
    limits[enough] = theirs[last] - 2 * error[last]
    close = np.flatnonzero(theirs >= limits[grouped])
    nearest, furthest = np.full(n, np.inf), np.full(n, -np.inf)
    np.minimum.at(nearest, grouped[close], exact[close])
    np.maximum.at(furthest, grouped[close], exact[close])
    out = np.zeros(n, dtype=np.bool_)
    out[enough] = (theirs[kth] >= limits[enough]) & (furthest > nearest)[enough]
    return out


def _index_of(table: "Table", metric: DistanceMetric) -> tuple[int, int, bool]:
    """Indexed rows, bytes, and whether the vector index may be asked for candidates in this metric."""
    for index in table.list_indices():
        stats = table.index_stats(index.name) if index.columns == ["vector"] else None
        if stats is not None:
            trusted = stats.index_type in _TRUSTED and stats.distance_type == _DISTANCES[metric]
            return stats.num_indexed_rows, index.size_bytes or 0, trusted
    return 0, 0, False


def _check_schema(schema: pa.Schema, where: str, dim: int) -> IdType:
    for name in ("id", "vector"):
        if name not in schema.names:
            raise IntegrityError(f"{where}: the table has no column {name!r}, only {', '.join(schema.names)}")
    vector: Any = schema.field("vector").type
    floats = pa.types.is_fixed_size_list(vector) and pa.types.is_floating(vector.value_type)
    if not floats or vector.list_size != dim:
        raise IntegrityError(f"{where}: column 'vector' is {vector}, the manifest says {dim} numbers")
    kind = schema.field("id").type
    if pa.types.is_integer(kind):
        return "int64"
    if is_text(kind):
        return "string"
    raise IntegrityError(f"{where}: column 'id' is {kind}; int64 and string are understood")


def _row_ids(found: pa.Table) -> Int64:
    return found["_rowid"].to_numpy().astype(np.int64)


def _in_row_order(found: pa.Table) -> pa.Table:
    rows = found["_rowid"].to_numpy()
    return found if bool(np.all(rows[1:] > rows[:-1])) else found.sort_by("_rowid")


def _matrix(column: pa.ChunkedArray, dim: int) -> Float32:
    """Vectors as float32, shape (rows, dim)."""
    array: Any = column.combine_chunks()
    if array.null_count:
        raise IntegrityError(f"{array.null_count} rows of a shard have no vector")
    flat = array.flatten().to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # A float64 of another writer may be too large: infinite, and in no answer.
        return flat.astype(np.float32, copy=False).reshape(-1, dim)


@contextmanager
def _library(kind: type[IntegrityError] | type[IndexBuildError], what: str) -> Iterator[None]:
    """Errors of the library as ours: a local, verified shard that cannot be read is broken."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, kind) or not (isinstance(error, _LIBRARY_ERRORS) or is_panic(error)):
            raise
        # The first line, without the places in the library's own source that it appends.
        text = (str(error).strip() or type(error).__name__).splitlines()[0].split(", /rustc/")[0]
        raise kind(f"{what}: {text[:400]}") from error
