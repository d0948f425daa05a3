"""Cleanup: runs that nobody needs any more, each kept or removed as a whole; and leftovers of no run, by age.

A crash leaves nothing half there that anybody can find: a snapshot's manifest goes first, which takes it out of the
history; a build's scan receipts go first, without which nobody resumes it; the build record goes last, so that the
next cleanup knows what is left.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import (
    IntegrityError,
    ManifestError,
    ObjectMissingError,
    OperationError,
    SfPipelinesError,
)
from sf_pipelines.snapshot.manifest.codec import decode_manifest
from sf_pipelines.snapshot.manifest.models import MANIFEST_CONTENT_TYPE
from sf_pipelines.snapshot.manifest.pointer import CURRENT, parse_manifest_key
from sf_pipelines.snapshot.manifest.publish import HistoryEntry, history, read_pointer
from sf_pipelines.snapshot.manifest.record import RUNS, BuildRecord, read_record
from sf_pipelines.snapshot.operations.pins import pinned_runs
from sf_pipelines.snapshot.operations.rollback import ServedHistory
from sf_pipelines.snapshot.reader.core import open_root
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import ScanReceipt
from sf_pipelines.snapshot.store import ObjectInfo, Store

STALE_AFTER = timedelta(days=7)

Rule = Literal["snapshot", "leftovers", "build", "routed", "dagster", "frames", "notes", "temporary"]

_OF_RUN = re.compile(r"(?P<place>staging|shards|vector_meta)/run_id=(?P<run>[^/]+)/(?P<rest>.+)")
# What is as large as the source, and no reader asks for: its checked rows, and those routed to shards.
_ROWS = re.compile(r"staging/run_id=[^/]+/(rows|routed)/")
_RECORD = re.compile(
    rf"{RUNS}/\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{6}}Z_run_id=(?P<run>[^/]+)_[0-9a-f]{{32}}/run\.yaml"
)
# What this package and stock writers put among a run's shards.
_SHARD = re.compile(r"db=\d+/attempt=\d+(-[0-9a-f]{8})?/(shard\.db|shard\.sidecar|(vector/)?vector_index\.lance/.+)")
# Objects of no run. Those of one folder (the group) go together, once nothing was added to it for long.
_BY_AGE: dict[Rule, tuple[str, re.Pattern[str]]] = {
    "dagster": ("references of Dagster runs", re.compile(r"(staging/dagster/runs/[^/]+)/.+")),
    "frames": ("sources of builds", re.compile(r"(staging/frames/[0-9a-f]{32})/part-[0-9a-f]{32}\.parquet")),
    "notes": ("notes of failed gates", re.compile(r"(staging/outworn/[0-9a-f]{64}\.json|staging/probe/[0-9a-f]{32})")),
}
_KEPT = re.compile(rf"staging/dagster/latest/.+|pins/[^/]+\.json|{CURRENT}|\.sf_pipelines\.lock")
# What a writer on local disk leaves when it is killed: obstore's parts, and this package's own before the rename.
_TEMPORARY = re.compile(r".+#\d+|\.(_CURRENT|run\.yaml)\.[A-Za-z0-9_]{8}")
_ENDS = {"failed": "the build failed", "abandoned": "the build was abandoned"}
_SHOWN = 3


@dataclass(frozen=True)
class CleanupRules:
    """What is to be kept.

    Attributes:
        keep: published snapshots to keep: the current one, then the one that was served before, then the newest
            that no rollback has withdrawn.
        older_than: keep all that were built since; None goes by ``keep`` alone.
        stale_after: failed and abandoned builds, routed rows and what is of no run are kept for so long after they were
            last written.
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
class CleanupGroup:
    """Objects that go together.

    Attributes:
        rule: ``snapshot`` is a published run, ``leftovers`` what an interrupted cleanup left of one, ``build`` a run
            that failed or was abandoned: each with everything under its name. ``routed`` are checked and routed rows
            of a snapshot that stays, ``dagster``, ``frames`` and ``notes`` what is of no run, ``temporary`` files of
            killed writers.
        steps: keys in the order in which they go; those of one step in any order.
        refused: why they stayed, or the rest of them; None when all went, and before a cleanup is applied.
    """

    rule: Rule
    run_id: str | None
    why: str
    steps: tuple[tuple[str, ...], ...]
    objects: int
    bytes: int
    refused: str | None = None

    @classmethod
    def of(cls, rule: Rule, run_id: str | None, why: str, *steps: list[ObjectInfo]) -> "CleanupGroup":
        """Of these objects."""
        infos = [info for step in steps for info in step]
        keys = tuple(tuple(info.key for info in step) for step in steps if step)
        return cls(rule, run_id, why, keys, len(infos), sum(info.size for info in infos))

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys in order."""
        return tuple(key for step in self.steps for key in step)


@dataclass(frozen=True)
class CleanupReport:
    """What a cleanup would do, or, when ``applied``, has done: what goes, in order; and what stays, by run, and why.

    What is not understood is left alone: runs, and objects that no known writer makes.
    """

    root: str
    rules: CleanupRules
    made_at: datetime
    groups: tuple[CleanupGroup, ...]
    kept: Mapping[str, str]
    left_alone: Mapping[str, str]
    applied: bool = False

    @property
    def objects(self) -> int:
        """Objects of all groups."""
        return sum(group.objects for group in self.groups)

    @property
    def bytes(self) -> int:
        """Their size."""
        return sum(group.bytes for group in self.groups)

    @property
    def bytes_freed(self) -> int:
        """Bytes of the groups that went."""
        return sum(group.bytes for group in self.groups if self.applied and group.refused is None)


def cleanup(
    root: str | Path | Store,
    *,
    keep: int,
    older_than: timedelta | None = None,
    stale_after: timedelta = STALE_AFTER,
    dry_run: bool = True,
    s3: S3Options | None = None,
) -> CleanupReport:
    """Removes what nobody needs any more; by default only says what that would be.

    Never touched: the current snapshot, what is among the ``keep``, pinned snapshots, running builds (their lease
    counts) and the snapshots they go out from, runs that a manifest of any of these refers to, and whatever neither
    this package nor a stock writer has written. ``keep``, ``older_than`` and ``stale_after``: see ``CleanupRules``.

    Raises:
        OperationError: an argument is wrong, or nothing says which snapshot is served.
        IntegrityError: the pointer or the current manifest cannot be understood.
        StoreError: the store did not do what was asked; run the cleanup again to go on.
    """
    store = open_root(root, s3)
    plan = plan_cleanup(store, CleanupRules(keep, older_than, stale_after))
    return plan if dry_run else apply_cleanup(store, plan)


# The plan.


def plan_cleanup(store: Store, rules: CleanupRules, *, now: datetime | None = None) -> CleanupReport:
    """What a cleanup would do now; changes nothing."""
    moment = now or datetime.now(UTC)
    # Listed before anybody is asked what is needed: what is written since cannot be in the plan.
    inventory = _Inventory.of(store.objects())
    needs = _needs(store, rules, inventory, moment)
    temporary = list(_temporary_files(store.local_root)) if store.local_root else []
    names, old = {info.key for info in temporary}, moment - rules.stale_after
    groups = [*_run_groups(inventory, needs, rules, old), *_groups_of_no_run(inventory, needs, rules, old, temporary)]
    left_alone = dict(needs.alone)
    if unknown := [key for key in inventory.unknown if key not in names]:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        left_alone[f"{len(unknown)} objects"] = f"no known writer makes them: {', '.join(unknown[:_SHOWN])}{more}"
    kept = dict(sorted(needs.kept.items()))
    return CleanupReport(store.url, rules, moment, tuple(groups), kept, left_alone)


@dataclass
class _Inventory:
    """All objects of a root: of runs, of no run by rule and folder, and the keys of those that no known writer makes.

    Where such a key is among the shards of a run, ``foreign`` names it.
    """

    runs: defaultdict[str, list[ObjectInfo]] = field(default_factory=lambda: defaultdict(list))
    by_age: defaultdict[tuple[str, str], list[ObjectInfo]] = field(default_factory=lambda: defaultdict(list))
    foreign: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, objects: Iterable[ObjectInfo]) -> "_Inventory":
        made = cls()
        for info in objects:
            if run_id := _run_of(info.key):
                made.runs[run_id].append(info)
                match = _OF_RUN.fullmatch(info.key)
                if match and match["place"] == "shards" and not _SHARD.fullmatch(match["rest"]):
                    made.foreign.setdefault(run_id, info.key)
            elif found := [
                (rule, match[1]) for rule, (_, shape) in _BY_AGE.items() if (match := shape.fullmatch(info.key))
            ]:
                made.by_age[found[0]].append(info)
            elif not _KEPT.fullmatch(info.key):
                made.unknown.append(info.key)
        return made


def _run_of(key: str) -> str | None:
    """The run under whose name an object lies."""
    if name := parse_manifest_key(key):
        return name.run_id
    match = _OF_RUN.fullmatch(key) or _RECORD.fullmatch(key)
    return match["run"] if match else None


@dataclass(frozen=True)
class _Needs:
    """Which runs stay and which may go, with the reasons.

    ``kept`` ones may be unpublished; of those that are ``whole`` shards may be built anew. What is ``removable`` may
    still be kept for another reason. ``alone`` are runs that are not understood, ``ended`` says how builds ended.
    """

    kept: Mapping[str, str]
    whole: frozenset[str]
    removable: Mapping[str, str]
    running: Mapping[str, str]
    alone: Mapping[str, str]
    ended: Mapping[str, str]


def _needs(store: Store, rules: CleanupRules, inventory: _Inventory, now: datetime) -> _Needs:
    # Records first: a build that they call successful has its manifest in the history that is read next.
    running, ended = _builds(store, now)
    past, refers, alone = _history(store, inventory)
    whole = dict.fromkeys(pinned_runs(store), "it is pinned")
    for run_id in running:
        scanned = Ledger(store, run_id).find(ScanReceipt)
        if scanned is not None and scanned.base_run_id is not None:
            whole[scanned.base_run_id] = f"the running build {run_id} goes out from it"
    if past.pointer is not None:
        whole[past.pointer.run_id] = "it is current"
    kept = {run_id: why for run_id, why in {**whole, **running}.items() if run_id not in alone}
    ranked = [run_id for run_id in _ranked(past) if run_id not in alone][: rules.keep]
    kept |= {run_id: f"it is among the {rules.keep} to keep" for run_id in ranked if run_id not in kept}
    removable = dict[str, str]()
    age = str(rules.older_than).removesuffix(", 0:00:00")
    for entry in past.entries:
        run_id = entry.run_id
        if rules.older_than is not None and entry.published_at >= now - rules.older_than:
            kept.setdefault(run_id, f"it was built less than {age} ago")
        withdrawn = past.pointer is not None and run_id in past.pointer.withdrawn
        what = "withdrawn by a rollback" if withdrawn else f"not among the {rules.keep} to keep"
        removable[run_id] = what if rules.older_than is None else f"{what}, built more than {age} ago"
    waiting = [*kept, *alone]
    while waiting:
        run_id = waiting.pop()
        for other in refers[run_id] - {*kept, *alone}:
            kept[other] = f"the manifest of run {run_id} refers to its objects"
            waiting.append(other)
    kept = {run_id: why for run_id, why in kept.items() if run_id not in alone}
    return _Needs(kept, frozenset(whole), removable, running, alone, ended)


def _builds(store: Store, now: datetime) -> tuple[dict[str, str], dict[str, str]]:
    """Builds that are running, and how the others ended."""
    running, ended = dict[str, str](), dict[str, str]()
    for info in store.objects(RUNS):
        run_id = _run_of(info.key)
        if run_id is None:
            continue
        try:
            record = read_record(store, info.key)
        except (IntegrityError, ObjectMissingError):
            running[run_id] = f"its record {info.key} cannot be understood"
            continue
        if record.alive(now):
            running[run_id] = _lease(record)
        elif ended.get(run_id) != "succeeded":
            ended[run_id] = "abandoned" if record.status == "running" else record.status
    return running, ended


def _lease(record: BuildRecord) -> str:
    return f"its build is running (lease until {record.lease_expires_at:%Y-%m-%d %H:%M:%S}Z)"


def _history(
    store: Store, inventory: _Inventory
) -> tuple[ServedHistory, defaultdict[str, set[str]], Mapping[str, str]]:
    """What was published; the runs that each run's manifests refer to; runs that are not understood, and why."""
    pointer, nothing = read_pointer(store).pointer, "nothing is cleaned up"
    past = ServedHistory.of(store, pointer)
    if pointer is None and past.entries:
        raise OperationError(
            f"{store.url} lists {len(past.entries)} snapshots, but has no pointer that says which is served; "
            f"{nothing}: roll back to one of them first"
        )
    if pointer is not None and not any(entry.is_current for entry in past.entries):
        raise ObjectMissingError(
            f"the pointer names {pointer.manifest_ref}, which is not there; {nothing}: roll back first"
        )
    refers: defaultdict[str, set[str]] = defaultdict(set)
    unknown = {run: f"among its shards is {key}, which no known writer makes" for run, key in inventory.foreign.items()}
    alone = {run_id: why for run_id, why in unknown.items() if pointer is None or run_id != pointer.run_id}
    for entry in past.entries:
        try:
            refers[entry.run_id] |= _referred_runs(store, entry)
        except (IntegrityError, ObjectMissingError) as error:
            if entry.is_current:
                raise ManifestError(f"the current snapshot cannot be understood, {nothing}: {error}") from error
            alone[entry.run_id] = str(error)
    return past, refers, alone


