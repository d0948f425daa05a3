"""Tiny snapshots put together by hand: index, routing, manifest, pointer."""

import hashlib
import io
import json
import tempfile
import uuid
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.config import IndexParams, KeyEncoding
from sf_pipelines.snapshot.index import backend_named
from sf_pipelines.snapshot.index.key_value import encode_keys, key_array, write_key_values
from sf_pipelines.snapshot.index.protocol import IndexFamily, VectorType
from sf_pipelines.snapshot.manifest.codec import encode_manifest
from sf_pipelines.snapshot.manifest.models import (
    Manifest,
    ShardingRecord,
    ShardObject,
    ShardRow,
    SnapshotExtras,
    VectorMeta,
)
from sf_pipelines.snapshot.manifest.pointer import CURRENT, Pointer, manifest_name
from sf_pipelines.snapshot.metric import DistanceMetric, Float32
from sf_pipelines.snapshot.routing.cluster import ClusterRouting
from sf_pipelines.snapshot.routing.hash import HashRouting
from sf_pipelines.snapshot.routing.protocol import Routing, VectorRouting
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.tables import exact_distances

# How the format calls the keys' library beside each index library.
_KV_BACKENDS = {"lancedb": "sqlite", "sqlite-vec": "sqlite-vec"}


def clustered(rows: int, dim: int = 8, *, centres: int = 4, seed: int = 0) -> Float32:
    """Vectors around a few centres."""
    rng = np.random.default_rng(seed)
    middle = rng.standard_normal((centres, dim)) * 3
    return (middle[rng.integers(0, centres, rows)] + rng.standard_normal((rows, dim))).astype(np.float32)


