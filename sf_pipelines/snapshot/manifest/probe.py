"""Does this store honour conditions on writes? Asked of the store itself before anything is first published there.

Some providers of the S3 protocol answer a conditional write with success and do not look at the condition. Two
publishers would then both win, and one snapshot would silently replace the other.
"""

import uuid
from contextlib import suppress

from sf_pipelines.snapshot.errors import ConditionalWritesError, StoreError, WriteUncertainError
from sf_pipelines.snapshot.manifest.pointer import Pointer
from sf_pipelines.snapshot.store import Store

_FOLDER = "staging/probe"


def is_proven(store: Store, pointer: Pointer | None) -> bool:
    """Whether the store is known to honour conditions: a pointer was moved there by a writer that compares and swaps.

    A snapshot that was copied from elsewhere, or that another tool published, proves nothing. On local disk there is
    nobody to ask: the comparing is done here, under a lock.
    """
    if store.local_root is not None:
        return True
    return pointer is not None and pointer.seq is not None and pointer.manifest_ref.startswith(f"{store.url}/")


def require_conditional_writes(store: Store) -> None:
    """Writes an object under ``staging/probe`` in all the ways that a publisher relies on, and removes it.

    Raises:
        ConditionalWritesError: a condition was ignored, or is not implemented.
        StoreError: the store cannot be written.
    """
    key = f"{_FOLDER}/{uuid.uuid4().hex}"
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