def _referred_runs(store: Store, entry: HistoryEntry) -> set[str]:
    """Runs that hold what a published manifest names; one that writers would not have written is refused."""
    manifest = decode_manifest(store.get(entry.manifest_key), where=store.url_of(entry.manifest_key))
    if manifest.run_id != entry.run_id and not entry.is_current:
        raise IntegrityError(f"its manifest says that it is of run {manifest.run_id!r}")
    runs: set[str] = set()
    for key in [manifest.key_of(shard.db_url) for shard in manifest.shards if shard.db_url is not None]:
        match = _OF_RUN.fullmatch(key)
        if match is None or match["place"] != "shards" or not _SHARD.fullmatch(f"{match['rest']}/shard.db"):
            if not entry.is_current:
                raise IntegrityError(f"its shards are not where writers put them: {key}")
        else:
            runs.add(match["run"])
    if "vector" in manifest.custom:
        refs = (manifest.vector.centroids_ref, manifest.vector.hyperplanes_ref)
        runs |= {run_id for ref in refs if ref is not None and (run_id := _run_of(manifest.key_of(ref)))}
    return runs


def _ranked(past: ServedHistory) -> list[str]:
    """Runs that count towards ``keep``, best first."""
    pointer = past.pointer
    if pointer is None:
        return []
    others = [entry.run_id for entry in (*reversed(past.served), *reversed(past.entries))]
    order = [pointer.run_id, *([pointer.previous.run_id] if pointer.previous else [])]
    order += [run_id for run_id in others if run_id not in pointer.withdrawn]
    listed = {entry.run_id for entry in past.entries}
    return [run_id for run_id in dict.fromkeys(order) if run_id in listed]


