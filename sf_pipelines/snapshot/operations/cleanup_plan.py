"""The plan of a cleanup: what may go, group by group, each by the rule of its kind."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from sf_pipelines.snapshot.operations.layout import Inventory, Item, Kind, newest
from sf_pipelines.snapshot.operations.protection import CleanupRules, Guard, Protection
from sf_pipelines.snapshot.run.receipts import ScanReceipt
from sf_pipelines.snapshot.store import ObjectInfo, Store

Rule = Literal[
    "snapshot",
    "leftovers",
    "build",
    "attempts",
    "routing",
    "staging",
    "verdicts",
    "dagster",
    "notes",
    "frames",
    "temporary",
]

# What a writer on local disk leaves when it is killed: obstore's parts, and this package's own before the rename.
_TEMPORARY = re.compile(r".+#\d+|\.(_CURRENT|run\.yaml)\.[A-Za-z0-9_]{8}")
_SHOWN = 3
_ENDS = {"failed": "the build failed", "abandoned": "the build was abandoned"}


@dataclass(frozen=True)
class CleanupGroup:
    """Objects that go together.

    Attributes:
        rule: ``snapshot`` is a published snapshot with all that its build wrote; ``leftovers`` what is left of a
            snapshot that a cleanup began to remove; ``build`` a build that failed or was abandoned; ``attempts``
            attempts at a shard that lost; ``routing`` centroids or hyperplanes of attempts that lost; ``staging``
            what stages handed to each other; ``verdicts`` verdicts on manifests that were not published;
            ``dagster`` references of a Dagster run; ``notes`` notes on routing that has failed its gate; ``frames``
            what an engine's frame was written to, of a build that did not publish; ``temporary`` what killed writers
            left on local disk.
        run_id: build that they are of; a Dagster run under ``dagster``; None for notes and temporary files.
        why: why they may go.
        steps: keys in the order in which they go; those of one step in any order.
        objects: how many.
        bytes: their size.
    """

    rule: Rule
    run_id: str | None
    why: str
    steps: tuple[tuple[str, ...], ...]
    objects: int
    bytes: int

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys in order."""
        return tuple(key for step in self.steps for key in step)


@dataclass(frozen=True)
class KeptSnapshot:
    """A published snapshot that stays.

    Attributes:
        run_id: its build.
        why: why it stays.
    """

    run_id: str
    why: str


@dataclass(frozen=True)
class LeftAlone:
    """What a cleanup does not touch because it does not understand it.

    Attributes:
        what: a run, or the place of the objects.
        why: why it is left alone.
        objects: how many.
        bytes: their size.
    """

    what: str
    why: str
    objects: int
    bytes: int


@dataclass(frozen=True)
class CleanupPlan:
    """What a cleanup would do.

    Attributes:
        root: address of the root.
        rules: what is to be kept.
        made_at: when the plan was made, UTC.
        groups: what would go, in order.
        kept: published snapshots and running builds that stay.
        left_alone: what is not understood and stays.
    """

    root: str
    rules: CleanupRules
    made_at: datetime
    groups: tuple[CleanupGroup, ...]
    kept: tuple[KeptSnapshot, ...]
    left_alone: tuple[LeftAlone, ...]

    @property
    def objects(self) -> int:
        """Objects that would go."""
        return sum(group.objects for group in self.groups)

    @property
    def bytes(self) -> int:
        """Bytes that would be freed."""
        return sum(group.bytes for group in self.groups)


def plan_cleanup(store: Store, rules: CleanupRules, *, now: datetime | None = None) -> CleanupPlan:
    """What a cleanup would do now; changes nothing.

    Args:
        store: the root.
        rules: what is to be kept.
        now: the present moment; None asks the clock.
    """
    moment = now or datetime.now(UTC)
    # What is listed before the guard looks cannot be newer than what it sees.
    inventory = Inventory.of(store.objects())
    protection = Guard(store, rules, _foreign_runs(inventory)).look(moment)
    planner = _Planner(protection, rules, moment)
    groups = [group for run_id in sorted(inventory.runs) for group in planner.of_run(run_id, inventory.runs[run_id])]
    groups += planner.of_dagster(store, inventory)
    groups += planner.of_notes(inventory)
    groups += planner.of_frames(inventory)
    groups += planner.of_temporary(store)
    kept = {**protection.kept, **protection.live}
    return CleanupPlan(
        root=store.url,
        rules=rules,
        made_at=moment,
        groups=tuple(groups),
        kept=tuple(KeptSnapshot(run_id, why) for run_id, why in sorted(kept.items())),
        left_alone=tuple(_left_alone(store, inventory, protection)),
    )


