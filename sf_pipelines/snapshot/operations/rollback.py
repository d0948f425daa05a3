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
from sf_pipelines.snapshot.operations.trail import Trail
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
class RollbackResult:
    """What a rollback did.

    Attributes:
        run_id: the snapshot that is served now.
        manifest_key: its manifest.
        previous_run_id: the snapshot that was served before; None where the pointer was gone.
        seq: the pointer's sequence number.
        holds: builds that are kept from being published again, the last one last.
        withdrawn: run ids that rollbacks have withdrawn.
        checked: what was looked at before the pointer was moved.
    """

    run_id: str
    manifest_key: str
    previous_run_id: str | None
    seq: int
    holds: tuple[Hold, ...]
    withdrawn: tuple[str, ...]
    checked: Wholeness


@dataclass(frozen=True)
class ReleaseResult:
    """What a release did.

    Attributes:
        released: builds that were held.
        run_id: the snapshot that is served, as before.
        seq: the pointer's sequence number.
    """

    released: tuple[Hold, ...]
    run_id: str
    seq: int | None


def open_published(root: str | Path | Store, s3: S3Options | None) -> Store:
    """A store on a root that something was published under; one that is open already is taken as it is.

    Raises:
        SnapshotNotFoundError: nothing was; a pointer that is gone from a history says nothing of that.
    """
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
        SnapshotNotFoundError: nothing was published.
        RunNotFoundError: no such snapshot is published.
        OperationError: it is current already, or ``back`` is no number of snapshots.
        SnapshotDamagedError: objects of the target are gone or changed; names them.
        IntegrityError: its manifest or its routing cannot be understood or is not what was published.
        PublishConflictError: somebody else moved the pointer at the same time; names who.
        ConditionalWritesError: the store ignores conditions on writes, so that two operators could both win.
        StoreError: the store did not do what was asked.
    """
    store = open_published(root, s3)
    view = _present(store, replace=to is not None)
    trail = Trail.of(view.pointer, history(store, limit=None))
    target = trail.back(back, store) if to is None else trail.find(to, store)
    if view.pointer is not None and manifest_key(view.pointer) == target.manifest_key:
        raise OperationError(f"run {target.run_id!r} is current already under {store.url}")
    state, checked = _verified(store, target, s3, deep=deep, progress=progress)
    ours = _pointer_to(store, view, trail, target, state)
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

    Args:
        root: the snapshot's root.
        s3: credentials.

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


def _pointer_to(store: Store, view: PointerView, trail: Trail, target: HistoryEntry, state: SnapshotState) -> Pointer:
    extras, withdrawn = state.manifest.extras, trail.withdrawn_by(target)
    keys = (extras.build_key, extras.gate_key) if extras else (None, None)
    return successor(
        view,
        manifest_ref=store.url_of(target.manifest_key),
        run_id=target.run_id,
        manifest_digest=state.manifest_digest,
        build_key=keys[0],
        gate_key=keys[1],
        **_held(_holds(store, view.pointer, trail, withdrawn, keys)),
        served=trail.served_after(target),
        withdrawn=withdrawn,
        moved_by="rollback",
    )


def _held(holds: tuple[Hold, ...]) -> dict[str, Any]:
    """The pointer's fields for what is held."""
    return {"hold": holds[-1].build_key if holds else None, "holds": holds}


def _holds(
    store: Store, found: Pointer | None, trail: Trail, withdrawn: tuple[str, ...], target: Keys
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
    keys = [keys_in(store, entry) for entry in trail.entries if entry.run_id in fresh]
    if found.run_id in withdrawn:
        own = (found.build_key, found.gate_key)
        keys.append(own if found.build_key else _keys_at(store, manifest_key(found)))
    fresh_holds = [
        Hold(build_key=build_key, gate_key=gate_key if build_key == target[0] else None)
        for build_key, gate_key in keys
        if build_key is not None
    ]
    holds = dict.fromkeys((*(hold for hold in found.holds if hold not in fresh_holds), *fresh_holds))
    return tuple(hold for hold in holds if not hold.covers(*target))[-MAX_REMEMBERED:]


def keys_in(store: Store, entry: HistoryEntry) -> Keys:
    """Build key and gate key as a published manifest says them; nothing where it cannot be understood."""
    return _keys_at(store, entry.manifest_key)


def _keys_at(store: Store, key: str) -> Keys:
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
