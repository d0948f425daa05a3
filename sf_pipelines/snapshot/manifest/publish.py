"""Publishing: the manifest's bytes get their public name, then the pointer is moved by compare-and-swap.

Exactly one of several publishers that start from the same pointer wins. An answer that got lost does not change
that: every pointer carries a write id, and the id of the one it replaced, so that a publisher can tell afterwards
whether its own write was applied.
"""

import hashlib
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sf_pipelines.snapshot.errors import (
    ConditionalWritesError,
    IntegrityError,
    ManifestError,
    PublishConflictError,
    StoreError,
    WriteUncertainError,
)
from sf_pipelines.snapshot.manifest.codec import decode_manifest, timestamp
from sf_pipelines.snapshot.manifest.models import MANIFEST_CONTENT_TYPE
from sf_pipelines.snapshot.manifest.pointer import (
    CURRENT,
    MANIFESTS,
    MAX_POINTER_BYTES,
    MAX_REMEMBERED,
    POINTER_CONTENT_TYPE,
    Pointer,
    PreviousPointer,
    manifest_key,
    manifest_name,
    parse_manifest_key,
)
from sf_pipelines.snapshot.store import Store, Versioned

_PROBES = "staging/probe"


@dataclass(frozen=True)
class PointerView:
    """The pointer as it was found, and its bytes and version; both None when nothing was ever published."""

    pointer: Pointer | None
    version: Versioned | None

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 (hex) of the pointer's bytes."""
        return None if self.version is None else hashlib.sha256(self.version.data).hexdigest()

    @property
    def seq(self) -> int | None:
        """Number of the last move; None when unknown."""
        return None if self.pointer is None else self.pointer.seq

    def before(self, run_id: str) -> str | None:
        """The run that was served before this one, also where this one is served already; None when unknown."""
        found = self.pointer
        if found is not None and found.run_id == run_id:
            # A publisher that died between its move and its receipt finds itself.
            return found.previous.run_id if found.previous else None
        return None if found is None else found.run_id


@dataclass(frozen=True)
class HistoryEntry:
    """One published manifest; its time is that in its name, UTC."""

    run_id: str
    published_at: datetime
    manifest_key: str
    is_current: bool


def read_pointer(store: Store) -> PointerView:
    """The pointer as it is now; a ``ManifestError`` where it cannot be understood."""
    try:
        found = store.find(CURRENT, limit=MAX_POINTER_BYTES)
    except IntegrityError as error:
        raise ManifestError(f"pointer {error}; remove it, then roll back to what is to be served") from error
    return PointerView(None if found is None else Pointer.decode(found.data, store.url_of(CURRENT)), found)


def publish(
    store: Store,
    *,
    manifest: bytes,
    run_id: str,
    created_at: datetime,
    build_key: str | None,
    gate_key: str | None,
    base_fingerprint: str | None,
) -> tuple[Pointer, PointerView]:
    """Publishes a manifest that has passed its gate. Doing it again after a crash is safe."""
    named = decode_manifest(manifest, where=f"to be published for run {run_id}").run_id
    if named != run_id:
        raise ManifestError(f"the manifest to be published for run {run_id!r} is that of run {named!r}")
    key = manifest_name(run_id, created_at)
    digest = hashlib.sha256(manifest).hexdigest()
    base = read_pointer(store)
    if base.pointer is not None and base.pointer.manifest_digest == digest:
        return base.pointer, base
    if base.fingerprint != base_fingerprint:
        raise _conflict(store, run_id, base)
    if not is_proven(store, base.pointer):
        require_conditional_writes(store)
    ours = successor(
        base,
        manifest_ref=store.url_of(key),
        run_id=run_id,
        manifest_digest=digest,
        build_key=build_key,
        gate_key=gate_key,
        **_remembered(base, run_id),
        moved_by="build",
    )
    fresh = _copy_manifest(store, key, manifest)
    applied = store.swap(CURRENT, ours.encode(), base.version, content_type=POINTER_CONTENT_TYPE)
    return _confirm(store, ours, base, key=key, fresh=fresh, applied=applied), base