class _Planner:
    """Finds what may go, by the rule of its kind."""

    def __init__(self, protection: Protection, rules: CleanupRules, now: datetime) -> None:
        self._protection = protection
        self._rules = rules
        self._now = now

    def of_run(self, run_id: str, items: list[Item]) -> Iterator[CleanupGroup]:
        """Groups of one build."""
        protection = self._protection
        if run_id in protection.removable:
            yield from self._whole_run("snapshot", run_id, items, protection.removable[run_id])
        elif protection.reason(run_id) is None:
            yield from self._unlisted(run_id, items)
        elif run_id in protection.kept and run_id not in protection.live:
            yield from self._parts_of_kept(run_id, items)

    def _unlisted(self, run_id: str, items: list[Item]) -> Iterator[CleanupGroup]:
        """Of a build without a published manifest."""
        ended = self._protection.ended.get(run_id)
        if ended == "succeeded":
            why = "it was published, and an earlier cleanup took it out of the history"
            yield from self._whole_run("leftovers", run_id, items, why)
        elif self._is_stale(items):
            how = _ENDS.get(ended or "", "the build has no record")
            why = f"{how}, and nothing was written for {self._rules.stale_after}"
            yield from self._whole_run("build", run_id, items, why)

    def _whole_run(self, rule: Rule, run_id: str, items: list[Item], why: str) -> Iterator[CleanupGroup]:
        gone = [item for item in items if not self._is_referred(item)]
        records = [item for item in gone if item.kind is Kind.RECORD]
        others = [item for item in gone if item.kind is not Kind.RECORD]
        first = [item for item in others if item.kind is Kind.MANIFEST]
        scans = [item for item in others if item.kind is Kind.RECEIPT and item.detail == ScanReceipt.stage]
        rest = [item for item in others if item not in first and item not in scans]
        if len(gone) < len(items):
            # A fork still refers to some of it: the record stays as long as they do.
            records = []
        yield from _group(rule, run_id, why, [first, scans, rest, records])

    def _parts_of_kept(self, run_id: str, items: list[Item]) -> Iterator[CleanupGroup]:
        """What a published snapshot that stays does not need."""
        whole = run_id in self._protection.whole
        lost = [item for item in items if not self._is_referred(item)]
        digests = self._protection.digests.get(run_id, frozenset())
        since = f"and nothing was written for {self._rules.stale_after}"
        named = "no receipt names them" if whole else "only the current snapshot needs them, to build a shard anew"
        verdicts = [item for item in self._stale_units(items, Kind.VERDICT) if item.detail not in digests]
        parts: list[tuple[Rule, str, list[Item]]] = [
            ("attempts", "attempts that lost", self._stale_units(lost, Kind.SHARD)),
            ("routing", "routing of attempts that lost", self._stale_units(lost, Kind.ROUTING)),
            ("staging", named, self._stale_units(lost, Kind.WORK, Kind.SAMPLE)),
            ("verdicts", "on manifests that were not published", verdicts),
        ]
        for rule, why, found in parts:
            yield from _group(rule, run_id, f"{why}, {since}", [found])

    def of_dagster(self, store: Store, inventory: Inventory) -> Iterator[CleanupGroup]:
        """References of Dagster runs that nobody re-executes any more."""
        for folder, items in sorted(inventory.dagster.items()):
            if self._is_stale(items) and not self._names_a_live_run(store, items):
                run_id = folder.rsplit("/", 1)[-1]
                why = f"references of a Dagster run that wrote nothing for {self._rules.stale_after}"
                yield from _group("dagster", run_id, why, [items])

    def of_notes(self, inventory: Inventory) -> Iterator[CleanupGroup]:
        """Notes of no build. Without one, routing that failed its gate long ago may be tried once more."""
        stale = [item for item in inventory.notes if self._is_old(item.info.modified)]
        yield from _group("notes", None, f"nobody wrote them again for {self._rules.stale_after}", [stale])

    def of_frames(self, inventory: Inventory) -> Iterator[CleanupGroup]:
        """What frames were written to. Which build reads it is not in its name, so any that runs keeps it."""
        if self._protection.live:
            return
        why = f"a frame was written here, and nothing was added for {self._rules.stale_after}"
        for _, items in sorted(inventory.frames.items()):
            if self._is_stale(items):
                yield from _group("frames", None, why, [items])

    def _names_a_live_run(self, store: Store, items: list[Item]) -> bool:
        names = [run_id.encode() for run_id in self._protection.live]
        return bool(names) and any(name in store.get(item.key) for item in items for name in names)

    def of_temporary(self, store: Store) -> Iterator[CleanupGroup]:
        """What killed writers left on local disk. S3 has no such files; parts of uploads are the bucket's to expire."""
        if store.local_root is None:
            return
        files = [info for info in _temporary(store.local_root) if self._is_old(info.modified)]
        if files:
            why = f"left by writers that were killed more than {self._rules.stale_after} ago"
            keys = tuple(info.key for info in files)
            yield CleanupGroup("temporary", None, why, (keys,), len(keys), sum(info.size for info in files))

    def _is_referred(self, item: Item) -> bool:
        referred = self._protection.referred
        return item.key in referred or item.unit in referred

    def _stale_units(self, items: list[Item], *kinds: Kind) -> list[Item]:
        """Objects of these kinds whose unit was last written long ago."""
        units: dict[str, list[Item]] = {}
        for item in items:
            if item.kind in kinds:
                units.setdefault(item.unit, []).append(item)
        return [item for unit in units.values() if self._is_stale(unit) for item in unit]

    def _is_stale(self, items: Iterable[Item]) -> bool:
        return self._is_old(newest(items))

    def _is_old(self, moment: datetime | None) -> bool:
        return moment is not None and moment <= self._now - self._rules.stale_after