def _run_groups(inventory: _Inventory, needs: _Needs, rules: CleanupRules, old: datetime) -> Iterator[CleanupGroup]:
    """Runs that go as a whole, and routed rows of those that stay."""
    since = f"and nothing was written for {rules.stale_after}"
    for run_id, infos in sorted(inventory.runs.items()):
        if run_id in needs.alone:
            continue
        if run_id in needs.kept:
            routed = [info for info in infos if _ROWS.match(info.key)]
            if run_id not in {*needs.whole, *needs.running} and routed and _is_stale(routed, old):
                why = f"only the current snapshot needs them, to build a shard anew, {since}"
                yield CleanupGroup.of("routed", run_id, why, routed)
            continue
        steps, ended = _steps(infos), needs.ended.get(run_id, "")
        if run_id in needs.removable:
            if not steps[0]:
                continue  # Published since the objects were listed.
            rule, why = "snapshot", needs.removable[run_id]
        elif ended == "succeeded":
            rule, why = "leftovers", "it was published, and an earlier cleanup took it out of the history"
        elif _is_stale(infos, old):
            rule, why = "build", f"{_ENDS.get(ended, 'the build has no record')}, {since}"
        else:
            continue
        yield CleanupGroup.of(rule, run_id, why, *steps)


def _steps(infos: list[ObjectInfo]) -> tuple[list[ObjectInfo], ...]:
    """A run's objects in the order in which they go: manifests, scan receipts, all others, records."""
    manifests = [info for info in infos if parse_manifest_key(info.key)]
    records = [info for info in infos if _RECORD.fullmatch(info.key)]
    scans = [info for info in infos if f"/receipts/{ScanReceipt.stage}/" in info.key]
    apart = {info.key for info in (*manifests, *records, *scans)}
    return manifests, scans, [info for info in infos if info.key not in apart], records


