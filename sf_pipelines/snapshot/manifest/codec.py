"""A manifest as bytes: a serialized SQLite database of two tables.

Reading one means running a database made by somebody else. So its schema must hold ordinary tables only (a
view in place of a table is a program), an authorizer lets through nothing but plain reads of the two tables,
and bytes, steps, rows and texts are bounded.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sf_pipelines.snapshot.errors import ManifestError
from sf_pipelines.snapshot.manifest.models import (
    FORMAT_VERSION,
    MAX_SHARDS,
    Manifest,
    ShardingRecord,
    ShardObject,
    ShardRow,
)
from sf_pipelines.snapshot.manifest.wire import dump_json, load_json, parse_moment, timestamp
from sf_pipelines.snapshot.model import describe_validation

MAX_MANIFEST_BYTES = 256 * 1024 * 1024
MAX_TEXT_BYTES = 16 * 1024 * 1024

_MAGIC = b"SQLite format 3\x00"
_STEPS_PER_TICK = 1000
_MAX_TICKS = 50_000

_CREATE = """
CREATE TABLE build_meta (
    run_id           TEXT    NOT NULL,
    created_at       TEXT    NOT NULL,
    num_dbs          INTEGER NOT NULL,
    s3_prefix        TEXT    NOT NULL,
    key_col          TEXT    NOT NULL,
    sharding         TEXT    NOT NULL,
    db_path_template TEXT    NOT NULL,
    shard_prefix     TEXT    NOT NULL,
    format_version   INTEGER NOT NULL,
    key_encoding     TEXT    NOT NULL,
    custom           TEXT    NOT NULL DEFAULT '{}'
);
CREATE TABLE shards (
    db_id         INTEGER NOT NULL PRIMARY KEY,
    db_url        TEXT,
    attempt       INTEGER NOT NULL,
    row_count     INTEGER NOT NULL,
    db_bytes      INTEGER NOT NULL,
    min_key       TEXT,
    max_key       TEXT,
    checkpoint_id TEXT,
    writer_info   TEXT    NOT NULL DEFAULT '{}',
    sf_objects    TEXT
);
"""
_INSERT_META = """
INSERT INTO build_meta (run_id, created_at, num_dbs, s3_prefix, key_col, sharding, db_path_template,
                        shard_prefix, format_version, key_encoding, custom)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_INSERT_SHARD = """
INSERT INTO shards (db_id, db_url, attempt, row_count, db_bytes, min_key, max_key, checkpoint_id, writer_info,
                    sf_objects)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


_OBJECTS_COLUMN = "sf_objects"


@dataclass(frozen=True)
class _Table:
    name: str
    columns: tuple[str, ...]
    max_rows: int


_BUILD_META = _Table(
    "build_meta",
    (
        *("run_id", "created_at", "num_dbs", "s3_prefix", "key_col", "sharding", "db_path_template"),
        *("shard_prefix", "format_version", "key_encoding", "custom"),
    ),
    1,
)
_SHARDS = _Table(
    "shards",
    (
        *("db_id", "db_url", "attempt", "row_count", "db_bytes", "min_key", "max_key", "checkpoint_id"),
        "writer_info",
    ),
    MAX_SHARDS,
)
_objects = TypeAdapter(tuple[ShardObject, ...])


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's bytes; the same for equal manifests.

    Raises:
        ManifestError: its parts do not agree, or a custom field is no JSON.
    """
    manifest.validated()
    try:
        meta, shards = _meta_values(manifest), [_shard_values(row) for row in _by_id(manifest.shards)]
    except ValueError as error:
        raise ManifestError(f"manifest of run {manifest.run_id!r} cannot be written: {error}") from error
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        # Freed space is zeroed, so that no byte depends on how the pages were filled.
        database.executescript("PRAGMA page_size = 4096; PRAGMA secure_delete = ON; BEGIN;" + _CREATE)
        database.execute(_INSERT_META, meta)
        database.executemany(_INSERT_SHARD, shards)
        database.execute("COMMIT")
        return database.serialize()


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """Reads a manifest from somebody else.

    Args:
        data: the object's bytes.
        where: its address, for errors.

    Returns:
        The manifest with its shards by ``db_id``.

    Raises:
        ManifestError: anything is wrong with it; names ``where``, table, row and field.
    """
    try:
        meta, shard_rows = _read_tables(data)
        shards = _by_id(tuple(_shard(row, number) for number, row in enumerate(shard_rows)))
        return _manifest(meta, shards).validated()
    except ManifestError as error:
        raise ManifestError(f"manifest {where}: {error}") from error


