"""How ``shard.db`` is written, and how one that another tool may have made is opened.

A schema may hold programs: views, triggers, computed columns, indexes on expressions. A file with one is refused before
anything is read, and what is read is bounded by the size of the file.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sf_pipelines.snapshot.errors import IndexBuildError, IntegrityError, ReaderClosedError

if TYPE_CHECKING:
    import apsw

FILE = "shard.db"
CREATE_KV = "CREATE TABLE IF NOT EXISTS kv (k BLOB PRIMARY KEY, v BLOB NOT NULL) WITHOUT ROWID"
# Legal sizes go from 4,096 to 65,536. Rows of 384 float32 go in 1.4 times faster than on pages of 4,096, keys and
# values 1.9 times; reading one key takes no longer. Larger pages gain little and make small shards larger.
_PAGE_SIZE = 16_384
_MAGIC = b"SQLite format 3\x00"
# Objects and text of a schema: a shard has about 40 objects.
_MAX_OBJECTS = 500
_MAX_SQL = 20_000
_AUTO_INDEX = "sqlite_autoindex_"
_VIRTUAL = re.compile(r"\s*CREATE\s+VIRTUAL\s+TABLE\b", re.IGNORECASE)


@contextmanager
def writing(folder: Path) -> Iterator["apsw.Connection"]:
    """The folder's ``shard.db``, created where it is not there, in one transaction."""
    import apsw

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    try:
        connection = apsw.Connection(str(path))
        try:
            # The folder is a scratch copy whose files are digested after they were uploaded, so nothing is gained by
            # waiting for the disk, and a journal in memory leaves no file behind. Statements after one that gives a
            # row only run when its rows are fetched.
            connection.execute(
                f"PRAGMA page_size = {_PAGE_SIZE}; PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; "
                "PRAGMA cache_size = -65536; PRAGMA trusted_schema = OFF"
            ).fetchall()
            with connection:
                yield connection
        finally:
            connection.close()
    except (apsw.Error, UnicodeError, OverflowError) as error:
        raise IndexBuildError(f"cannot write {path}: {error}") from error


