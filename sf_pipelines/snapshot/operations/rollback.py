"""Rollback to a snapshot that was published before, and the release of what a rollback holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import (
    IntegrityError,
    ManifestError,
    ObjectMissingError,
    OperationError,
    RunNotFoundError,
    SnapshotDamagedError,
)
from sf_pipelines.snapshot.manifest.codec import decode_manifest
from sf_pipelines.snapshot.manifest.pointer import (
    CURRENT,
    MAX_POINTER_BYTES,
    MAX_REMEMBERED,
    Hold,
    Pointer,
    manifest_key,
)
from sf_pipelines.snapshot.manifest.publish import HistoryEntry, PointerView, history, move, read_pointer, successor
from sf_pipelines.snapshot.operations.verify import Wholeness, check_whole, verify_snapshot
from sf_pipelines.snapshot.reader.core import open_root
from sf_pipelines.snapshot.reader.state import SnapshotState, load_state, read_current
from sf_pipelines.snapshot.run.build import Progress
from sf_pipelines.snapshot.store import Store

# Faults that an error message names.
_SHOWN = 5

# Build key and gate key of a snapshot; None where another writer made it.
Keys = tuple[str | None, str | None]


@dataclass(frozen=True)
class ServedHistory:
    """Published snapshots, oldest first: all that are listed, and in ``served`` the way that a rollback goes back."""

    url: str
    pointer: Pointer | None
    entries: tuple[HistoryEntry, ...]
    served: tuple[HistoryEntry, ...]

    @classmethod
    def of(cls, store: Store, pointer: Pointer | None) -> "ServedHistory":
        """As a store has it.

        The pointer remembers the last runs that were served. What is listed from before, or all where a writer moved
        the pointer that remembers nothing, is taken in the order of the manifests' dates.
        """
        listed = tuple(reversed(history(store, limit=None)))
        if pointer is None:
            return cls(store.url, None, listed, ())
        newest = {entry.run_id: entry for entry in listed}
        known = pointer.served if pointer.served[-1:] == (pointer.run_id,) else (pointer.run_id,)
        remembered = [newest[run_id] for run_id in known if run_id in newest and run_id not in pointer.withdrawn]
        first = remembered[0].manifest_key if remembered else manifest_key(pointer)
        skipped = {*known, *pointer.withdrawn}
        before = [entry for entry in listed if entry.manifest_key < first and entry.run_id not in skipped]
        return cls(store.url, pointer, listed, (*before, *remembered))

    def find(self, run_id: str) -> HistoryEntry:
        """The published snapshot of a run, if it is listed."""
        for entry in reversed(self.entries):
            if entry.run_id == run_id:
                return entry
        known = ", ".join(entry.run_id for entry in self.entries[-5:]) or "none"
        raise RunNotFoundError(f"no snapshot of run {run_id!r} is published under {self.url} (the newest are: {known})")

    def back(self, steps: int) -> HistoryEntry:
        """What was served so many snapshots ago."""
        if isinstance(steps, bool) or steps < 1:
            raise OperationError(f"back must be a whole number of at least 1 (got {steps!r})")
        if self.pointer is None:
            raise OperationError(f"nothing is current under {self.url}, so there is no way back; name a run: to=…")
        before = [entry for entry in self.served if entry.run_id != self.pointer.run_id]
        if steps > len(before):
            raise RunNotFoundError(
                f"{self.url}: {len(before)} snapshots that were served before run {self.pointer.run_id!r} are still "
                f"there, {steps} were asked for"
            )
        return before[-steps]

    def withdrawn_by(self, target: HistoryEntry) -> tuple[str, ...]:
        """The pointer's list of withdrawn runs after a rollback: what comes after the target is withdrawn."""
        if self.pointer is None:
            return ()
        order = [entry.run_id for entry in self.served]
        # What was never served counts by its date: nobody should fall back to it from the target either.
        later = {entry.run_id for entry in self.entries if entry.manifest_key > target.manifest_key} - set(order)
        if target.run_id in order:
            later |= {*order[order.index(target.run_id) + 1 :], self.pointer.run_id}
        elif manifest_key(self.pointer) > target.manifest_key:
            later.add(self.pointer.run_id)
        # The current one may not be listed any more, which may be the very reason for the rollback.
        everyone = (*(entry.run_id for entry in self.entries), self.pointer.run_id)
        known = dict.fromkeys((*self.pointer.withdrawn, *(run_id for run_id in everyone if run_id in later)))
        return tuple(run_id for run_id in known if run_id != target.run_id)[-MAX_REMEMBERED:]

    def served_after(self, target: HistoryEntry) -> tuple[str, ...]:
        """The pointer's list of served runs after a rollback: what was served up to the target."""
        order = [entry.run_id for entry in self.served]
        if target.run_id in order:
            return tuple(order[: order.index(target.run_id) + 1])[-MAX_REMEMBERED:]
        withdrawn = set(self.withdrawn_by(target))
        return (*(run_id for run_id in order if run_id not in withdrawn), target.run_id)[-MAX_REMEMBERED:]


