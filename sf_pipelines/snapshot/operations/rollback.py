"""Rollback to a snapshot that was published before, and the release of what a rollback holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sf_pipelines.snapshot.build import Progress
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import (
    IntegrityError,
    ManifestError,
    ObjectMissingError,
    OperationError,
    SnapshotDamagedError,
)
from sf_pipelines.snapshot.manifest.codec import decode_manifest
from sf_pipelines.snapshot.manifest.pointer import CURRENT, Pointer, manifest_key
from sf_pipelines.snapshot.manifest.publish import HistoryEntry, PointerView, history, move, read_pointer, successor
from sf_pipelines.snapshot.operations.trail import Trail
from sf_pipelines.snapshot.reader.state import SnapshotState, load_state
from sf_pipelines.snapshot.store import Store
from sf_pipelines.snapshot.verification import Wholeness, check_whole, verify_snapshot

# Faults that an error message names.
_SHOWN = 5


@dataclass(frozen=True)
class RollbackResult:
    """What a rollback did.

    Attributes:
        run_id: the snapshot that is served now.
        manifest_key: its manifest.
        previous_run_id: the snapshot that was served before; None where the pointer was gone.
        seq: the pointer's sequence number.
        hold: build key that is kept from being published again; None where nothing needs to be held.
        withdrawn: run ids that rollbacks have withdrawn.
        checked: what was looked at before the pointer was moved.
    """

    run_id: str
    manifest_key: str
    previous_run_id: str | None
    seq: int
    hold: str | None
    withdrawn: tuple[str, ...]
    checked: Wholeness


@dataclass(frozen=True)
class ReleaseResult:
    """What a release did.

    Attributes:
        released: build key that was held; None when nothing was.
        run_id: the snapshot that is served, as before.
        seq: the pointer's sequence number.
    """

    released: str | None
    run_id: str
    seq: int | None


def open_root(root: str | Path | Store, s3: S3Options | None) -> Store:
    """A store on a root; one that is open already is taken as it is."""
    return root if isinstance(root, Store) else Store.open(root, s3)


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
    must be there as it was sealed. Then the pointer is moved by compare-and-swap. It holds the build key of the
    snapshot that was withdrawn, so that the next build of the same source and config does not publish it again.

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
        RunNotFoundError: no such snapshot is published.
        OperationError: it is current already, or ``back`` is no number of snapshots.
        SnapshotDamagedError: objects of the target are gone or changed; names them.
        IntegrityError: its manifest or its routing cannot be understood or is not what was published.
        PublishConflictError: somebody else moved the pointer at the same time; names who.
        StoreError: the store did not do what was asked.
    """
    store = open_root(root, s3)
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
        hold=moved.hold,
        withdrawn=moved.withdrawn,
        checked=checked,
    )


def release(root: str | Path | Store, *, s3: S3Options | None = None) -> ReleaseResult:
    """Lifts the hold that a rollback has set: the next build of that source and config may publish again.

    The served snapshot stays the same. The snapshots that were withdrawn stay so: nobody falls back to them.

    Args:
        root: the snapshot's root.
        s3: credentials.

    Raises:
        OperationError: nothing is current.
        PublishConflictError: somebody else moved the pointer at the same time; names who.
    """
    store = open_root(root, s3)
    view = read_pointer(store)
    found = view.pointer
    if found is None:
        raise OperationError(f"nothing is current under {store.url}, so nothing is held")
    if found.hold is None:
        return ReleaseResult(None, found.run_id, found.seq)
    # What was served before is the same as ever: it says what diff compares with.
    kept = _fields(found) | {"previous": found.previous, "hold": None, "moved_by": "release"}
    moved = move(store, successor(view, **kept), view)
    return ReleaseResult(found.hold, moved.run_id, moved.seq)


def _present(store: Store, *, replace: bool) -> PointerView:
    """The pointer; when it may be replaced, one that cannot be understood says nothing."""
    try:
        view = read_pointer(store)
        if view.pointer is not None:
            manifest_key(view.pointer)
    except ManifestError:
        if not replace:
            raise
        return PointerView(None, store.find(CURRENT))
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
    build_key = extras.build_key if extras else None
    return successor(
        view,
        manifest_ref=store.url_of(target.manifest_key),
        run_id=target.run_id,
        manifest_digest=state.manifest_digest,
        build_key=build_key,
        gate_key=extras.gate_key if extras else None,
        hold=_hold(store, view.pointer, withdrawn, build_key),
        served=trail.served_after(target),
        withdrawn=withdrawn,
        moved_by="rollback",
    )


def _hold(store: Store, found: Pointer | None, withdrawn: tuple[str, ...], target_key: str | None) -> str | None:
    """Build key to hold after a rollback: that of the snapshot that is withdrawn now, else the one held before.

    Never that of the target: its own source and config give nothing new anyway, and a hold would keep a damaged shard
    of it from being built anew.
    """
    if found is None:
        return None
    key = found.hold
    if found.run_id in withdrawn:
        key = found.build_key or _build_key_in(store, found) or key
    return None if key == target_key else key


def _build_key_in(store: Store, pointer: Pointer) -> str | None:
    """The build key as the manifest says it, where the pointer was moved by somebody who does not."""
    key = manifest_key(pointer)
    try:
        extras = decode_manifest(store.get(key), where=store.url_of(key)).extras
    except (IntegrityError, ObjectMissingError):
        return None
    return extras.build_key if extras else None


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