def move(store: Store, ours: Pointer, base: PointerView) -> Pointer:
    """Moves the pointer to ``ours``, a ``successor`` of ``base``, by compare-and-swap; of several at once one wins."""
    if not is_proven(store, base.pointer):
        require_conditional_writes(store)
    applied = store.swap(CURRENT, ours.encode(), base.version, content_type=POINTER_CONTENT_TYPE)
    now = read_pointer(store)
    if _is_ours(now.pointer, ours, applied=applied):
        return ours
    where, theirs = store.url_of(CURRENT), now.pointer
    message = (
        f"{where} was moved by somebody else at the same time; run {ours.run_id!r} was not made current by this call"
    )
    if theirs is None:
        raise PublishConflictError(f"{message}: the pointer is gone", ours=ours.run_id, theirs=None)
    by = f" by a {theirs.moved_by}" if theirs.moved_by else ""
    raise PublishConflictError(
        f"{message}: it names run {theirs.run_id!r} (seq {theirs.seq}) since {timestamp(theirs.updated_at)}{by}; look "
        "at the history and decide again",
        ours=ours.run_id,
        theirs=theirs.run_id,
    )


def history(store: Store, limit: int | None = 10) -> list[HistoryEntry]:
    """Published manifests, newest first, at most so many."""
    try:
        pointer = read_pointer(store).pointer
        current = None if pointer is None else manifest_key(pointer)
    except ManifestError:
        # A pointer that cannot be understood is when the history is needed most; then no entry is current.
        current = None
    entries: list[HistoryEntry] = []
    for info in store.objects(MANIFESTS):
        name = parse_manifest_key(info.key)
        if name is not None:
            entries.append(HistoryEntry(name.run_id, name.moment, info.key, info.key == current))
    entries.sort(key=lambda entry: entry.manifest_key, reverse=True)
    return entries[:limit]


def successor(base: PointerView, **fields: Any) -> Pointer:
    """The pointer that comes after ``base``: the next number, a fresh write id, and what was served before."""
    made = {
        "updated_at": datetime.now(UTC),
        "seq": (base.seq or 0) + 1,
        "write_id": uuid.uuid4().hex,
        "previous": _previous(base),
    }
    return Pointer(**made | fields)


def _remembered(base: PointerView, run_id: str) -> dict[str, tuple[str, ...]]:
    """What a publish carries over: who was served, and who was withdrawn."""
    found = base.pointer
    if found is None:
        return {"served": (run_id,)}
    # A pointer moved by somebody who keeps no such list names at least its own run.
    served = found.served if found.served[-1:] == (found.run_id,) else (found.run_id,)
    return {
        "served": (*(other for other in served if other != run_id), run_id)[-MAX_REMEMBERED:],
        "withdrawn": tuple(other for other in found.withdrawn if other != run_id)[-MAX_REMEMBERED:],
    }


def _previous(base: PointerView) -> PreviousPointer | None:
    found = base.pointer
    if found is None:
        return None
    return PreviousPointer(run_id=found.run_id, manifest_ref=found.manifest_ref, write_id=found.write_id)


def _copy_manifest(store: Store, key: str, manifest: bytes) -> bool:
    """Gives the manifest its public name; False when it had it already."""
    found = store.find(key)
    if found is None and store.create(key, manifest, content_type=MANIFEST_CONTENT_TYPE):
        return True
    if (found.data if found is not None else store.get(key)) != manifest:
        raise IntegrityError(f"{store.url_of(key)} holds a manifest other than the one to be published there")
    return False