@dataclass(frozen=True)
class RollbackResult:
    """What a rollback did: what is served now, what is held and withdrawn, what was looked at before."""

    run_id: str
    manifest_key: str
    previous_run_id: str | None
    seq: int
    holds: tuple[Hold, ...]
    withdrawn: tuple[str, ...]
    checked: Wholeness


@dataclass(frozen=True)
class ReleaseResult:
    """What a release did: the builds that were held; what is served stays."""

    released: tuple[Hold, ...]
    run_id: str
    seq: int | None


def open_published(root: str | Path | Store, s3: S3Options | None) -> Store:
    """A store on a root that something was published under, whether its pointer is there or gone."""
    store = open_root(root, s3)
    if not store.exists(CURRENT) and not history(store, limit=1):
        read_current(store)
    return store


def rollback(
    root: str | Path | Store,
    to: str | None = None,
    *,
    back: int = 1,
    s3: S3Options | None = None,
    deep: bool = False,
    progress: Progress | None = None,
) -> RollbackResult:
    """Makes a snapshot current that was published before.

    The target is looked at first: its manifest must be the one that was published, and every object of its shards
    must be there as it was sealed. Then the pointer is moved by compare-and-swap. It holds the build keys of the
    snapshots that were withdrawn, so that the next build of the same source and config does not publish them again.

    Going to a snapshot that an earlier rollback withdrew undoes that rollback, and lifts its hold. A pointer that is
    gone or cannot be understood is replaced when ``to`` is given.

    Args:
        root: the snapshot's root.
        to: run id to go to; None goes ``back`` in the history of what was served.
        back: how many snapshots back.
        s3: credentials.
        deep: read and hash every object, also those whose version in the store is still the sealed one. Snapshots of
            others, which seal nothing, are always read.
        progress: told how many shards of such a snapshot have been read.

    Raises:
        OperationError: it is current already, or ``back`` is no number of snapshots.
        RunNotFoundError: no such snapshot is published.
        SnapshotDamagedError: objects of the target are gone or changed; names them.
        IntegrityError: its manifest or its routing is not what was published.
        PublishConflictError: somebody else moved the pointer at the same time; names who.
    """
    store = open_published(root, s3)
    view = _present(store, replace=to is not None)
    past = ServedHistory.of(store, view.pointer)
    target = past.back(back) if to is None else past.find(to)
    if view.pointer is not None and manifest_key(view.pointer) == target.manifest_key:
        raise OperationError(f"run {target.run_id!r} is current already under {store.url}")
    state, checked = _verified(store, target, s3, deep=deep, progress=progress)
    ours = _pointer_to(store, view, past, target, state)
    moved = move(store, ours, view)
    if not store.exists(target.manifest_key):
        _undo(store, moved, view, target)
    return RollbackResult(
        run_id=moved.run_id,
        manifest_key=target.manifest_key,
        previous_run_id=view.pointer.run_id if view.pointer else None,
        seq=moved.seq or 0,
        holds=moved.holds,
        withdrawn=moved.withdrawn,
        checked=checked,
    )


def release(root: str | Path | Store, *, s3: S3Options | None = None) -> ReleaseResult:
    """Lifts what rollbacks hold: the next build of that source and config may publish again.

    The served snapshot stays the same. The snapshots that were withdrawn stay so: nobody falls back to them.

    Raises:
        SnapshotNotFoundError: nothing was published.
        OperationError: nothing is current.
        PublishConflictError: somebody else moved the pointer at the same time; names who.
    """
    store = open_published(root, s3)
    view = read_pointer(store)
    found = view.pointer
    if found is None:
        raise OperationError(f"nothing is current under {store.url}, so nothing is held")
    if not found.holds:
        return ReleaseResult((), found.run_id, found.seq)
    # What was served before is the same as ever: it says what diff compares with.
    kept = _fields(found) | {"previous": found.previous, "moved_by": "release"} | _held(())
    moved = move(store, successor(view, **kept), view)
    return ReleaseResult(found.holds, moved.run_id, moved.seq)


def _present(store: Store, *, replace: bool) -> PointerView:
    """The pointer; when it may be replaced, one that cannot be understood says nothing."""
    try:
        view = read_pointer(store)
        if view.pointer is not None:
            manifest_key(view.pointer)
    except ManifestError as error:
        if not replace:
            raise
        try:
            return PointerView(None, store.find(CURRENT, limit=MAX_POINTER_BYTES))
        except IntegrityError:
            # Too large to be compared with what is there when it is replaced.
            raise error from None
    return view


