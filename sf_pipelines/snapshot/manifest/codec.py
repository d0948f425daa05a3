"""A manifest as bytes, a SQLite database of two tables; and how moments and JSON are written everywhere.

Reading a manifest means running a database made by somebody else. So its schema must hold ordinary tables only (a
view in place of a table is a program), an authorizer lets through nothing but plain reads of the two tables,
and bytes, steps, rows and texts are bounded.
"""

import json
import math
import sqlite3
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from itertools import count
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, PlainSerializer, TypeAdapter, ValidationError

from sf_pipelines.snapshot.errors import ManifestError
from sf_pipelines.snapshot.manifest.models import (
    FORMAT_VERSION,
    MAX_SHARDS,
    Manifest,
    ShardingRecord,
    ShardObject,
    ShardRow,
)
from sf_pipelines.snapshot.model import describe_validation

MAX_MANIFEST_BYTES = 256 * 1024 * 1024
MAX_TEXT_BYTES = 16 * 1024 * 1024

_MAGIC = b"SQLite format 3\x00"
_STEPS_PER_TICK = 1000
_MAX_TICKS = 50_000
# Numbers above this are taken as milliseconds, as readers of the format do.
_SECONDS_LIMIT = 2e10

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
# Of the stock format, every column but this one.
_OBJECTS_COLUMN = "sf_objects"


class _Table(NamedTuple):
    name: str
    columns: tuple[str, ...]
    max_rows: int


_BUILD_META = _Table("build_meta", tuple(name for name in Manifest.model_fields if name != "shards"), 1)
_SHARDS = _Table("shards", tuple(name for name in ShardRow.model_fields if name != "objects"), MAX_SHARDS)
_objects = TypeAdapter(tuple[ShardObject, ...])


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's bytes; the same for equal manifests."""
    manifest.validated()
    try:
        sharding = dump_json(manifest.sharding.model_dump(mode="json", exclude_none=True))
        stored = {"created_at": timestamp(manifest.created_at), "sharding": sharding}
        meta = dict(manifest) | stored | {"custom": dump_json(manifest.custom)}
        shards = [_stored_shard(row) for row in _by_id(manifest.shards)]
    except ValueError as error:
        raise ManifestError(f"manifest of run {manifest.run_id!r} cannot be written: {error}") from error
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        # Freed space is zeroed, so that no byte depends on how the pages were filled.
        database.executescript("PRAGMA page_size = 4096; PRAGMA secure_delete = ON; BEGIN;" + _CREATE)
        database.execute(_insert("build_meta", _BUILD_META.columns), meta)
        database.executemany(_insert("shards", (*_SHARDS.columns, _OBJECTS_COLUMN)), shards)
        database.execute("COMMIT")
        return database.serialize()


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """Reads a manifest from somebody else; its shards are in the order of ``db_id``."""
    try:
        meta, shard_rows = _read_tables(data)
        shards = _by_id(tuple(_shard(row, number) for number, row in enumerate(shard_rows)))
        return _manifest(meta, shards).validated()
    except ManifestError as error:
        raise ManifestError(f"manifest {where}: {error}") from error


def _by_id(shards: tuple[ShardRow, ...]) -> tuple[ShardRow, ...]:
    return tuple(sorted(shards, key=lambda shard: shard.db_id))


def _stored_shard(row: ShardRow) -> dict[str, Any]:
    objects = None if row.objects is None else dump_json([item.model_dump() for item in row.objects])
    keys = {name: None if (key := getattr(row, name)) is None else dump_json(key) for name in ("min_key", "max_key")}
    return dict(row) | keys | {"writer_info": dump_json(row.writer_info), _OBJECTS_COLUMN: objects}


def _insert(table: str, columns: tuple[str, ...]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join(f':{name}' for name in columns)})"  # noqa: S608


# Reading: the database.


def _read_tables(data: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not data.startswith(_MAGIC):
        raise ManifestError("is no SQLite database")
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"has {len(data)} bytes, more than the {MAX_MANIFEST_BYTES} that are read")
    try:
        with closing(_open(data)) as database:
            _check_schema(database)
            meta, left = _rows(database, _BUILD_META, len(data))
            shards, _ = _rows(database, _SHARDS, left)
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
        ticks = count(1)
        database.set_progress_handler(lambda: int(next(ticks) > _MAX_TICKS), _STEPS_PER_TICK)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_TEXT_BYTES)
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "query_only = ON"):
            database.execute(f"PRAGMA {pragma}")
        database.set_authorizer(_authorize)
        on_failure.pop_all()
    return database


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


def _rows(database: sqlite3.Connection, table: _Table, left: int) -> tuple[list[dict[str, Any]], int]:
    """The rows of a table, and what they leave of the bytes that all rows together may have as text.

    An honest file's rows hold no more text than it has bytes; a crafted one points to a page twice.
    """
    names = _columns(database, table)
    rows: list[dict[str, Any]] = []
    # Names are this module's own. NOT INDEXED: a stranger's index may say something other than its table.
    for values in database.execute(f"SELECT {', '.join(names)} FROM main.{table.name} NOT INDEXED"):  # noqa: S608
        if len(rows) >= table.max_rows:
            raise ManifestError(f"table {table.name} has more than {table.max_rows} row(s)")
        left -= sum(len(value) for value in values if isinstance(value, str | bytes))
        if left < 0:
            raise ManifestError("its rows hold more text than the file has bytes")
        rows.append(dict(zip(names, values, strict=True)))
    return rows, left


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


# Moments and JSON, as manifests, pointers and records have them.


def timestamp(moment: datetime) -> str:
    """A moment as the format writes it: UTC, always six fractional digits, ``Z``."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_moment(value: Any) -> datetime:
    """A moment in UTC from ISO text, seconds or milliseconds since 1970, or a datetime; no zone means UTC."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | datetime):
        raise ValueError(f"is no ISO datetime: {value!r}")  # noqa: TRY004 - pydantic turns only ValueError into its own
    try:
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value / 1000 if abs(value) > _SECONDS_LIMIT else value, UTC)
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (OverflowError, OSError, ValueError) as error:
        raise ValueError(f"is no ISO datetime: {value!r:.80}") from error


Moment = Annotated[datetime, BeforeValidator(parse_moment), PlainSerializer(timestamp, when_used="json")]


def dump_json(value: Any) -> str:
    """Compact JSON with sorted keys; a ``ValueError`` for NaN, infinity, or what JSON cannot say."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def load_json(text: str | bytes) -> Any:
    """JSON from somebody else; a ``ValueError`` where it says NaN, infinity or a key twice, or nests too deeply."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError("nests too deeply") from error


def _refuse(name: str) -> Any:
    raise ValueError(f"holds {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds a number that is too large: {text:.40}")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"names the key {repeated!r:.80} twice")
    return result
