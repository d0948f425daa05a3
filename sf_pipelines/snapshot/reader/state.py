"""A snapshot as a reader holds it: decoded, checked, immutable."""

import hashlib
import io
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from sf_pipelines.snapshot.errors import (
    DigestMismatchError,
    ManifestError,
    SnapshotKindError,
    SnapshotNotFoundError,
)
from sf_pipelines.snapshot.manifest.codec import decode_manifest
from sf_pipelines.snapshot.manifest.models import Manifest, ShardObject, VectorMeta
from sf_pipelines.snapshot.manifest.pointer import CURRENT, Pointer, manifest_key
from sf_pipelines.snapshot.metric import DistanceMetric, Float32
from sf_pipelines.snapshot.routing.cluster import ClusterRouting
from sf_pipelines.snapshot.routing.protocol import Routing
from sf_pipelines.snapshot.store import Store

_BACKEND = "lancedb"
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


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


@dataclass(frozen=True)
class SnapshotState:
    """Everything that a search needs to know of a snapshot.

    Attributes:
        manifest: as decoded.
        manifest_key: its key under the root.
        manifest_digest: SHA-256 (hex) of its bytes.
        published_at: when the pointer was moved to it; None when it was not read through the pointer.
        vector: the manifest's vector fields.
        backend: index library of the shards.
        routing: which shards to ask.
        shards: every shard, empty ones included; position is the shard's number.
    """

    manifest: Manifest
    manifest_key: str
    manifest_digest: str
    published_at: datetime | None
    vector: VectorMeta
    backend: str
    routing: Routing
    shards: tuple[ShardEntry, ...]

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
    found = store.find(CURRENT)
    if found is None:
        raise SnapshotNotFoundError(
            f"nothing has been published under {store.url}: it has no {CURRENT}; publish a snapshot or check the root"
        )
    return Pointer.decode(found.data, store.url_of(CURRENT))


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
        SnapshotKindError: it is not a vector-only snapshot of a strategy that is known here.
    """
    data = store.get(key)
    where = store.url_of(key)
    found = hashlib.sha256(data).hexdigest()
    if digest is not None and found != digest:
        raise DigestMismatchError(f"manifest {where} has SHA-256 {found}, the pointer says {digest}")
    manifest = decode_manifest(data, where=where)
    if "vector" not in manifest.custom:
        raise SnapshotKindError(f"manifest {where} has no custom.vector: it is a key-value snapshot")
    vector = manifest.vector
    if vector.unified:
        raise SnapshotKindError(f"manifest {where} is of a unified snapshot; this reader serves vector-only ones")
    return SnapshotState(
        manifest=manifest,
        manifest_key=key,
        manifest_digest=found,
        published_at=published_at,
        vector=vector,
        backend=vector.backend or _BACKEND,
        routing=_routing(store, manifest, vector, where),
        shards=_shard_table(manifest),
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


def _routing(store: Store, manifest: Manifest, vector: VectorMeta, where: str) -> Routing:
    strategy = vector.sharding_strategy
    if strategy != "cluster":
        raise SnapshotKindError(f"manifest {where}: snapshots sharded by {strategy!r} are not served by this version")
    if vector.centroids_ref is None:
        raise ManifestError(f"manifest {where}: custom.vector.centroids_ref is missing")
    key = manifest.key_of(vector.centroids_ref, field="custom.vector.centroids_ref")
    data = store.get(key)
    extras = manifest.extras
    sealed = extras.routing_sha256 if extras else None
    found = hashlib.sha256(data).hexdigest()
    if sealed is not None and sealed != found:
        raise DigestMismatchError(f"{store.url_of(key)} has SHA-256 {found}, the manifest says {sealed}")
    shape = (manifest.num_dbs, vector.dim)
    return ClusterRouting(_matrix(data, shape, f"custom.vector.centroids_ref {store.url_of(key)}"), vector.metric)


def _matrix(data: bytes, shape: tuple[int, int], field: str) -> Float32:
    """Rows of an ``.npy`` file. Its header is believed only after it was compared with what must be there."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        found, column_major, dtype = _HEADER_READERS[version](file)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError) as error:
        raise ManifestError(f"{field} is no .npy file that can be used: {error}") from error
    if found != shape:
        raise ManifestError(f"{field} has shape {found}, must be {shape}: one row per shard, dim numbers each")
    if dtype.name not in {"float16", "float32", "float64"}:
        raise ManifestError(f"{field} holds {dtype}, must hold floating-point numbers")
    if len(data) - file.tell() != shape[0] * shape[1] * dtype.itemsize:
        raise ManifestError(f"{field} is {len(data)} bytes long, which is not what its header says")
    flat = np.frombuffer(data, dtype=dtype, offset=file.tell())
    with np.errstate(over="ignore"):
        rows = flat.reshape(shape, order="F" if column_major else "C").astype(np.float32)
    if not np.isfinite(rows).all():
        raise ManifestError(f"{field} holds NaN or infinity")
    return rows