def _groups_of_no_run(
    inventory: _Inventory, needs: _Needs, rules: CleanupRules, old: datetime, temporary: list[ObjectInfo]
) -> Iterator[CleanupGroup]:
    for rule, (what, _) in _BY_AGE.items():
        # Which build uses a frame, or a reference of Dagster, is not in its name: a running one keeps them all.
        if needs.running and rule != "notes":
            continue
        folders = [infos for (other, _), infos in sorted(inventory.by_age.items()) if other == rule]
        if stale := [info for infos in folders if _is_stale(infos, old) for info in infos]:
            why = f"{what}, to which nothing was added for {rules.stale_after}"
            yield CleanupGroup.of(rule, None, why, stale)
    if stale := [info for info in temporary if _is_stale([info], old)]:
        why = f"left by writers that were killed more than {rules.stale_after} ago"
        yield CleanupGroup.of("temporary", None, why, stale)


def _temporary_files(root: Path) -> Iterator[ObjectInfo]:
    """On local disk; S3 has no such files, and parts of uploads are the bucket's to expire."""
    for folder, _, names in os.walk(root):
        for name in filter(_TEMPORARY.fullmatch, names):
            path = Path(folder, name)
            # One that is gone: its writer is alive, and has just renamed it.
            with suppress(FileNotFoundError):
                found = path.stat()
                modified = datetime.fromtimestamp(found.st_mtime, UTC)
                yield ObjectInfo(path.relative_to(root).as_posix(), found.st_size, None, modified)


