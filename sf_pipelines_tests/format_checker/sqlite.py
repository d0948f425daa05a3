"""Format checker: a ``shard.db``, opened and asked with the statements of a stock reader."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sf_pipelines_tests.format_checker.distance import Scores, check_search, sampled
from sf_pipelines_tests.format_checker.lance import StoredVectors, check_numbers, is_payload
from sf_pipelines_tests.format_checker.report import Duty, Findings, some

if TYPE_CHECKING:
    import apsw

DATABASE = "shard.db"
_SEARCH = "SELECT rowid, distance FROM vec_index WHERE embedding MATCH ? AND k = ? ORDER BY distance"
_COLUMN = re.compile(r"\bembedding\s+f(?:loat)?(?:32)?\s*\[\s*(\d+)\s*\]([^,)]*)", re.IGNORECASE)
_DISTANCE = re.compile(r"distance_metric\s*=\s*(\w+)", re.IGNORECASE)
_PAGE_SIZES = {4096, 8192, 16384, 32768, 65536}
# Columns (name, type, NOT NULL, part of the primary key) of the plain tables.
_SIDE_TABLES = {
    "vec_payloads": [("rowid", "INTEGER", False, True), ("payload", "TEXT", True, False)],
    "vec_id_map": [("internal_id", "INTEGER", False, True), ("original_id", "TEXT", True, False)],
}
_KV = [("k", "BLOB", True, True), ("v", "BLOB", True, False)]


@dataclass(frozen=True)
class SqliteShard:
    """A ``shard.db`` that could be read.

    Attributes:
        keys: of ``kv``, in byte order.
        stored: ids and vectors; None in a database of keys and values alone.
    """

    keys: list[bytes]
    stored: StoredVectors | None


def check_sqlite(
    findings: Findings, where: str, path: Path, *, vectors: bool, dim: int, metric: str, sample: int
) -> SqliteShard | None:
    """Opens a database and checks its tables, vectors and answers; None where it cannot be read.

    Args:
        findings: collects faults.
        where: the shard.
        path: local copy of ``shard.db``.
        vectors: whether it holds vectors, too.
        dim: numbers in a vector.
        metric: declared.
        sample: queries and lookups.
    """
    import apsw

    if not _check_header(findings, where, path):
        return None
    try:
        with _opened(path) as database:
            if not _check_tables(findings, where, database, vectors=vectors, dim=dim, metric=metric):
                return None
            keys = _check_kv(findings, where, database, sample)
            stored = _check_vectors(findings, where, database, dim, metric, sample) if vectors else None
            return SqliteShard(keys, stored)
    except (apsw.Error, UnicodeDecodeError) as error:
        findings.expect(Duty.SQLITE_FILE, False, f"{where}: {DATABASE} cannot be read ({error})")
        return None


@contextmanager
def _opened(path: Path) -> Iterator["apsw.Connection"]:
    import apsw
    import sqlite_vec

    database = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        database.execute("PRAGMA trusted_schema = OFF")
        database.enable_load_extension(True)
        database.load_extension(sqlite_vec.loadable_path())
        database.enable_load_extension(False)
        yield database
    finally:
        database.close()


def _check_header(findings: Findings, where: str, path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(100)
    expect = findings.expect
    if not expect(
        Duty.SQLITE_FILE, head.startswith(b"SQLite format 3\x00") and len(head) == 100, f"{where}: no SQLite file"
    ):
        return False
    # Offsets 16, 18, 19 and 56 of the file: page size, versions (2 is write-ahead logging), text encoding.
    size = int.from_bytes(head[16:18], "big")
    size = 65536 if size == 1 else size
    expect(Duty.SQLITE_FILE, size in _PAGE_SIZES, f"{where}: page size is {size}, not 4096 to 65536")
    expect(Duty.SQLITE_FILE, int.from_bytes(head[56:60], "big") == 1, f"{where}: the texts are not UTF-8")
    return expect(
        Duty.SQLITE_FILE,
        head[18:20] == b"\x01\x01",
        f"{where}: {DATABASE} is in write-ahead mode; read-only and range readers need a rollback-journal file",
    )


def _check_tables(
    findings: Findings, where: str, database: "apsw.Connection", *, vectors: bool, dim: int, metric: str
) -> bool:
    kinds: dict[str, tuple[str, bool]] = {}
    for _, name, kind, _, without_rowid, _ in database.execute("PRAGMA main.table_list"):
        kinds[str(name)] = (str(kind), bool(without_rowid))
    keyed = findings.expect(
        Duty.SQLITE_FILE,
        kinds.get("kv") == ("table", True) and _columns(database, "kv") == _KV,
        f"{where}: kv is not the table (k BLOB PRIMARY KEY, v BLOB NOT NULL) WITHOUT ROWID: get fails",
    )
    return keyed and (not vectors or _check_vector_tables(findings, where, database, kinds, dim, metric))


def _check_vector_tables(
    findings: Findings,
    where: str,
    database: "apsw.Connection",
    kinds: dict[str, tuple[str, bool]],
    dim: int,
    metric: str,
) -> bool:
    expect = findings.expect
    good = True
    for table, columns in _SIDE_TABLES.items():
        good &= expect(
            Duty.SQLITE_FILE,
            kinds.get(table, ("", True))[0] == "table" and _columns(database, table) == columns,
            f"{where}: {table} is not a table of {', '.join(item[0] for item in columns)}: OperationalError",
        )
    sql = database.execute("SELECT sql FROM sqlite_schema WHERE name = 'vec_index'").get
    virtual = kinds.get("vec_index", ("", False))[0] == "virtual" and isinstance(sql, str)
    found = _COLUMN.search(sql) if virtual and re.search(r"\bvec0\s*\(", sql) else None
    if not expect(
        Duty.SQLITE_FILE,
        found is not None,
        f"{where}: vec_index is no vec0 table with a column 'embedding float[{dim}]': OperationalError",
    ):
        return False
    size = int(found[1]) if found else 0
    declared = _DISTANCE.search(found[2]) if found else None
    distance = declared[1].lower() if declared else "l2"
    expect(
        Duty.SQLITE_FILE,
        distance == metric,
        f"{where}: vec_index has the distance_metric {distance}, declared is {metric}: the file's own decides",
    )
    return good & expect(
        Duty.SQLITE_FILE, size == dim, f"{where}: vec_index has float[{size}], custom.vector.dim is {dim}: search fails"
    )


def _columns(database: "apsw.Connection", table: str) -> list[tuple[str, str, bool, bool]]:
    found: list[Any] = list(database.execute(f"PRAGMA table_info({table})"))
    return [(name, kind.upper(), bool(notnull), bool(key)) for _, name, kind, notnull, _, key in found]


def _check_kv(findings: Findings, where: str, database: "apsw.Connection", sample: int) -> list[bytes]:
    expect = findings.expect
    types: list[Any] = list(database.execute("SELECT DISTINCT typeof(k), typeof(v) FROM kv"))
    expect(
        Duty.KEY_VALUES,
        set(types) <= {("blob", "blob")},
        f"{where}: kv has keys and values of the types {some(types)}, must be blobs: lookups by bytes miss them",
    )
    keys = [key for (key,) in database.execute("SELECT k FROM kv ORDER BY k") if isinstance(key, bytes)]
    wanted = [keys[row] for row in sampled(len(keys), sample)] if keys else []
    lost = [key for key in wanted if database.execute("SELECT v FROM kv WHERE k = ?", (key,)).get is None]
    expect(Duty.KEY_VALUES, not lost, f"{where}: kv does not find its own keys {some(lost)}")
    return keys


def _check_vectors(
    findings: Findings, where: str, database: "apsw.Connection", dim: int, metric: str, sample: int
) -> StoredVectors:
    expect = findings.expect
    found: list[Any] = list(database.execute("SELECT rowid, embedding FROM vec_index ORDER BY rowid"))
    rowids = [rowid for rowid, _ in found]
    vectors = np.frombuffer(b"".join(data for _, data in found), dtype="<f4").reshape(-1, dim)
    check_numbers(findings, Duty.SQLITE_VECTORS, where, vectors, metric, "fail with TypeError")
    named: list[Any] = list(database.execute("SELECT internal_id, original_id FROM vec_id_map"))
    ids = dict(named)
    expect(
        Duty.SQLITE_VECTORS,
        set(ids) == set(rowids),
        f"{where}: vec_id_map has {len(ids)} rows for {len(rowids)} vectors, or others: stock returns rowids as ids",
    )
    decoded = {rowid: _id_of(text) for rowid, text in ids.items()}
    bad = [ids[rowid] for rowid, value in decoded.items() if value is None]
    expect(
        Duty.SQLITE_VECTORS,
        not bad,
        f'{where}: vec_id_map.original_id {some(bad)} is not {{"v": …, "t": "int" or "str"}}: ValueError',
    )
    payloads: list[Any] = list(database.execute("SELECT rowid, payload FROM vec_payloads"))
    odd = [rowid for rowid, text in payloads if rowid not in ids or not is_payload(text)]
    expect(
        Duty.SQLITE_VECTORS,
        not odd,
        f"{where}: vec_payloads rows {some(odd)} are of no vector or no text of a JSON object",
    )
    if rowids:
        _check_search(findings, where, database, rowids, vectors, metric, sample)
    return StoredVectors([decoded.get(rowid, rowid) for rowid in rowids], vectors)


def _id_of(text: object) -> int | str | None:
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or set(value) != {"v", "t"}:
        return None
    wanted = {"int": int, "str": str}.get(value["t"]) if isinstance(value["t"], str) else None
    found = value["v"]
    return found if wanted is not None and isinstance(found, wanted) and not isinstance(found, bool) else None


def _check_search(
    findings: Findings,
    where: str,
    database: "apsw.Connection",
    rowids: list[int],
    vectors: NDArray[np.float32],
    metric: str,
    sample: int,
) -> None:
    rows = {rowid: row for row, rowid in enumerate(rowids)}
    if metric == "l2":
        scores = Scores(np.sqrt, 1e-4, True, "Euclidean distance, not squared")
    else:
        scores = Scores(lambda exact: exact, 1e-4, True, "1 - cos")

    def search(query: NDArray[np.float32], k: int) -> tuple[list[int], NDArray[np.float64]]:
        found: list[Any] = list(database.execute(_SEARCH, (query.astype("<f4").tobytes(), k)))
        distances = [np.nan if distance is None else distance for _, distance in found]
        return [rows[rowid] for rowid, _ in found], np.array(distances, dtype=np.float64)

    check_search(findings, Duty.SQLITE_SEARCH, where, vectors, metric, scores, sample, search)