def _fields(pointer: Pointer) -> dict[str, Any]:
    """What a pointer says, apart from when it was moved and after whom."""
    names = set(Pointer.model_fields) - {"updated_at", "seq", "write_id", "previous"}
    return {name: getattr(pointer, name) for name in names}


def _verified(
    store: Store, target: HistoryEntry, s3: S3Options | None, *, deep: bool, progress: Progress | None
) -> tuple[SnapshotState, Wholeness]:
    """The target, after every object of it was looked at."""
    where = f"run {target.run_id!r} is not made current"
    try:
        state = load_state(store, target.manifest_key)
        checked = check_whole(store, state, deep=deep)
    except ObjectMissingError as error:
        raise SnapshotDamagedError(f"{where}: {error}") from error
    if state.manifest.run_id != target.run_id:
        raise IntegrityError(
            f"{where}: {store.url_of(target.manifest_key)} is the manifest of run {state.manifest.run_id!r}"
        )
    faults = checked.faults
    if any(entry.key is not None and entry.objects is None for entry in state.shards):
        # Nothing says what its objects must be: then they are opened, and their rows counted.
        found = verify_snapshot(store.url, s3=s3, manifest_key=target.manifest_key, progress=progress)
        faults = tuple(found.faults)
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise SnapshotDamagedError(f"{where}: {'; '.join(faults[:_SHOWN])}{more}")
    return state, checked


def _pointer_to(
    store: Store, view: PointerView, past: ServedHistory, target: HistoryEntry, state: SnapshotState
) -> Pointer:
    extras, withdrawn = state.manifest.extras, past.withdrawn_by(target)
    keys = (extras.build_key, extras.gate_key) if extras else (None, None)
    return successor(
        view,
        manifest_ref=store.url_of(target.manifest_key),
        run_id=target.run_id,
        manifest_digest=state.manifest_digest,
        build_key=keys[0],
        gate_key=keys[1],
        **_held(_holds(store, view.pointer, past, withdrawn, keys)),
        served=past.served_after(target),
        withdrawn=withdrawn,
        moved_by="rollback",
    )


def _held(holds: tuple[Hold, ...]) -> dict[str, Any]:
    """The pointer's fields for what is held."""
    return {"hold": holds[-1].build_key if holds else None, "holds": holds}


def _holds(
    store: Store, found: Pointer | None, past: ServedHistory, withdrawn: tuple[str, ...], target: Keys
) -> tuple[Hold, ...]:
    """What is held after a rollback: what was held before, and every snapshot that this one takes out of service.

    Never what is the target's own: its source and config give nothing new anyway, and a hold would keep a damaged
    shard of it from being built anew. What differs from it in its gate alone is held under that gate.
    """
    if found is None:
        return ()
    ends = any(hold.covers(*target) for hold in found.holds)
    # Where a hold ends because the target is covered by it, others that it covers may have to be held by their gate.
    fresh = set(withdrawn) - (set() if ends else set(found.withdrawn)) - {found.run_id}
    keys = [keys_in(store, entry.manifest_key) for entry in past.entries if entry.run_id in fresh]
    if found.run_id in withdrawn:
        own = (found.build_key, found.gate_key)
        keys.append(own if found.build_key else keys_in(store, manifest_key(found)))
    fresh_holds = [
        Hold(build_key=build_key, gate_key=gate_key if build_key == target[0] else None)
        for build_key, gate_key in keys
        if build_key is not None
    ]
    holds = dict.fromkeys((*(hold for hold in found.holds if hold not in fresh_holds), *fresh_holds))
    return tuple(hold for hold in holds if not hold.covers(*target))[-MAX_REMEMBERED:]


def keys_in(store: Store, key: str) -> Keys:
    """Build key and gate key as a published manifest says them; nothing where it cannot be understood."""
    try:
        extras = decode_manifest(store.get(key), where=store.url_of(key)).extras
    except (IntegrityError, ObjectMissingError):
        return None, None
    return (extras.build_key, extras.gate_key) if extras else (None, None)


def _undo(store: Store, moved: Pointer, before: PointerView, target: HistoryEntry) -> None:
    """A cleanup removed the target while it was looked at: points back to what was served."""
    message = f"run {target.run_id!r} was removed by a cleanup at the same time"
    if before.pointer is None:
        raise SnapshotDamagedError(f"{message}; {store.url} has no current snapshot: roll back to another one")
    view = read_pointer(store)
    if view.pointer is not None and view.pointer.write_id == moved.write_id:
        kept = _fields(before.pointer) | {"previous": before.pointer.previous, "moved_by": "rollback"}
        move(store, successor(view, **kept), view)
    raise SnapshotDamagedError(f"{message}; run {before.pointer.run_id!r} stays current: roll back to another one")
