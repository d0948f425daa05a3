"""Format checker: the pointer, the manifest and the history, as a stock reader takes them."""

import json
import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeGuard
from urllib.parse import unquote

from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.format_checker.report import CannotGoOnError, Duty, Findings

POINTER_KEY = "_CURRENT"
SQLITE_MAGIC = b"SQLite format 3\x00"
_MOMENT = r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{6}Z"
RUN_FOLDER = re.compile(rf"({_MOMENT})_run_id=([^/]+)")
_ENCODINGS = ("u64be", "u32be", "utf8", "raw")
_META_TEXTS = ("run_id", "created_at", "s3_prefix", "key_col", "db_path_template", "shard_prefix", "sharding")
_META_COLUMNS = {*_META_TEXTS, "num_dbs", "format_version", "key_encoding", "custom"}
SHARD_COUNTS = ("attempt", "row_count", "db_bytes")
_SHARD_COLUMNS = {
    *("db_id", "db_url", "min_key", "max_key", "checkpoint_id", "writer_info"),
    *SHARD_COUNTS,
}


@dataclass(frozen=True)
class Place:
    """The root under check.

    Attributes:
        store: opened on the root.
    """

    store: Store

    @property
    def is_s3(self) -> bool:
        """Local snapshots have no bucket that could differ."""
        return self.store.url.startswith("s3://")

    def key_of(self, url: str) -> str | None:
        """Key below the root that an absolute address names; None when it lies elsewhere."""
        base = f"{self.store.url}/"
        if not url.startswith(base):
            return None
        tail = url[len(base) :]
        return tail if self.is_s3 else unquote(tail)


@dataclass(frozen=True)
class ManifestContent:
    """What a manifest says.

    Attributes:
        run_id: its build.
        num_dbs: shards, empty ones included.
        key_col: name of the key column.
        key_encoding: of the keys.
        sharding: decoded record.
        custom: decoded custom fields.
        rows: rows of ``shards`` as they are.
    """

    run_id: str
    num_dbs: int
    key_col: str
    key_encoding: str
    sharding: dict[str, Any]
    custom: dict[str, Any]
    rows: list[dict[str, Any]]


def is_int(value: object) -> TypeGuard[int]:
    """An integer and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_plain(key: str) -> bool:
    """A key without empty and dotted segments, so without slashes at its ends."""
    return not {"", ".", ".."} & set(key.split("/"))


def check_pointer(findings: Findings, place: Place) -> tuple[str, str]:
    """Reads ``_CURRENT``.

    Returns:
        Key of the manifest and the run id that the pointer names.
    """
    expect = findings.expect
    found = place.store.find(POINTER_KEY)
    findings.require(Duty.POINTER, found is not None, "_CURRENT is missing: stock raises FileNotFoundError")
    pointer = json_of(found.data if found else b"")
    findings.require(
        Duty.POINTER, isinstance(pointer, dict), "_CURRENT is no JSON object: ManifestParseError, without fallback"
    )
    for name in ("manifest_ref", "manifest_content_type", "run_id", "updated_at"):
        findings.require(
            Duty.POINTER,
            isinstance(pointer.get(name), str) and bool(pointer[name]),
            f"_CURRENT.{name} is {pointer.get(name)!r}, not a text: ManifestParseError, without fallback",
        )
    expect(
        Duty.POINTER,
        _zoned(pointer["updated_at"]),
        f"_CURRENT.updated_at {pointer['updated_at']!r} is no ISO date ending in Z: health() raises TypeError",
    )
    kind = pointer["manifest_content_type"]
    expect(
        Duty.POINTER,
        kind == "application/x-sqlite3",
        f"_CURRENT.manifest_content_type is {kind!r}, stock writes application/x-sqlite3",
    )
    version = pointer.get("format_version", 1)
    expect(Duty.POINTER, is_int(version) and version == 1, f"_CURRENT.format_version is {version!r}, must be 1")
    ref = pointer["manifest_ref"]
    key = place.key_of(ref)
    findings.require(
        Duty.POINTER,
        key is not None and is_plain(key),
        f"_CURRENT.manifest_ref {ref!r} is not below {place.store.url}: stock reads the same key in its own bucket",
    )
    return key or "", pointer["run_id"]


def check_history(findings: Findings, place: Place, key: str, run_id: str) -> None:
    """The manifest's own name and its neighbours under ``manifests/``."""
    expect = findings.expect
    folder, _, last = key.removeprefix("manifests/").rpartition("/")
    named = RUN_FOLDER.fullmatch(folder)
    well_named = key.startswith("manifests/") and last == "manifest" and named is not None
    expect(
        Duty.MANIFEST_KEY,
        well_named,
        f"manifest {key!r} is not manifests/<time with six digits>Z_run_id=<run_id>/manifest: "
        "history, rollback and fallback do not see it",
    )
    if named is not None:
        expect(
            Duty.MANIFEST_KEY,
            named[2] == run_id,
            f"manifest {key!r} is named for another run than build_meta.run_id {run_id!r}: "
            "rollback writes the run_id of the name into _CURRENT",
        )
    seen: dict[str, str] = {}
    for name in place.store.folders("manifests"):
        match = RUN_FOLDER.fullmatch(name)
        if expect(
            Duty.MANIFEST_KEY, match is not None, f"manifests/{name} has no name of the format: history skips it"
        ):
            other = seen.setdefault(match[2] if match else "", name)
            expect(
                Duty.MANIFEST_KEY,
                other == name,
                f"manifests/{name} has the run_id of manifests/{other}: caches and cleanup take one for the other",
            )