def _by_id(shards: tuple[ShardRow, ...]) -> tuple[ShardRow, ...]:
    return tuple(sorted(shards, key=lambda shard: shard.db_id))


# Writing.


def _meta_values(manifest: Manifest) -> tuple[Any, ...]:
    return (
        manifest.run_id,
        timestamp(manifest.created_at),
        manifest.num_dbs,
        manifest.s3_prefix,
        manifest.key_col,
        dump_json(manifest.sharding.model_dump(mode="json", exclude_none=True)),
        manifest.db_path_template,
        manifest.shard_prefix,
        manifest.format_version,
        manifest.key_encoding,
        dump_json(manifest.custom),
    )


def _shard_values(row: ShardRow) -> tuple[Any, ...]:
    objects = None
    if row.objects is not None:
        objects = dump_json([item.model_dump() for item in row.objects])
    return (
        row.db_id,
        row.db_url,
        row.attempt,
        row.row_count,
        row.db_bytes,
        None if row.min_key is None else dump_json(row.min_key),
        None if row.max_key is None else dump_json(row.max_key),
        row.checkpoint_id,
        dump_json(row.writer_info),
        objects,
    )


# Reading: the database.


def _read_tables(data: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not data.startswith(_MAGIC):
        raise ManifestError("is no SQLite database")
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"has {len(data)} bytes, more than the {MAX_MANIFEST_BYTES} that are read")
    try:
        with closing(_open(data)) as database:
            _check_schema(database)
            budget = _Budget(len(data))
            meta = list(_rows(database, _BUILD_META, budget))
            shards = list(_rows(database, _SHARDS, budget))
    except (sqlite3.Error, UnicodeDecodeError) as error:
        # The second comes from messages that quote the file's bytes.
        raise ManifestError(f"cannot be read as a database of plain tables: {error}") from error
    if not meta:
        raise ManifestError("table build_meta has no row")
    return meta[0], shards


def _open(data: bytes) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
    with ExitStack() as on_failure:
        on_failure.callback(database.close)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_MANIFEST_BYTES)
        database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        database.deserialize(data)
        # Part of the copy was read by now, so the caps on steps and texts come before anything else is.
        database.set_progress_handler(_ticker(), _STEPS_PER_TICK)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_TEXT_BYTES)
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "query_only = ON"):
            database.execute(f"PRAGMA {pragma}")
        database.set_authorizer(_authorize)
        on_failure.pop_all()
    return database


def _ticker() -> Callable[[], int]:
    ticks = 0

    def tick() -> int:
        nonlocal ticks
        ticks += 1
        return int(ticks > _MAX_TICKS)

    return tick


def _authorize(action: int, first: str | None, second: str | None, base: str | None, inside: str | None) -> int:
    """Plain reads of tables: not from inside a view or trigger, no function, no recursive query."""
    del second, base
    readable = {_BUILD_META.name, _SHARDS.name, "sqlite_master"}
    if inside is None:
        if action == sqlite3.SQLITE_SELECT:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ and (first or "").lower() in readable:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_PRAGMA and first in {"table_xinfo", "table_list"}:
            return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _check_schema(database: sqlite3.Connection) -> None:
    # What the text says and what SQLite made of it must both be ordinary tables.
    for kind, name, text in database.execute("SELECT type, name, sql FROM main.sqlite_master"):
        automatic = kind == "index" and text is None
        plain = kind == "table" and isinstance(text, str) and text.upper().startswith("CREATE TABLE")
        if not (automatic or plain):
            raise ManifestError(f"schema holds {kind!r} {name!r:.100}, but only plain tables are read")
    for _, name, kind, *_ in database.execute("PRAGMA main.table_list"):
        if kind != "table":
            raise ManifestError(f"schema holds {kind!r} {name!r:.100}, but only plain tables are read")