def brute_force(
    queries: Float32, rows: Float32, metric: DistanceMetric, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Positions and float64 scores of the k nearest rows, equal ones by position."""
    distances = exact_distances(queries, rows, metric)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distances, order, axis=1) + metric.score_of_zero


def table_of(ids: Any, vectors: Float32, payloads: list[Any] | None = None) -> pa.Table:
    """Rows as an index backend takes them; a payload is JSON of what is given, ``{"n": id}`` by default."""
    values = [{"n": row_id} for row_id in ids] if payloads is None else payloads
    texts = [None if value is None else json.dumps(value) for value in values]
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
    return pa.table(
        {
            "id": pa.array(ids),
            "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            "payload": pa.array(texts, pa.string()),
        }
    )


def publish_by_hand(
    store: Store,
    ids: list[Any],
    vectors: Float32,
    *,
    centroids: Float32 | None = None,
    routing: Routing | None = None,
    shard_of: Any = None,
    values: list[bytes] | None = None,
    key_encoding: KeyEncoding = "raw",
    metric: DistanceMetric = DistanceMetric.COSINE,
    backend: str = "lancedb",
    family: IndexFamily = IndexFamily.FLAT,
    vector_type: VectorType = "float32",
    num_probes: int = 2,
    payloads: list[Any] | None = None,
    sealed: bool = True,
    ours: bool = False,
    custom: dict[str, Any] | None = None,
) -> Manifest:
    """Writes a whole snapshot and points ``_CURRENT`` at it.

    Args:
        store: root of the snapshot.
        ids: of the rows; with ``values`` their keys, too.
        vectors: shape (n, dim).
        centroids: of a CLUSTER snapshot.
        routing: any other.
        shard_of: shard of each row where it follows from nothing else, shape (n,).
        values: of the keys; makes the snapshot a unified one.
        key_encoding: of the keys.
        metric: declared distance.
        backend: index library.
        family: index of all shards.
        vector_type: how vectors are stored.
        num_probes: shards asked by default.
        payloads: see ``table_of``.
        sealed: record the digests of the objects.
        ours: say that this package wrote it.
        custom: fields of ``custom.vector`` to replace.
    """
    if routing is None:
        assert centroids is not None
        routing = ClusterRouting(centroids, metric)
    if isinstance(routing, VectorRouting):
        shard_of = routing.assign(vectors)
    elif isinstance(routing, HashRouting):
        shard_of = routing.place(pa.RecordBatch.from_arrays([key_array(ids)], ["key"])).shards
    run_id, unified = uuid.uuid4().hex, values is not None
    rows = table_of([key.hex() if isinstance(key, bytes) else key for key in ids], vectors, payloads)
    pairs = None if values is None else (encode_keys(key_array(ids), key_encoding), pa.array(values, pa.binary()))
    build = partial(
        backend_named(backend).build, family=family, metric=metric, params=IndexParams(), vector_type=vector_type
    )
    subfolder = backend_named(backend).subfolder if unified else ""
    shards: list[ShardRow] = []
    for db_id in np.unique(shard_of).tolist():
        mask = pa.array(np.asarray(shard_of) == db_id)
        part = rows.filter(mask)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if pairs is not None:
                write_key_values(folder, *(column.filter(mask) for column in pairs))
            build(part, folder / subfolder)
            shards.append(_upload(store, run_id, db_id, folder, part.num_rows, sealed=sealed))
    kind = (backend, _KV_BACKENDS[backend]) if unified else None
    fields = vector_fields(VectorMeta(dim=vectors.shape[1], metric=metric, num_probes=num_probes, unified=unified))
    sharding, more = _described(store, run_id, routing, kind)
    extras = SnapshotExtras(
        build_key="by hand",
        gate_key="none",
        index_family=family.value,
        id_type="int64" if isinstance(ids[0], int) else "string",
        backend="sqlite-vec" if backend == "sqlite-vec" else "lancedb",
        vector_type=vector_type,
        row_count=len(vectors),
    )
    manifest = Manifest(
        run_id=run_id,
        created_at=datetime.now(UTC),
        num_dbs=routing.num_dbs,
        s3_prefix=store.url,
        key_encoding=key_encoding,
        sharding=sharding,
        custom={"vector": fields | more | (custom or {})} | ({"sf_pipelines": extras.to_custom()} if ours else {}),
        shards=tuple(shards),
    )
    publish(store, manifest)
    return manifest


def vector_fields(vector: VectorMeta) -> dict[str, Any]:
    """``custom.vector`` as it is stored: stock readers of vector-only snapshots know no ``unified``."""
    fields = vector.model_dump(mode="json", exclude_none=True)
    return {name: value for name, value in fields.items() if name not in {"unified", "index_params"} or value}


def publish(store: Store, manifest: Manifest) -> None:
    """Writes a manifest and points ``_CURRENT`` at it."""
    name = manifest_name(manifest.run_id, manifest.created_at)
    data = encode_manifest(manifest)
    store.put(name, data)
    point_at(store, name, manifest.run_id, hashlib.sha256(data).hexdigest())


def point_at(store: Store, name: str, run_id: str, digest: str | None = None) -> None:
    """Moves the pointer."""
    pointer = Pointer(
        manifest_ref=store.url_of(name), run_id=run_id, updated_at=datetime.now(UTC), manifest_digest=digest
    )
    store.put(CURRENT, pointer.encode())


def _described(
    store: Store, run_id: str, routing: Routing, unified: tuple[str, str] | None
) -> tuple[ShardingRecord, dict[str, Any]]:
    """What the manifest says of the routing: its own record, and fields of ``custom.vector``."""
    described = routing.describe()
    if unified is None:
        return ShardingRecord(), described | _store_matrix(store, run_id, routing)
    backend, kv_backend = unified
    record = ShardingRecord(strategy=described.pop("sharding_strategy"), **described)
    return record, {"backend": backend, "kv_backend": kv_backend}


def _store_matrix(store: Store, run_id: str, routing: Routing) -> dict[str, Any]:
    """Stores centroids or hyperplanes; the field that names them."""
    if not isinstance(routing, VectorRouting):
        return {}
    kind = "centroids" if routing.strategy == "cluster" else "hyperplanes"
    file = io.BytesIO()
    np.save(file, routing.matrix)
    key = f"vector_meta/run_id={run_id}/{kind}.npy"
    store.put(key, file.getvalue())
    return {f"{kind}_ref": store.url_of(key)}


def _upload(store: Store, run_id: str, db_id: int, folder: Path, rows: int, *, sealed: bool) -> ShardRow:
    prefix = f"shards/run_id={run_id}/db={db_id:05d}/attempt=00"
    objects = []
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        data, relative = path.read_bytes(), path.relative_to(folder).as_posix()
        store.put(f"{prefix}/{relative}", data)
        objects.append(ShardObject(path=relative, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return ShardRow(
        db_id=db_id,
        db_url=store.url_of(prefix),
        row_count=rows,
        db_bytes=sum(item.size for item in objects),
        checkpoint_id=uuid.uuid4().hex,
        objects=tuple(objects) if sealed else None,
    )