def _group(rule: Rule, run_id: str | None, why: str, steps: list[list[Item]]) -> Iterator[CleanupGroup]:
    infos = [item.info for step in steps for item in step]
    if infos:
        keys = tuple(tuple(item.key for item in step) for step in steps if step)
        yield CleanupGroup(rule, run_id, why, keys, len(infos), sum(info.size for info in infos))


def _temporary(root: Path) -> Iterator[ObjectInfo]:
    for folder, _, names in os.walk(root):
        for name in names:
            if _TEMPORARY.fullmatch(name):
                path = Path(folder, name)
                try:
                    found = path.stat()
                except FileNotFoundError:
                    # Its writer is alive, and has just renamed it.
                    continue
                modified = datetime.fromtimestamp(found.st_mtime, UTC)
                yield ObjectInfo(path.relative_to(root).as_posix(), found.st_size, None, modified)


def _foreign_runs(inventory: Inventory) -> dict[str, str]:
    """Runs with objects among their shards that no known writer has made."""
    foreign: dict[str, str] = {}
    for info in inventory.unknown:
        match = re.match(r"shards/run_id=([^/]+)/", info.key)
        if match:
            foreign.setdefault(match[1], f"among its shards is {info.key}, which no known writer makes")
    return foreign


def _left_alone(store: Store, inventory: Inventory, protection: Protection) -> Iterator[LeftAlone]:
    for run_id, why in sorted(protection.alone.items()):
        infos = [item.info for item in inventory.runs.get(run_id, [])]
        yield LeftAlone(run_id, why, len(infos), sum(info.size for info in infos))
    temporary = {info.key for info in _temporary(store.local_root)} if store.local_root else set[str]()
    unknown = [info for info in inventory.unknown if info.key not in temporary]
    if unknown:
        shown = ", ".join(info.key for info in unknown[:_SHOWN])
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        why = f"no known writer makes them: {shown}{more}"
        yield LeftAlone("unknown objects", why, len(unknown), sum(info.size for info in unknown))
