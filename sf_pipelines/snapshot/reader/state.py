"""A snapshot as a reader holds it: decoded, checked, immutable."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sf_pipelines.snapshot.config import KeyEncoding
from sf_pipelines.snapshot.errors import (
    DigestMismatchError,
    ManifestError,
    SnapshotKindError,
    SnapshotNotFoundError,
)
from sf_pipelines.snapshot.index.protocol import VectorType
from sf_pipelines.snapshot.manifest.codec import decode_manifest
from sf_pipelines.snapshot.manifest.models import Manifest, ShardObject, VectorMeta
from sf_pipelines.snapshot.manifest.pointer import CURRENT, Pointer, find_pointer, manifest_key
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.reader.stored_routing import load_routing
from sf_pipelines.snapshot.routing.protocol import Routing
from sf_pipelines.snapshot.store import Store

SnapshotKind = Literal["vector", "unified"]

# What readers of the format take where the manifest says nothing.
_UNIFIED_BACKEND = "lancedb"
_KV_BACKEND = "slatedb"


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a snapshot.

    Attributes:
        db_id: its number.
        key: key of its directory under the root; None for an empty shard.
        rows: its rows.
        checkpoint_id: opaque id of its bytes.
        objects: its sealed objects; None where the writer recorded none.
    """

    db_id: int
    key: str | None
    rows: int
    checkpoint_id: str | None
    objects: tuple[ShardObject, ...] | None

    @property
    def bytes(self) -> int | None:
        """Size of its objects; None where the writer recorded none."""
        if self.key is None:
            return 0
        return None if self.objects is None else sum(item.size for item in self.objects)


@dataclass(frozen=True)
class SnapshotState:
    """Everything that a search needs to know of a snapshot.

    Attributes:
        manifest: as decoded.
        manifest_key: its key under the root.
        manifest_digest: SHA-256 (hex) of its bytes.
        published_at: when the pointer was moved to it; None when it was not read through the pointer.
        kind: ``vector``, or ``unified`` where the shards hold keys and values too.
        vector: the manifest's vector fields.
        backend: index library of the shards; None where the manifest does not say: the shards' files tell.
        vector_type: how vectors are stored; queries are routed as rounded to it.
        key_encoding: how keys are stored (unified).
        routing: which shards to ask.
        shards: every shard, empty ones included; position is the shard's number.
    """

    manifest: Manifest
    manifest_key: str
    manifest_digest: str
    published_at: datetime | None
    kind: SnapshotKind
    vector: VectorMeta
    backend: str | None
    vector_type: VectorType
    key_encoding: KeyEncoding
    routing: Routing
    shards: tuple[ShardEntry, ...]

    @property
    def is_ours(self) -> bool:
        """Whether this package wrote it."""
        return self.manifest.extras is not None

    @property
    def metric(self) -> DistanceMetric:
        """Declared distance."""
        return self.vector.metric

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        return self.vector.dim


def read_current(store: Store) -> Pointer:
    """The current pointer.

    Raises:
        SnapshotNotFoundError: there is none.
        ManifestError: it cannot be understood.
    """
    found = find_pointer(store)
    if found is None:
        raise SnapshotNotFoundError(
            f"nothing has been published under {store.url}: it has no {CURRENT}; publish a snapshot or check the root"
        )
    return found[0]


def load_current(store: Store) -> SnapshotState:
    """The snapshot that the current pointer names; errors as of ``read_current`` and ``load_state``."""
    return load_pointed(store, read_current(store))


def load_pointed(store: Store, pointer: Pointer) -> SnapshotState:
    """The snapshot that a pointer names; errors as of ``load_state``."""
    return load_state(
        store,
        manifest_key(pointer),
        digest=pointer.manifest_digest,
        published_at=pointer.updated_at,
    )


def load_state(
    store: Store, key: str, *, digest: str | None = None, published_at: datetime | None = None
) -> SnapshotState:
    """Reads a manifest and its routing artifacts.

    Args:
        store: opened on the root.
        key: of the manifest.
        digest: SHA-256 (hex) that its bytes must have, where the pointer says so.
        published_at: when the pointer was moved to it.

    Raises:
        ObjectMissingError: the manifest or a routing artifact is gone.
        DigestMismatchError: they are not the bytes that were sealed.
        ManifestError: they cannot be understood or contradict each other; names the field.
        SnapshotKindError: it has no vectors, or keeps its keys where they cannot be read.
    """
    data = store.get(key)
    where = store.url_of(key)
    found = hashlib.sha256(data).hexdigest()
    if digest is not None and found != digest:
        raise DigestMismatchError(f"manifest {where} has SHA-256 {found}, the pointer says {digest}")
    manifest = decode_manifest(data, where=where)
    if "vector" not in manifest.custom:
        raise SnapshotKindError(
            f"manifest {where} has no custom.vector: it is of a key-value snapshot, which has nothing to search; "
            "write it with vectors, or read it with the library that wrote it"
        )
    try:
        return _state(store, manifest, key, found, published_at)
    except ManifestError as error:
        raise ManifestError(f"manifest {where}: {error}") from error


def _state(store: Store, manifest: Manifest, key: str, digest: str, published_at: datetime | None) -> SnapshotState:
    vector, extras = manifest.vector, manifest.extras
    backend = extras.backend if extras else None
    if vector.unified:
        backend = vector.backend or _UNIFIED_BACKEND
        _check_keys_can_be_read(vector, backend, store.url_of(key))
    return SnapshotState(
        manifest=manifest,
        manifest_key=key,
        manifest_digest=digest,
        published_at=published_at,
        kind="unified" if vector.unified else "vector",
        vector=vector,
        backend=backend,
        vector_type=extras.vector_type if extras else "float32",
        key_encoding=manifest.key_encoding,
        routing=load_routing(store, manifest, vector),
        shards=_shard_table(manifest),
    )


def _check_keys_can_be_read(vector: VectorMeta, backend: str, where: str) -> None:
    kv_backend = vector.kv_backend or _KV_BACKEND
    # Beside LanceDB, readers of the format take everything but plain SQLite for SlateDB.
    readable = {"sqlite"} if backend == "lancedb" else {"sqlite", "sqlite-vec"}
    if kv_backend not in readable:
        said = "absent, which means 'slatedb'" if vector.kv_backend is None else repr(vector.kv_backend)
        raise SnapshotKindError(
            f"manifest {where}: custom.vector.kv_backend is {said} (backend {backend!r}): keys and values are read "
            f"from SQLite only; write the snapshot with kv_backend {' or '.join(map(repr, sorted(readable)))}"
        )


def _shard_table(manifest: Manifest) -> tuple[ShardEntry, ...]:
    listed = {row.db_id: row for row in manifest.shards}
    entries: list[ShardEntry] = []
    for db_id in range(manifest.num_dbs):
        row = listed.get(db_id)
        if row is None or row.db_url is None:
            entries.append(ShardEntry(db_id, None, 0, None, None))
            continue
        key = manifest.key_of(row.db_url, field=f"shards row db_id={db_id} db_url")
        entries.append(ShardEntry(db_id, key, row.row_count, row.checkpoint_id, row.objects))
    return tuple(entries)