class SqliteFile:
    """A ``shard.db`` opened for reading, its schema looked through. Thread-safe.

    Opened immutable: local copies are verified and never change, so there are no locks and no journal. Once closed,
    every call raises ``ReaderClosedError``.

    Attributes:
        path: of the file.
        size: its bytes: no table can hold more.
        tables: SQL of each ordinary table, by name.
        virtual: SQL of each virtual table, by name.

    Raises:
        IntegrityError: it is no SQLite database, or its schema holds more than tables.
    """

    def __init__(self, path: Path) -> None:
        import apsw

        self.path = path
        self.tables: dict[str, str] = {}
        self.virtual: dict[str, str] = {}
        try:
            with path.open("rb") as file:
                magic = file.read(len(_MAGIC))
            self.size = path.stat().st_size
        except OSError as error:
            raise IntegrityError(f"cannot read {path}: {error.strerror or error}") from error
        if magic != _MAGIC:
            raise IntegrityError(f"{path} is no SQLite database")
        # A connection serves one thread at a time.
        self._lock = threading.RLock()
        self._closed = False
        with _reading(path):
            self._connection = apsw.Connection(
                f"file:{quote(str(path.absolute()))}?immutable=1",
                flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI,
            )
        try:
            with self.connection() as connection:
                connection.config(apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0)
                connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
                connection.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0)
                connection.config(apsw.SQLITE_DBCONFIG_ENABLE_VIEW, 0)
                connection.limit(apsw.SQLITE_LIMIT_ATTACHED, 0)
                connection.execute("PRAGMA cell_size_check = ON; PRAGMA query_only = ON").fetchall()
            self._read_schema()
        except IntegrityError:
            self.close()
            raise

    @contextmanager
    def connection(self) -> Iterator["apsw.Connection"]:
        """The connection, for this thread alone."""
        with self._lock, _reading(self.path):
            if self._closed:
                raise ReaderClosedError(f"{self.path} was closed")
            yield self._connection

    def _read_schema(self) -> None:
        sql = "SELECT type, name, substr(sql, 1, ?) FROM sqlite_schema LIMIT ?"
        rows = self.query(sql, (_MAX_SQL + 1, _MAX_OBJECTS + 1))
        if len(rows) > _MAX_OBJECTS:
            raise IntegrityError(f"{self.path}: the schema has more than {_MAX_OBJECTS} objects; a shard has about 40")
        for kind, name, sql in rows:
            if not isinstance(name, str) or not isinstance(sql, str | None) or len(sql or "") > _MAX_SQL:
                raise IntegrityError(f"{self.path}: the schema describes {str(name)[:80]!r} in a way no shard does")
            if kind == "table" and sql is not None:
                (self.virtual if _VIRTUAL.match(sql) else self.tables)[name] = sql
            elif kind != "index" or sql is not None or not name.startswith(_AUTO_INDEX):
                raise IntegrityError(f"{self.path}: the schema holds the {kind} {name[:80]!r}; a shard has tables only")

    def require(self, name: str, columns: str) -> None:
        """Checks that an ordinary table has exactly these columns, none of them computed.

        Args:
            name: of the table.
            columns: name of each column, then its type and ``PRIMARY KEY`` unless they may be any.
        """
        if name not in self.tables:
            what = "a virtual table" if name in self.virtual else "missing"
            raise IntegrityError(f"{self.path}: the table {name!r} is {what}; a shard has it as an ordinary table")
        sql = "SELECT name, upper(type), pk, hidden FROM pragma_table_xinfo(?) LIMIT 100"
        found = [
            f"{column}{f' {kind}' if kind else ''}{' PRIMARY KEY' if key else ''}{' (computed)' if hidden else ''}"
            for column, kind, key, hidden in self.query(sql, (name,))
        ]
        expected = columns.split(", ")
        # A column without a type in `expected` may have any.
        plain = [column if column in expected else column.split(" ")[0] for column in found]
        if plain != expected or any(column.endswith("(computed)") for column in found):
            raise IntegrityError(
                f"{self.path}: table {name!r} has columns {', '.join(found)[:300]}; expected {columns}"
            )

    def query(self, sql: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self.connection() as connection:
            return connection.execute(sql, values).fetchall()

    def query_within(self, sql: str, *several: tuple[Any, ...]) -> list[tuple[Any, Any]]:
        """All rows of a query, asked with several values, for keys and values that lie in the file once.

        In a hostile file many values may share the same pages: those of a small file would fill the memory.
        """
        out: list[tuple[Any, Any]] = []
        room = self.size
        with self.connection() as connection:
            for values in several:
                for key, value in connection.execute(sql, values):
                    room -= len(value) if isinstance(value, bytes | str) else 0
                    if room < 0:
                        raise self._too_large()
                    out.append((key, value))
        return out

    def check_size(self, name: str, column: str, most: int) -> None:
        """Checks that the first ``most`` values of a column have room in the file, without reading them."""
        # The lengths stand in front of a row's values.
        sql = f"SELECT total(n) FROM (SELECT octet_length({column}) AS n FROM {name} LIMIT ?)"  # noqa: S608 - our names
        if self.query(sql, (most,))[0][0] > self.size:
            raise self._too_large()

    def _too_large(self) -> IntegrityError:
        return IntegrityError(
            f"{self.path}: rows share their values: they are larger than the file of {self.size} bytes"
        )

    def close(self) -> None:
        """Closes the file; may be repeated."""
        with self._lock:
            self._closed = True
            self._connection.close()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of SQLite as ours: a local, verified file that cannot be read is broken."""
    import apsw

    try:
        yield
    except (apsw.Error, UnicodeError) as error:
        raise IntegrityError(f"cannot read {path}: {str(error)[:400] or type(error).__name__}") from error