def read_manifest(findings: Findings, place: Place, key: str) -> ManifestContent:
    """Reads both tables of the manifest and checks every field that is the same in all kinds."""
    require = findings.require
    found = place.store.find(key)
    require(Duty.MANIFEST, found is not None, f"manifest {key!r} is missing: stock raises, without fallback")
    data = found.data if found else b""
    require(Duty.MANIFEST, data.startswith(SQLITE_MAGIC), f"manifest {key!r} is no SQLite database: ManifestParseError")
    try:
        metas, rows = tables_of(findings, data)
    except sqlite3.DatabaseError as error:
        findings.expect(Duty.MANIFEST, False, f"manifest {key!r} cannot be read ({error}): ManifestParseError")
        raise CannotGoOnError(str(error)) from error
    require(Duty.MANIFEST, len(metas) == 1, f"build_meta has {len(metas)} rows, stock reads one")
    return _content(findings, place, metas[0], rows)


def tables_of(findings: Findings, data: bytes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of ``build_meta`` and of ``shards``.

    Raises:
        CannotGoOnError: a table or a column is missing; the fault is noted already.
        sqlite3.DatabaseError: the database is damaged.
    """
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(data)
        database.execute("PRAGMA trusted_schema = OFF")
        database.row_factory = sqlite3.Row
        kinds = dict(database.execute("SELECT name, type FROM sqlite_schema").fetchall())
        found = []
        for table, columns in (("build_meta", _META_COLUMNS), ("shards", _SHARD_COLUMNS)):
            findings.require(
                Duty.MANIFEST,
                kinds.get(table) == "table",
                f"manifest has no table {table}, but {kinds.get(table)}: ManifestParseError",
            )
            cursor = database.execute(f"SELECT * FROM {table}")  # noqa: S608 (a name from the lines above)
            missing = sorted(columns - {item[0] for item in cursor.description})
            findings.require(Duty.MANIFEST, not missing, f"{table} lacks the columns {missing}: ManifestParseError")
            found.append([dict(row) for row in cursor])
        return found[0], found[1]


def _content(findings: Findings, place: Place, meta: dict[str, Any], rows: list[dict[str, Any]]) -> ManifestContent:
    require, expect = findings.require, findings.expect
    for name in _META_TEXTS:
        value = meta[name]
        require(
            Duty.MANIFEST, isinstance(value, str), f"build_meta.{name} is {value!r}, not a text: ManifestParseError"
        )
    require(
        Duty.MANIFEST,
        is_int(meta["num_dbs"]) and meta["num_dbs"] > 0,
        f"build_meta.num_dbs is {meta['num_dbs']!r}, must be above 0: ManifestParseError",
    )
    version = meta["format_version"]
    expect(
        Duty.MANIFEST,
        is_int(version) and version == 4,
        f"build_meta.format_version is {version!r}, stock reads only 4: ManifestParseError",
    )
    encoding = meta["key_encoding"]
    require(
        Duty.MANIFEST,
        encoding in _ENCODINGS,
        f"build_meta.key_encoding is {encoding!r}, not one of {', '.join(_ENCODINGS)}: ManifestParseError",
    )
    created = meta["created_at"]
    expect(Duty.MANIFEST, _zoned(created), f"build_meta.created_at {created!r} is no ISO date ending in Z")
    _check_paths(findings, place, meta)
    sharding, custom = json_of(meta["sharding"]), json_of(meta["custom"] or "{}")
    for name, value in (("sharding", sharding), ("custom", custom)):
        found = f"build_meta.{name} is {meta[name]!r:.100}"
        require(Duty.MANIFEST, isinstance(value, dict), f"{found}, not a JSON object: ManifestParseError")
    return ManifestContent(meta["run_id"], meta["num_dbs"], meta["key_col"], encoding, sharding, custom, rows)


def _check_paths(findings: Findings, place: Place, meta: dict[str, Any]) -> None:
    expect = findings.expect
    prefix, folder, template = meta["s3_prefix"], meta["shard_prefix"], meta["db_path_template"]
    expect(
        Duty.MANIFEST,
        prefix == place.store.url,
        f"build_meta.s3_prefix {prefix!r} is not {place.store.url!r}: stock reads the shards of the original, "
        "and its cleanup looks there",
    )
    if place.is_s3:
        bucket, _, rest = place.store.url.removeprefix("s3://").partition("/")
        expect(
            Duty.MANIFEST, bool(bucket and rest), f"root {place.store.url!r} has no key prefix: ConfigValidationError"
        )
    expect(
        Duty.MANIFEST,
        bool(re.fullmatch(r"[A-Za-z0-9._-]+", folder)) and ".." not in folder,
        f"build_meta.shard_prefix {folder!r} is no single plain segment: cleanup refuses it",
    )
    expect(
        Duty.MANIFEST,
        _formats(template),
        f"build_meta.db_path_template {template!r} has no {{db_id}} for Python's format: cleanup cannot use it",
    )


def json_of(text: object) -> Any:
    """Decoded JSON; None (which no caller accepts) for what is none."""
    if not isinstance(text, (str, bytes)):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _zoned(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None and text.endswith("Z")
    except ValueError:
        return False


def _formats(template: str) -> bool:
    try:
        return template.format(db_id=1) != template.format(db_id=2)
    except (KeyError, IndexError, ValueError, AttributeError):
        return False