def _is_stale(infos: list[ObjectInfo], old: datetime) -> bool:
    """Whether none was written since; not where the store does not say of one."""
    return all(info.modified is not None and info.modified <= old for info in infos)


# Doing it.


def apply_cleanup(store: Store, plan: CleanupReport, *, now: datetime | None = None) -> CleanupReport:
    """Does what was planned, and nothing else; what somebody has claimed since then stays."""
    groups = [replace(group, refused=_remove(store, group, now)) for group in plan.groups]
    return replace(plan, groups=tuple(groups), applied=True)


def _remove(store: Store, group: CleanupGroup, now: datetime | None) -> str | None:
    """Removes a group; why it stayed, or the rest of it, if it did."""
    refused = _claim(store, group, now)
    if refused is not None:
        return refused
    if group.rule == "temporary":
        for key in group.keys if store.local_root else ():
            Path(store.local_root or "", key).unlink(missing_ok=True)
        return None
    first, *others = group.steps
    found = {key: store.find(key) for key in first if parse_manifest_key(key)}
    manifests = {key: manifest.data for key, manifest in found.items() if manifest is not None}
    store.delete_many(first)
    # Whoever made it current, pinned it or took it up meanwhile either has seen that its first objects are gone,
    # or shows up here: then its manifest comes back.
    try:
        refused = _claim(store, group, now) if others else None
    except SfPipelinesError as error:
        refused = f"since the plan was made: {error}"
    if refused is not None:
        for key, data in manifests.items():
            store.create(key, data, content_type=MANIFEST_CONTENT_TYPE)
        return refused
    for step in others:
        store.delete_many(step)
    _remove_empty_folders(store, group.keys)
    return None


def _claim(store: Store, group: CleanupGroup, now: datetime | None) -> str | None:
    """Why a planned group must stay after all."""
    run_id, pointer = group.run_id, read_pointer(store).pointer
    if run_id is None:
        return None
    listed = {entry.run_id for entry in history(store, None)} if group.rule in {"build", "leftovers"} else set[str]()
    claims = {
        "nothing says any more which snapshot is served": pointer is None and group.rule in {"snapshot", "routed"},
        "it is current": pointer is not None and pointer.run_id == run_id,
        "it is pinned": run_id in pinned_runs(store),
        "it was published": run_id in listed,
    }
    for key in filter(_RECORD.fullmatch, group.keys):
        with suppress(ObjectMissingError):
            record = read_record(store, key)
            claims[_lease(record)] = record.alive(now or datetime.now(UTC))
    return next((f"since the plan was made: {why}" for why, holds in claims.items() if holds), None)


def _remove_empty_folders(store: Store, keys: Iterable[str]) -> None:
    """On local disk a folder outlives its files; S3 has none."""
    if store.local_root is None:
        return
    folders = {parent for key in keys for parent in Path(key).parents if len(parent.parts) > 1}
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        # One that is not empty, or that somebody else removed, is left as it is.
        with suppress(OSError):
            (store.local_root / folder).rmdir()