def _confirm(store: Store, ours: Pointer, base: PointerView, *, key: str, fresh: bool, applied: bool) -> Pointer:
    """Decides by what the pointer says now whether the swap was ours."""
    now = read_pointer(store)
    theirs = now.pointer
    if _is_ours(theirs, ours, applied=applied):
        return ours
    if theirs is not None and theirs.manifest_digest == ours.manifest_digest:
        # Another process published this very manifest.
        return theirs
    if fresh and not applied and _took_our_place(theirs, base):
        store.delete(key)
    raise _conflict(store, ours.run_id, now)


def _is_ours(theirs: Pointer | None, ours: Pointer, *, applied: bool) -> bool:
    """Whether the pointer found now, or one that it was built on, is the one that we wrote."""
    if theirs is None:
        return False
    if theirs.write_id == ours.write_id:
        return True
    # Ours was applied, its answer lost, and somebody has built on it since.
    built_on = theirs.previous is not None and theirs.previous.write_id == ours.write_id
    return built_on or (applied and (theirs.seq or 0) > (ours.seq or 0))


def _took_our_place(theirs: Pointer | None, base: PointerView) -> bool:
    """Whether the pointer found now directly replaced our base, so that our manifest was never published.

    Otherwise another process may have published the same manifest in between, and its name must stay.
    """
    return theirs is not None and theirs.seq == (base.seq or 0) + 1 and theirs.previous == _previous(base)


def _conflict(store: Store, ours: str, found: PointerView) -> PublishConflictError:
    where = store.url_of(CURRENT)
    if found.pointer is None:
        message = f"{where} is gone since run {ours!r} was scanned; it is not current, scan again"
        return PublishConflictError(message, ours=ours, theirs=None)
    theirs = found.pointer.run_id
    message = (
        f"{where} names run {theirs!r} (seq {found.seq}), which is not the pointer that run {ours!r} went out from; "
        f"run {ours!r} is not current, scan again"
    )
    return PublishConflictError(message, ours=ours, theirs=theirs)


# Does the store honour conditions on writes? Some providers of the S3 protocol answer a conditional write with success
# and do not look at the condition: of two publishers both would win, and one snapshot would replace the other.


def is_proven(store: Store, pointer: Pointer | None) -> bool:
    """Whether the store is known to honour conditions: a pointer was moved there by a writer that compares and swaps.

    A snapshot that was copied from elsewhere, or that another tool published, proves nothing. On local disk there is
    nobody to ask: the comparing is done here, under a lock.
    """
    if store.local_root is not None:
        return True
    return pointer is not None and pointer.seq is not None and pointer.manifest_ref.startswith(f"{store.url}/")


def require_conditional_writes(store: Store) -> None:
    """Writes an object under ``staging/probe`` in all the ways that a publisher relies on, and removes it."""
    key = f"{_PROBES}/{uuid.uuid4().hex}"
    bodies = [f"{key} {number}".encode() for number in range(4)]
    try:
        store.create(key, bodies[0])
        if store.create(key, bodies[1]):
            raise _ignored(store, "If-None-Match", "an object that must not be there was replaced")
        first = store.get_versioned(key)
        if not store.swap(key, bodies[2], first) or store.swap(key, bodies[3], first):
            raise _ignored(store, "If-Match", "a write that expected another version was not told so")
    except WriteUncertainError as error:
        if "NotImplemented" in str(error):
            raise _ignored(store, "If-None-Match and If-Match", "it answers NotImplemented") from error
        raise
    finally:
        # Whoever may only write, or whose store fails just now, leaves a few bytes, which a cleanup finds; that is no
        # reason to publish nothing, and must not hide what went wrong before.
        with suppress(StoreError):
            store.delete(key)


def _ignored(store: Store, header: str, what: str) -> ConditionalWritesError:
    return ConditionalWritesError(
        f"{store.url} does not honour conditional writes ({header}): {what}. Two builds at once could overwrite each "
        "other's snapshot, so nothing is published there; use a provider (or a version of it) that implements "
        "If-None-Match and If-Match on PUT, as Amazon S3 does, or a local folder"
    )
