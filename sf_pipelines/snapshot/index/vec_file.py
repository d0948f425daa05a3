"""The vectors and ids in a ``shard.db`` of sqlite-vec, read without the extension.

sqlite-vec 0.1.9 keeps its vectors in ordinary tables: chunks of 1,024 vectors side by side in one blob, with the row
numbers and a bitmap of the slots in use beside them. It has no index: a search reads all of them. Read once into
numpy, they answer three times faster. Every size is checked first, as the file may be a stranger's.
"""

import re
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.errors import IntegrityError
from sf_pipelines.snapshot.index.protocol import IdArray
from sf_pipelines.snapshot.index.sqlite import SqliteFile
from sf_pipelines.snapshot.metric import Float32

EMBEDDING = "embedding"

# Columns with their declared types, and the primary key.
_TABLES: dict[str, tuple[dict[str, str | None], str | None]] = {
    "vec_index_info": ({"key": None, "value": None}, None),
    "vec_index_chunks": (
        {"chunk_id": "INTEGER", "size": "INTEGER", "validity": "BLOB", "rowids": "BLOB"},
        "chunk_id",
    ),
    "vec_index_rowids": ({"rowid": "INTEGER", "id": None, "chunk_id": "INTEGER", "chunk_offset": "INTEGER"}, "rowid"),
    "vec_index_vector_chunks00": ({"rowid": None, "vectors": "BLOB"}, None),
    "vec_payloads": ({"rowid": "INTEGER", "payload": "TEXT"}, "rowid"),
    "vec_id_map": ({"internal_id": "INTEGER", "original_id": "TEXT"}, "internal_id"),
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
_INT, _STR = frozenset({int}), frozenset({str})


class VectorChunks:
    """Where each vector of a file lies. Use it under the file's lock.

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
        for name, (columns, key) in _TABLES.items():
            file.require(name, columns, key=key)
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
        found = self._file.query(
            _SIZES,
            (most + 1,),
        )
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

    def _read_layout(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places in use (slots of all chunks, counted through) and the row number in each."""
        blobs = self._file.query(
            "SELECT validity, rowids FROM vec_index_chunks ORDER BY chunk_id LIMIT ?", (len(self._chunks),)
        )
        valid = np.frombuffer(b"".join(validity for validity, _ in blobs), dtype=np.uint8)
        used = np.flatnonzero(np.unpackbits(valid, bitorder="little")).astype(np.int64)
        return used, np.frombuffer(b"".join(rowids for _, rowids in blobs), dtype="<i8")[used].astype(np.int64)

    def vectors(self, positions: NDArray[np.int64]) -> Float32:
        """Vectors at these positions of ``rowids``, shape (n, dim).

        Raises:
            IntegrityError: the file cannot be read.
        """
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


def read_ids(file: SqliteFile, rowids: NDArray[np.int64]) -> pa.Array | IdArray:
    """The id of each row: int64 or string, or numpy objects where a stranger mixed them.

    A row that the map does not name has its row number for an id; an id that does not say its type is a str: so do
    readers of the format.

    Raises:
        IntegrityError: an id is neither.
    """
    # A row of the map takes more than four bytes.
    most = file.size // 4
    file.check_size("vec_id_map", "original_id", most)
    found = file.query(_IDS, (most,))
    rows, values = zip(*found, strict=True) if found else ((), ())
    if not frozenset(map(type, rows)) <= _INT:
        odd = next(row for row in rows if type(row) is not int)
        raise IntegrityError(f"{file.path}: table 'vec_id_map' names row {repr(odd)[:80]}; rows are whole numbers")
    mapped = np.fromiter(rows, dtype=np.int64, count=len(rows))
    kinds = frozenset(map(type, values))
    if not kinds <= _INT | _STR:
        strange = next(n for n, value in enumerate(values) if type(value) not in {int, str})
        raise IntegrityError(
            f"{file.path}: table 'vec_id_map' has no id for row {rows[strange]}, but {repr(values[strange])[:200]}"
        )
    if kinds == _INT and np.array_equal(mapped, rowids):
        return pa.array(values, pa.int64())
    if kinds == _STR and np.array_equal(mapped, rowids):
        return pa.array(values, pa.string())
    return _joined(mapped, values, rowids)


def _joined(mapped: NDArray[np.int64], values: tuple[Any, ...], rowids: NDArray[np.int64]) -> pa.Array | IdArray:
    """Ids of a map that does not name each row once in order, or mixes types."""
    ids = rowids.astype(object)
    here, at = np.isin(mapped, rowids), np.searchsorted(rowids, mapped)
    objects = np.empty(len(values), dtype=object)
    objects[:] = values
    ids[at[here]] = objects[here]
    kinds = frozenset(map(type, ids.tolist()))
    if kinds == _STR:
        return pa.array(ids, pa.string())
    return ids if str in kinds else pa.array(ids, pa.int64())


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
