"""A snapshot as a reader holds it: decoded, checked, immutable."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sf_pipelines.snapshot.config import KeyEncoding
from sf_pipelines.snapshot.errors import (
    DigestMismatchError,
    IntegrityError,
    ManifestError,
    ObjectMissingError,
    SnapshotKindError,
    SnapshotNotFoundError,
)
from sf_pipelines.snapshot.index.protocol import VectorType
from sf_pipelines.snapshot.manifest.codec import decode_manifest
from sf_pipelines.snapshot.manifest.models import Manifest, ShardObject, VectorMeta
from sf_pipelines.snapshot.manifest.pointer import CURRENT, Pointer, manifest_key, parse_manifest_key
from sf_pipelines.snapshot.manifest.publish import history, read_pointer
from sf_pipelines.snapshot.metric import DistanceMetric, Float32
from sf_pipelines.snapshot.reader.types import ShardDetail, SnapshotInfo, UnifiedVectorMeta
from sf_pipelines.snapshot.routing import stored
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.cluster import ClusterRouting
from sf_pipelines.snapshot.routing.explicit import ExplicitRouting
from sf_pipelines.snapshot.routing.hash import HashRouting
from sf_pipelines.snapshot.routing.lsh import MOST_BITS, LshRouting
from sf_pipelines.snapshot.routing.protocol import Routing
from sf_pipelines.snapshot.store import Store

SnapshotKind = Literal["vector", "unified"]

# What another manifest may be better than: damage that stays. A store that cannot be reached is not.
_DAMAGE = (IntegrityError, ObjectMissingError)

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
    def default_probes(self) -> int:
        """Shards that a query asks by default: in a unified snapshot all."""
        return self.manifest.num_dbs if self.kind == "unified" else self.vector.num_probes

    @property
    def metric(self) -> DistanceMetric:
        """Declared distance."""
        return self.vector.metric

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        return self.vector.dim


def read_current(store: Store) -> Pointer:
    """The current pointer."""
    pointer = read_pointer(store).pointer
    if pointer is None:
        raise SnapshotNotFoundError(
            f"nothing has been published under {store.url}: it has no {CURRENT}; publish a snapshot or check the root"
        )
    return pointer


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


def find_snapshot(
    store: Store, pinned: str | None, fallback: int, kind: SnapshotKind | None
) -> tuple[SnapshotState, str | None]:
    """The pinned manifest's snapshot, else that of the pointer, else an older one where that is asked for."""
    if pinned is not None:
        return load_state(store, pinned), None
    pointer = read_current(store)
    try:
        return load_pointed(store, pointer), None
    except _DAMAGE as error:
        why = f"{pointer.manifest_ref} cannot be served: {type(error).__name__}: {error}"
        other: str | None = None
        for key in _older(store, pointer)[:fallback]:
            try:
                state = load_state(store, key)
            except (*_DAMAGE, SnapshotKindError):
                continue
            if kind in {None, state.kind}:
                return state, why
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


def load_state(
    store: Store, key: str, *, digest: str | None = None, published_at: datetime | None = None
) -> SnapshotState:
    """Reads a manifest and its routing artifacts."""
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
        return state_of(store, manifest, key, digest=found, published_at=published_at)
    except ManifestError as error:
        raise ManifestError(f"manifest {where}: {error}") from error


def state_of(
    store: Store, manifest: Manifest, key: str, *, digest: str, published_at: datetime | None = None
) -> SnapshotState:
    """The snapshot of a manifest in memory, which need not be stored; errors as of ``load_state``."""
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
        routing=_routing_of(store, manifest, vector),
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
    entries = [ShardEntry(db_id, None, 0, None, None) for db_id in range(manifest.num_dbs)]
    for row in manifest.shards:
        if row.db_url is not None:
            key = manifest.key_of(row.db_url, field=f"shards row db_id={row.db_id} db_url")
            entries[row.db_id] = ShardEntry(row.db_id, key, row.row_count, row.checkpoint_id, row.objects)
    return tuple(entries)


