"""The snapshot that a reader opens with."""

from dataclasses import dataclass

from sf_pipelines.snapshot.errors import IntegrityError, ObjectMissingError, SnapshotKindError
from sf_pipelines.snapshot.manifest.pointer import Pointer, manifest_key, parse_manifest_key
from sf_pipelines.snapshot.manifest.publish import history
from sf_pipelines.snapshot.reader.state import SnapshotKind, SnapshotState, load_pointed, load_state, read_current
from sf_pipelines.snapshot.store import Store

# What another manifest may be better than: damage that stays. A store that cannot be reached is not.
_DAMAGE = (IntegrityError, ObjectMissingError)


@dataclass(frozen=True)
class Found:
    """A snapshot to serve.

    Attributes:
        state: the snapshot.
        instead_of: what the pointer names and why that is not served; None where it is.
    """

    state: SnapshotState
    instead_of: str | None = None


def find_snapshot(store: Store, pinned: str | None, fallback: int, kind: SnapshotKind) -> Found:
    """The pinned manifest's snapshot, else that of the pointer, else an older one where that is asked for.

    Args:
        store: opened on the root.
        pinned: key of a manifest.
        fallback: older manifests to try.
        kind: of those; others are left out.

    Raises:
        SnapshotNotFoundError: nothing is published.
        IntegrityError: the manifest, or all that were tried, are damaged; the error is that of the pointed one.
        ObjectMissingError: they are gone.
        SnapshotKindError: a manifest has nothing to search; or of those that were tried only some of the other kind can
            be read.
    """
    if pinned is not None:
        return Found(load_state(store, pinned))
    pointer = read_current(store)
    try:
        return Found(load_pointed(store, pointer))
    except _DAMAGE as error:
        why = f"{pointer.manifest_ref} cannot be served: {type(error).__name__}: {error}"
        other: str | None = None
        for key in _older(store, pointer)[:fallback]:
            try:
                state = load_state(store, key)
            except (*_DAMAGE, SnapshotKindError):
                continue
            if state.kind == kind:
                return Found(state, why)
            other = other or store.url_of(key)
        if other is not None:
            raise SnapshotKindError(f"{why}; and {other}, which can be, is of another kind of snapshot") from error
        raise


def _older(store: Store, pointer: Pointer) -> list[str]:
    """Manifests published before the pointed one and never withdrawn, newest first.

    Newer ones are there when the pointer was rolled back: they are what it was rolled back from.
    """
    pointed = parse_manifest_key(manifest_key(pointer))
    if pointed is None:
        # A name that says no time: nothing is known to be older.
        return []
    return [
        entry.manifest_key
        for entry in history(store, None)
        if entry.published_at < pointed.moment and entry.run_id not in pointer.withdrawn
    ]
