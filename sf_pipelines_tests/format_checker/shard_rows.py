"""Format checker: the rows of ``shards``, as a stock reader and stock's cleanup take them."""

import re
import sqlite3
from dataclasses import dataclass
from typing import Any

from sf_pipelines_tests.format_checker.manifest import (
    RUN_FOLDER,
    SHARD_COUNTS,
    SQLITE_MAGIC,
    ManifestContent,
    Place,
    is_int,
    is_plain,
    json_of,
    tables_of,
)
from sf_pipelines_tests.format_checker.report import CannotGoOnError, Duty, Findings, some

# S3 takes keys of up to 1,024 bytes; scheme and bucket come before.
_LONGEST_URL = 1200


@dataclass(frozen=True)
class ShardEntry:
    """One row of ``shards`` whose directory can be looked into.

    Attributes:
        db_id: shard.
        key: its directory below the root.
        row_count: rows that the manifest says.
        db_bytes: bytes that it says.
        min_key: smallest key, decoded from JSON.
        max_key: largest key.
    """

    db_id: int
    key: str
    row_count: int
    db_bytes: int
    min_key: Any
    max_key: Any

    def __str__(self) -> str:
        return f"shard {self.db_id}"


def check_shard_rows(findings: Findings, place: Place, manifest: ManifestContent, *, unified: bool) -> list[ShardEntry]:
    """Every row of ``shards``.

    Returns:
        Those whose directory can be looked into.
    """
    rows = manifest.rows
    expect = findings.expect
    expect(
        Duty.SHARD_ROWS,
        len(rows) <= manifest.num_dbs,
        f"shards has {len(rows)} rows for build_meta.num_dbs {manifest.num_dbs}: ManifestParseError",
    )
    for name, makes in (
        ("db_id", "ManifestParseError"),
        ("db_url", "two shards answer with the same rows"),
        ("checkpoint_id", "local caches take one shard for the other"),
    ):
        values = [row[name] for row in rows]
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        expect(Duty.SHARD_ROWS, not twice, f"shards.{name} repeats {some(twice)}: {makes}")
    entries = [_shard_row(findings, place, manifest, row, unified=unified) for row in rows]
    return [entry for entry in entries if entry is not None]


def other_runs(findings: Findings, place: Place, key: str, manifest: ManifestContent) -> None:
    """No other manifest in history shares shard directories or checkpoint ids with this one."""
    mine = {name: {row[name] for row in manifest.rows} for name in ("db_url", "checkpoint_id")}
    for name in place.store.folders("manifests"):
        other = f"manifests/{name}/manifest"
        found = None if other == key or not RUN_FOLDER.fullmatch(name) else place.store.find(other)
        if found is None or not found.data.startswith(SQLITE_MAGIC):
            continue
        try:
            _, rows = tables_of(Findings(other), found.data)
        except (sqlite3.DatabaseError, CannotGoOnError):
            # Another manifest that stock cannot read is that manifest's fault; stock skips it, too.
            continue
        for field, values in mine.items():
            shared = sorted(str(row[field]) for row in rows if row[field] in values)
            findings.expect(
                Duty.SHARD_ROWS,
                not shared,
                f"shards.{field} {some(shared)} is used by {other} as well: caches keep the older bytes",
            )


def _shard_row(
    findings: Findings, place: Place, manifest: ManifestContent, row: dict[str, Any], *, unified: bool
) -> ShardEntry | None:
    where = f"shards row db_id={row['db_id']!r}"
    expect = findings.expect
    in_range = is_int(row["db_id"]) and 0 <= row["db_id"] < manifest.num_dbs
    expect(Duty.SHARD_ROWS, in_range, f"{where}: db_id is not below num_dbs {manifest.num_dbs}: ManifestParseError")
    odd = [name for name in SHARD_COUNTS if not is_int(row[name]) or row[name] < 0]
    for name in odd:
        expect(Duty.SHARD_ROWS, False, f"{where}: {name} is {row[name]!r}, not a count: ManifestParseError")
    info = json_of(row["writer_info"])
    expect(
        Duty.SHARD_ROWS,
        isinstance(info, dict),
        f"{where}: writer_info is {row['writer_info']!r}, not a JSON object: ManifestParseError",
    )
    token = row["checkpoint_id"]
    expect(
        Duty.SHARD_ROWS,
        isinstance(token, str) and bool(re.fullmatch("[0-9a-f]{32}", token)),
        f"{where}: checkpoint_id is {token!r}, not 32 hex digits: it names the shard in local caches",
    )
    keys = [_key_scalar(findings, where, row, name, unified=unified) for name in ("min_key", "max_key")]
    if row["row_count"] == 0 or row["db_url"] is None:
        expect(Duty.SHARD_ROWS, False, f"{where}: an empty shard is listed; stock leaves it out")
        return None
    key = _shard_key(findings, place, manifest, row, where)
    if key is None or odd or not in_range:
        return None
    return ShardEntry(row["db_id"], key, row["row_count"], row["db_bytes"], keys[0], keys[1])


def _shard_key(
    findings: Findings, place: Place, manifest: ManifestContent, row: dict[str, Any], where: str
) -> str | None:
    expect = findings.expect
    url = row["db_url"]
    key = place.key_of(url) if isinstance(url, str) else None
    if not expect(
        Duty.SHARD_ROWS,
        key is not None,
        f"{where}: db_url {url!r} is not an absolute address below {place.store.url}: stock reads it where it points",
    ):
        return None
    segments = (key or "").split("/")
    if not expect(
        Duty.SHARD_ROWS,
        is_plain(key or "") and len(url) <= _LONGEST_URL,
        f"{where}: db_url {url!r:.300} ends in a slash, has empty or dotted segments or more than {_LONGEST_URL} "
        "characters: the object client refuses it",
    ):
        return None
    last = re.fullmatch(r"attempt=([0-9]{2,})(-[A-Za-z0-9._-]+)?", segments[-1])
    attempt = row["attempt"]
    name = f"attempt={attempt:02d}" if is_int(attempt) else f"the attempt, which is {attempt!r:.80}"
    expect(
        Duty.SHARD_ROWS,
        last is not None and is_int(attempt) and int(last[1]) == attempt,
        f"{where}: db_url {url!r} does not end in {name}: cleanup goes by that name",
    )
    expect(
        Duty.SHARD_ROWS,
        f"run_id={manifest.run_id}" in segments,
        f"{where}: db_url {url!r} is not below run_id={manifest.run_id}: cleanup protects a run by that name",
    )
    return key


def _key_scalar(findings: Findings, where: str, row: dict[str, Any], name: str, *, unified: bool) -> Any:
    text = row[name]
    if text is None:
        return None
    value = json_of(text)
    findings.expect(
        Duty.SHARD_ROWS,
        unified and (is_int(value) or isinstance(value, str)),
        f"{where}: {name} is {text!r}; must be " + ("a JSON number or text" if unified else "NULL without keys"),
    )
    return value