def _routing_of(store: Store, manifest: Manifest, vector: VectorMeta) -> Routing:
    """How the rows of a snapshot found their shard; faults as of ``load_state``."""
    num_dbs, strategy = manifest.num_dbs, vector.sharding_strategy
    if vector.unified:
        if manifest.sharding.strategy == "hash":
            return HashRouting(num_dbs)
        return stored.decode_cel("build_meta.sharding", manifest.sharding, num_dbs)
    if strategy == "cel":
        return stored.decode_cel("custom.vector", vector, num_dbs)
    if strategy == "cluster":
        centroids = _matrix(store, manifest, "centroids_ref", vector.centroids_ref, rows=num_dbs, max_rows=num_dbs)
        return ClusterRouting(centroids, vector.metric)
    if strategy == "lsh":
        bits = vector.num_hash_bits
        if bits is not None and bits > MOST_BITS:
            raise ManifestError(f"custom.vector.num_hash_bits is {bits}, must be at most {MOST_BITS}")
        planes = _matrix(store, manifest, "hyperplanes_ref", vector.hyperplanes_ref, rows=bits, max_rows=MOST_BITS)
        # Snapshots of others were tuned for the order in which their own readers probe.
        return LshRouting(planes, num_dbs, stock_order=manifest.extras is None)
    return ExplicitRouting(num_dbs)


def _matrix(
    store: Store, manifest: Manifest, name: str, ref: str | None, *, rows: int | None, max_rows: int
) -> Float32:
    """A stored matrix; faults as of ``load_state``."""
    field, dim, extras = f"custom.vector.{name}", manifest.vector.dim, manifest.extras
    if ref is None:
        raise ManifestError(f"{field} is missing")
    key = manifest.key_of(ref, field=field)
    data = store.get(key, limit=stored.MOST_HEADER + max_rows * dim * 8)
    recorded = extras.routing_sha256 if extras else None
    found = hashlib.sha256(data).hexdigest()
    field = f"{field} {store.url_of(key)}"
    if recorded not in {None, found}:
        raise DigestMismatchError(f"{field} has SHA-256 {found}, the manifest says {recorded}")
    return stored.decode_matrix(data, field=field, rows=rows, dim=dim, max_rows=max_rows)


# What readers say of it.


def snapshot_info(state: SnapshotState, store: Store) -> SnapshotInfo:
    """What readers say of a snapshot."""
    unified = state.kind == "unified"
    extras, sizes = state.manifest.extras, [shard.bytes for shard in state.shards]
    recall = extras.recall if extras else None
    judged = recall.judged if recall else None
    return SnapshotInfo(
        run_id=state.manifest.run_id,
        num_dbs=state.manifest.num_dbs,
        dim=state.dim,
        metric=state.metric,
        sharding=state.routing.strategy,
        kind=state.kind,
        backend=state.backend,
        key_encoding=state.key_encoding if unified else None,
        cel_columns=dict(state.routing.cel_columns) if isinstance(state.routing, CelRouting) else {},
        num_probes=state.default_probes,
        recall=judged.recall if judged else None,
        recall_lower=judged.lower if judged else None,
        recall_k=recall.k if recall and judged else None,
        index_type=state.vector.index_type,
        quantization=state.vector.quantization,
        id_type=extras.id_type if extras else None,
        payload_columns=None if extras is None or extras.payload_columns is None else [*extras.payload_columns],
        filter_columns=dict(extras.filter_columns) if extras else {},
        manifest_ref=store.url_of(state.manifest_key),
        total_vectors=state.manifest.row_count,
        total_bytes=None if any(size is None for size in sizes) else sum(size or 0 for size in sizes),
        created_at=state.manifest.created_at,
        published_at=state.published_at,
    )


def shard_details(state: SnapshotState, store: Store) -> list[ShardDetail]:
    """Every shard, empty ones included."""
    return [
        ShardDetail(
            db_id=shard.db_id,
            db_url=None if shard.key is None else store.url_of(shard.key),
            vector_count=shard.rows,
            bytes=shard.bytes,
            checkpoint_id=shard.checkpoint_id,
        )
        for shard in state.shards
    ]


def vector_meta(state: SnapshotState) -> UnifiedVectorMeta:
    """How the vectors of a unified snapshot are indexed."""
    vector = state.vector
    return UnifiedVectorMeta(
        dim=vector.dim,
        metric=vector.metric,
        index_type=vector.index_type,
        quantization=vector.quantization,
        index_params=dict(vector.index_params),
        backend=state.backend,
        kv_backend=vector.kv_backend,
    )
