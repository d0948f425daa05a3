"""What a cleanup must not touch, as it is at this moment: asked when it is planned, and again before each group."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sf_pipelines.snapshot.errors import IntegrityError, ManifestError, ObjectMissingError, OperationError
from sf_pipelines.snapshot.manifest.codec import decode_manifest
from sf_pipelines.snapshot.manifest.models import Manifest
from sf_pipelines.snapshot.manifest.publish import HistoryEntry, history, read_pointer
from sf_pipelines.snapshot.manifest.record import RUNS, BuildRecord, read_record
from sf_pipelines.snapshot.operations.layout import Kind, recognise
from sf_pipelines.snapshot.operations.pins import pinned_runs
from sf_pipelines.snapshot.operations.trail import Trail
from sf_pipelines.snapshot.run.ledger import STAGING
from sf_pipelines.snapshot.run.receipts import RangeReceipt, RouteReceipt, ScanReceipt, ShardReceipt
from sf_pipelines.snapshot.store import ObjectInfo, Store

# Of a snapshot that nobody builds on these receipts name only its own shards and rows.
_OWN_STAGES = frozenset({ShardReceipt.stage, RangeReceipt.stage, RouteReceipt.stage})
_PLACES = ("staging/", "shards/", "vector_meta/")


@dataclass(frozen=True)
class CleanupRules:
    """What is to be kept.

    Attributes:
        keep: published snapshots to keep: the current one, then the one that was served before, then the newest
            that no rollback has withdrawn.
        older_than: keep all that were built since; None goes by ``keep`` alone.
        stale_after: failed and abandoned builds, attempts that lost, temporary files and references of Dagster runs
            are kept for so long after they were last written.
    """

    keep: int
    older_than: timedelta | None
    stale_after: timedelta

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or self.keep < 1:
            raise OperationError(f"keep must be a whole number from 1: what is current stays (got {self.keep!r})")

        for name in ("older_than", "stale_after"):
            value: timedelta | None = getattr(self, name)
            if value is not None and value < timedelta(0):
                raise OperationError(f"{name} must not be negative (got {value})")


@dataclass(frozen=True)
class Protection:
    """What may go, and what must stay.

    Attributes:
        whole: runs of which everything must stay that their newest receipts name, and why.
        kept: published snapshots that stay, and why; those of ``whole`` too.
        removable: published snapshots that may go, and why.
        alone: runs that are not understood and left alone, and why.
        live: builds that are running, and how that is known.
        digests: SHA-256 (hex) of the published manifests of each run that stays.
        ended: runs whose record says how they ended, and how.
        referred: keys and folders that something which stays refers to.
    """

    whole: Mapping[str, str]
    kept: Mapping[str, str]
    removable: Mapping[str, str]
    alone: Mapping[str, str]
    live: Mapping[str, str]
    ended: Mapping[str, str]
    digests: Mapping[str, frozenset[str]]
    referred: frozenset[str]

    def reason(self, run_id: str) -> str | None:
        """Why a run must stay as a whole; None where it may go."""
        for group in (self.live, self.alone, self.kept, self.whole):
            if run_id in group:
                return group[run_id]
        return None


class Guard:
    """Looks at a root again and again; what never changes is read once.

    Args:
        store: the root.
        rules: what is to be kept.
        foreign: runs with objects among their shards that nobody here has written, and why they are left alone.
    """

    def __init__(self, store: Store, rules: CleanupRules, foreign: Mapping[str, str]) -> None:
        self._store = store
        self._rules = rules
        self._foreign = foreign
        self._manifests: dict[str, Manifest | str] = {}
        self._digests: dict[str, str] = {}
        self._records: dict[tuple[str, str | None], BuildRecord | None] = {}
        self._strings: dict[str, frozenset[str]] = {}

    def look(self, now: datetime) -> Protection:
        """What must stay at this moment.

        Raises:
            OperationError: snapshots are published, but nothing says which one is served.
            IntegrityError: the pointer or the manifest of the current snapshot cannot be understood.
        """
        trail = self._trail()
        live, ended = self._builds(now)
        alone = self._left_alone(trail)
        whole = self._whole(trail, live)
        kept, removable = self._sorted(trail, {**whole, **live}, alone, now)
        referred: set[str] = set()
        for run_id in {*kept, *alone, *live, *whole}:
            deep = run_id in whole or run_id in live or run_id in alone
            referred |= self._referred(run_id, [e for e in trail.entries if e.run_id == run_id], deep=deep)
        digests = {
            run_id: frozenset(self._digests.get(e.manifest_key, "") for e in trail.entries if e.run_id == run_id)
            for run_id in kept
        }
        return Protection(whole, kept, removable, alone, live, ended, digests, frozenset(referred))

    # Who stays.

    def _trail(self) -> Trail:
        """The history, once it is sure what is served."""
        pointer, entries = read_pointer(self._store).pointer, history(self._store, limit=None)
        if pointer is None and entries:
            raise OperationError(
                f"{self._store.url} lists {len(entries)} snapshots, but has no pointer that says which is served; "
                "nothing is cleaned up: roll back to one of them first"
            )
        trail = Trail.of(pointer, entries)
        for entry in trail.entries:
            if entry.is_current:
                found = self._manifest(entry)
                if isinstance(found, str):
                    raise ManifestError(f"the current snapshot cannot be understood, nothing is cleaned up: {found}")
                return trail
        if pointer is not None:
            raise ObjectMissingError(
                f"the pointer names {pointer.manifest_ref}, which is not there; nothing is cleaned up: roll back first"
            )
        return trail

    def _whole(self, trail: Trail, live: Mapping[str, str]) -> dict[str, str]:
        """The current snapshot, pinned ones, and those that a running build goes out from."""
        whole = dict.fromkeys(pinned_runs(self._store), "it is pinned")
        for run_id in live:
            for key in self._newest_receipts(run_id, only={ScanReceipt.stage}):
                base = json.loads(self._store.get(key)).get("base_run_id")
                if isinstance(base, str):
                    whole[base] = f"the running build {run_id} goes out from it"
        if trail.pointer is not None:
            whole[trail.pointer.run_id] = "it is current"
        return whole

    def _sorted(
        self, trail: Trail, protected: Mapping[str, str], alone: Mapping[str, str], now: datetime
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Published snapshots that stay and that may go, with the reasons."""
        rules, kept, removable = self._rules, dict[str, str](), dict[str, str]()
        ranked = [entry.run_id for entry in self._ranked(trail) if entry.run_id not in alone][: rules.keep]
        for entry in trail.entries:
            run_id = entry.run_id
            if run_id in alone:
                continue
            if run_id in protected:
                kept[run_id] = protected[run_id]
            elif run_id in ranked:
                kept[run_id] = f"it is among the {rules.keep} to keep"
            elif rules.older_than is not None and entry.published_at >= now - rules.older_than:
                kept[run_id] = f"it was built less than {rules.older_than} ago"
            else:
                withdrawn = trail.pointer is not None and run_id in trail.pointer.withdrawn
                what = "withdrawn by a rollback" if withdrawn else f"not among the {rules.keep} to keep"
                old = "" if rules.older_than is None else f", built more than {rules.older_than} ago"
                removable[run_id] = what + old
        return kept, removable

    def _ranked(self, trail: Trail) -> list[HistoryEntry]:
        """What counts towards ``keep``, best first."""
        pointer = trail.pointer
        if pointer is None:
            return []
        newest = {entry.run_id: entry for entry in trail.entries}
        others = [entry.run_id for entry in (*reversed(trail.served), *reversed(trail.entries))]
        order = [pointer.run_id, *([pointer.previous.run_id] if pointer.previous else [])]
        order += [run_id for run_id in others if run_id not in pointer.withdrawn]
        return [newest[run_id] for run_id in dict.fromkeys(order) if run_id in newest]

    def _left_alone(self, trail: Trail) -> dict[str, str]:
        """Runs that are not as this package or a stock writer leaves them."""
        alone = dict(self._foreign)
        for entry in trail.entries:
            found = self._manifest(entry)
            if isinstance(found, str):
                alone[entry.run_id] = found
            elif found.run_id != entry.run_id:
                alone[entry.run_id] = f"its manifest says that it is of run {found.run_id!r}"
            elif strange := [key for key in _shard_folders(found) if not _is_shard_folder(key)]:
                alone[entry.run_id] = f"its shards are not where writers put them: {strange[0]}"
        current = trail.pointer.run_id if trail.pointer else None
        return {run_id: why for run_id, why in alone.items() if run_id != current}

    def _builds(self, now: datetime) -> tuple[dict[str, str], dict[str, str]]:
        """Builds that are running, and how the others ended, by run."""
        live, ended = dict[str, str](), dict[str, str]()
        for info in self._store.objects(RUNS):
            item = recognise(info)
            if item is None or item.run_id is None:
                continue
            record = self._record(info)
            if record is None:
                live[item.run_id] = f"its record {info.key} cannot be understood"
            elif record.alive(now):
                live[item.run_id] = f"its build is running (lease until {record.lease_expires_at:%Y-%m-%d %H:%M:%S}Z)"
            elif ended.get(item.run_id) != "succeeded":
                ended[item.run_id] = "abandoned" if record.status == "running" else record.status
        return live, ended

    # What they refer to.

    def _referred(self, run_id: str, entries: Iterable[HistoryEntry], *, deep: bool) -> set[str]:
        """Keys and folders that a run's manifest and its newest receipts name."""
        referred: set[str] = set()
        for entry in entries:
            found = self._manifest(entry)
            if not isinstance(found, str):
                referred |= {*_shard_folders(found), *_routing_keys(found)}
        waiting, seen = self._newest_receipts(run_id, skip=frozenset() if deep else _OWN_STAGES), set[str]()
        while waiting:
            key = waiting.pop()
            seen.add(key)
            for name in self._named_in(key):
                item = recognise(ObjectInfo(name, 0, None))
                if deep or item is None or item.kind is not Kind.WORK:
                    referred.add(name)
                # A fork's receipts name those of the run that it is a copy of.
                if deep and item is not None and item.kind is Kind.RECEIPT and name not in seen:
                    waiting.append(name)
        return referred

    def _newest_receipts(
        self, run_id: str, *, only: Iterable[str] | None = None, skip: frozenset[str] = frozenset()
    ) -> list[str]:
        """The last receipt of each stage and part."""
        last: dict[str, str] = {}
        wanted = None if only is None else set(only)
        for key in sorted(info.key for info in self._store.objects(f"{STAGING}/run_id={run_id}/receipts")):
            item = recognise(ObjectInfo(key, 0, None))
            if item is None or item.detail in skip or (wanted is not None and item.detail not in wanted):
                continue
            last[key.rsplit("/", 1)[0]] = key
        return list(last.values())

    def _named_in(self, key: str) -> frozenset[str]:
        """Every text in a receipt that is a key or a folder of this root."""
        if key not in self._strings:
            try:
                told = json.loads(self._store.get(key))
                # A copied shard stands alone: where it came from may go.
                found = _texts({**told, "reused": None} if isinstance(told, dict) else told)
            except ObjectMissingError:
                return frozenset()
            except ValueError as error:
                raise IntegrityError(
                    f"receipt {self._store.url_of(key)} is no JSON, so what it refers to is not known; nothing more is "
                    f"cleaned up: {error}"
                ) from error
            self._strings[key] = frozenset(text for text in found if text.startswith(_PLACES))
        return self._strings[key]

    # What never changes is read once.

    def _manifest(self, entry: HistoryEntry) -> Manifest | str:
        """A published manifest, or what is wrong with it."""
        key = entry.manifest_key
        if key not in self._manifests:
            try:
                data = self._store.get(key)
                self._digests[key] = hashlib.sha256(data).hexdigest()
                found: Manifest | str = decode_manifest(data, where=self._store.url_of(key))
                _ = _shard_folders(found), _routing_keys(found)
            except IntegrityError as error:
                found = str(error)
            except ObjectMissingError as error:
                # Removed since it was listed.
                return str(error)
            self._manifests[key] = found
        return self._manifests[key]

    def _record(self, info: ObjectInfo) -> BuildRecord | None:
        """A build's record as it is now; None where it cannot be understood."""
        version = (info.key, info.etag)
        if version not in self._records:
            try:
                record = read_record(self._store, info.key)
            except (IntegrityError, ObjectMissingError):
                record = None
            self._records[version] = record
        return self._records[version]


def _shard_folders(manifest: Manifest) -> list[str]:
    return [manifest.key_of(shard.db_url) for shard in manifest.shards if shard.db_url is not None]


def _is_shard_folder(key: str) -> bool:
    item = recognise(ObjectInfo(f"{key}/shard.db", 0, None))
    return item is not None and item.unit == key


def _routing_keys(manifest: Manifest) -> list[str]:
    if "vector" not in manifest.custom:
        return []
    refs = (manifest.vector.centroids_ref, manifest.vector.hyperplanes_ref)
    return [manifest.key_of(ref) for ref in refs if ref is not None]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