def _columns(database: sqlite3.Connection, table: _Table) -> tuple[str, ...]:
    """The columns to read: all that the format has, and ours where it is there."""
    listed = database.execute(f"PRAGMA main.table_xinfo({table.name})")
    found = {str(column[1]).lower(): column[6] for column in listed}
    if not found:
        raise ManifestError(f"has no table {table.name}")
    hidden = [name for name, flag in found.items() if flag]
    if hidden:
        raise ManifestError(f"table {table.name} column {hidden[0]!r:.100} is generated or hidden")
    missing = [name for name in table.columns if name not in found]
    if missing:
        raise ManifestError(f"table {table.name} has no column {missing[0]}")
    return table.columns + ((_OBJECTS_COLUMN,) if _OBJECTS_COLUMN in found else ())


class _Budget:
    """An honest file's rows hold no more text than it has bytes; a crafted one points to a page twice."""

    def __init__(self, size: int) -> None:
        self.left = size

    def spend(self, values: tuple[Any, ...]) -> None:
        """Counts the text of a row; raises ``ManifestError`` when there is more than the file can hold."""
        self.left -= sum(len(value) for value in values if isinstance(value, str | bytes))
        if self.left < 0:
            raise ManifestError("its rows hold more text than the file has bytes")


def _rows(database: sqlite3.Connection, table: _Table, budget: _Budget) -> Iterator[dict[str, Any]]:
    names = _columns(database, table)
    # Names are this module's own. NOT INDEXED: a stranger's index may say something other than its table.
    cursor = database.execute(f"SELECT {', '.join(names)} FROM main.{table.name} NOT INDEXED")  # noqa: S608
    for number, values in enumerate(cursor):
        if number >= table.max_rows:
            raise ManifestError(f"table {table.name} has more than {table.max_rows} row(s)")
        budget.spend(values)
        yield dict(zip(names, values, strict=True))


# Reading: the values.


def _manifest(row: dict[str, Any], shards: tuple[ShardRow, ...]) -> Manifest:
    version = row["format_version"]
    if version != FORMAT_VERSION:
        raise ManifestError(f"build_meta.format_version is {version!r:.40}, must be {FORMAT_VERSION}")
    fields = {name: row[name] for name in _BUILD_META.columns}
    fields["custom"] = _json("build_meta.custom", row["custom"] or "{}", dict)
    sharding = _json("build_meta.sharding", row["sharding"], dict)
    if "hash_algorithm" not in sharding:
        raise ManifestError("build_meta.sharding.hash_algorithm is missing")
    try:
        fields["created_at"] = parse_moment(_text("build_meta.created_at", row["created_at"]))
    except ValueError as error:
        raise ManifestError(f"build_meta.created_at {error}") from error
    fields["sharding"] = _validated("build_meta.sharding", lambda: ShardingRecord.model_validate(sharding))
    return _validated("build_meta", lambda: Manifest.model_validate({**fields, "shards": shards}))


def _shard(row: dict[str, Any], number: int) -> ShardRow:
    where = f"shards row {number}"
    fields = {name: row[name] for name in _SHARDS.columns}
    for name in ("min_key", "max_key"):
        if row[name] is not None:
            fields[name] = _json(f"{where} {name}", row[name], int | str)
    fields["writer_info"] = _json(f"{where} writer_info", row["writer_info"], dict)
    objects = row.get(_OBJECTS_COLUMN)
    if objects is not None:
        field = f"{where} {_OBJECTS_COLUMN}"
        text = _text(field, objects)
        fields["objects"] = _validated(field, lambda: _objects.validate_json(text, strict=True))
    return _validated(where, lambda: ShardRow.model_validate(fields))


def _validated(where: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ValidationError as error:
        raise ManifestError(describe_validation(where, error)) from error


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ManifestError(f"{where} is no text (got {value!r:.80})")
    return value


def _json(where: str, value: Any, kind: Any) -> Any:
    text = _text(where, value)
    try:
        found = load_json(text)
    except ValueError as error:
        raise ManifestError(f"{where} is no JSON that can be used: {error}") from error
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ManifestError(f"{where} is JSON of the wrong kind (got {found!r:.80})")
    return found
