"""Cleanup: a plan of what may go, group by group; then exactly that plan, looked at once more.

The order of deletions is such that a crash leaves nothing half there that anybody can find: a snapshot's manifest
goes first, which takes it out of the history; a build's scan receipts go first, without which nobody resumes it; the
build record goes last, so that the next cleanup knows what is left.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import ObjectMissingError, SfPipelinesError
from sf_pipelines.snapshot.manifest.models import MANIFEST_CONTENT_TYPE
from sf_pipelines.snapshot.operations.cleanup_plan import CleanupGroup, CleanupPlan, plan_cleanup
from sf_pipelines.snapshot.operations.layout import recognise
from sf_pipelines.snapshot.operations.protection import CleanupRules, Guard, Protection
from sf_pipelines.snapshot.reader.core import open_root
from sf_pipelines.snapshot.store import ObjectInfo, Store

STALE_AFTER = timedelta(days=7)


@dataclass(frozen=True)
class GroupOutcome:
    """What became of a group.

    Attributes:
        group: as planned.
        refused: why it stayed, or the rest of it; None when all of it went.
    """

    group: CleanupGroup
    refused: str | None


@dataclass(frozen=True)
class CleanupResult:
    """What a cleanup did.

    Attributes:
        plan: what was to be done.
        applied: whether it was done; a dry run does nothing.
        outcomes: of each group, in order; empty after a dry run.
    """

    plan: CleanupPlan
    applied: bool
    outcomes: tuple[GroupOutcome, ...]

    @property
    def bytes_freed(self) -> int:
        """Bytes of the groups that went."""
        return sum(outcome.group.bytes for outcome in self.outcomes if outcome.refused is None)


def cleanup(
    root: str | Path | Store,
    *,
    keep: int,
    older_than: timedelta | None = None,
    stale_after: timedelta = STALE_AFTER,
    dry_run: bool = True,
    s3: S3Options | None = None,
) -> CleanupResult:
    """Removes what nobody needs any more; by default only says what that would be.

    Never touched: the current snapshot, what is among the ``keep``, pinned snapshots, running builds (their lease
    counts), what any of these refers to, and whatever neither this package nor a stock writer has written.

    Args:
        root: the snapshot's root.
        keep: see ``CleanupRules``.
        older_than: see ``CleanupRules``.
        stale_after: see ``CleanupRules``.
        dry_run: only plan.
        s3: credentials.

    Raises:
        OperationError: an argument is wrong, or nothing says which snapshot is served.
        IntegrityError: the pointer or the current manifest cannot be understood.
        StoreError: the store did not do what was asked; run the cleanup again to go on.
    """
    store = open_root(root, s3)
    plan = plan_cleanup(store, CleanupRules(keep, older_than, stale_after))
    return CleanupResult(plan, applied=False, outcomes=()) if dry_run else apply_cleanup(store, plan)


def apply_cleanup(store: Store, plan: CleanupPlan, *, now: datetime | None = None) -> CleanupResult:
    """Does what was planned, and nothing else.

    Before each group, and after its first step, it is looked again whether the group may still go: what was
    published, rolled back to, pinned or taken up again since then stays.

    Args:
        store: the root.
        plan: from ``plan_cleanup``.
        now: the present moment; None asks the clock.

    Raises:
        OperationError: nothing says which snapshot is served any more.
        StoreError: the store did not do what was asked; plan and apply again to go on.
    """
    foreign = {left.what: left.why for left in plan.left_alone}
    guard = Guard(store, plan.rules, foreign)
    outcomes = [GroupOutcome(group, _remove(store, guard, group, now)) for group in plan.groups]
    return CleanupResult(plan, applied=True, outcomes=tuple(outcomes))


# Doing it.


def _remove(store: Store, guard: Guard, group: CleanupGroup, now: datetime | None) -> str | None:
    """Removes a group; why it stayed, or the rest of it, if it did."""
    refused = _objection(guard.look(now or datetime.now(UTC)), group)
    if refused is not None:
        return refused
    if group.rule == "temporary":
        _unlink(store, group)
        return None
    first, *others = group.steps
    manifests = _taken_out(store, first) if group.rule == "snapshot" else {}
    store.delete_many([key for key in first if key not in manifests])
    if others:
        # Whoever made it current, pinned it or took it up meanwhile either has seen that its first objects are gone,
        # or shows up here: then its manifest comes back.
        refused = _second_look(store, guard, group, manifests, now)
    if refused is None:
        for step in others:
            store.delete_many(step)
        _remove_empty_folders(store, group.keys)
    return refused


def _second_look(
    store: Store, guard: Guard, group: CleanupGroup, manifests: Mapping[str, bytes], now: datetime | None
) -> str | None:
    """Why the rest of a group must stay after all; what was taken out of the history is then back in it."""
    try:
        refused = _objection(guard.look(now or datetime.now(UTC)), group)
    except SfPipelinesError as error:
        # Such as a pointer that names what was just taken out.
        refused = f"since the plan was made: {error}"
    if refused is not None:
        for key, data in manifests.items():
            store.create(key, data, content_type=MANIFEST_CONTENT_TYPE)
    return refused


def _taken_out(store: Store, keys: Iterable[str]) -> dict[str, bytes]:
    """Deletes manifests; their bytes, should they have to come back."""
    taken: dict[str, bytes] = {}
    for key in keys:
        try:
            taken[key] = store.get(key)
        except ObjectMissingError:
            continue
        store.delete(key)
    return taken


def _objection(protection: Protection, group: CleanupGroup) -> str | None:
    """Why a planned group must stay after all."""
    run_id = group.run_id
    if run_id is not None and group.rule in {"snapshot", "leftovers", "build"}:
        why = protection.reason(run_id)
        if why is None and group.rule != "snapshot" and run_id in protection.removable:
            why = "it was published"
        if why is not None:
            return f"since the plan was made: {why}"
    if run_id is not None and run_id in protection.live:
        return f"since the plan was made: {protection.live[run_id]}"
    items = [recognise(ObjectInfo(key, 0, None)) for key in group.keys]
    needed = [item.key for item in items if item is not None and {item.key, item.unit} & protection.referred]
    return f"since the plan was made: something that stays refers to {needed[0]}" if needed else None


def _unlink(store: Store, group: CleanupGroup) -> None:
    for key in group.keys:
        if store.local_root is not None:
            (store.local_root / key).unlink(missing_ok=True)


def _remove_empty_folders(store: Store, keys: Iterable[str]) -> None:
    """On local disk a folder outlives its files; S3 has none."""
    if store.local_root is None:
        return
    folders = {parent for key in keys for parent in Path(key).parents if len(parent.parts) > 1}
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        # One that is not empty, or that somebody else removed, is left as it is.
        with suppress(OSError):
            (store.local_root / folder).rmdir()
