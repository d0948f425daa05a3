"""Tiny snapshots put together by hand: index, centroids, manifest, pointer."""

import hashlib
import io
import json
import tempfile
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.config import IndexParams
from sf_pipelines.snapshot.index.lancedb import LanceDBBackend
from sf_pipelines.snapshot.index.protocol import IndexFamily
from sf_pipelines.snapshot.manifest.codec import encode_manifest
from sf_pipelines.snapshot.manifest.models import Manifest, ShardObject, ShardRow, VectorMeta
from sf_pipelines.snapshot.manifest.pointer import CURRENT, Pointer, manifest_name
from sf_pipelines.snapshot.metric import DistanceMetric, Float32
from sf_pipelines.snapshot.routing.cluster import ClusterRouting
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.tables import exact_distances


def clustered(rows: int, dim: int = 8, *, centres: int = 4, seed: int = 0) -> Float32:
    """Vectors around a few centres."""
    rng = np.random.default_rng(seed)
    middle = rng.standard_normal((centres, dim)) * 3
    return (middle[rng.integers(0, centres, rows)] + rng.standard_normal((rows, dim))).astype(np.float32)


def brute_force(
    queries: Float32, rows: Float32, metric: DistanceMetric, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Positions and float64 distances of the k nearest rows, equal ones by position."""
    distances = exact_distances(queries, rows, metric)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distances, order, axis=1)


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
    centroids: Float32,
    metric: DistanceMetric = DistanceMetric.COSINE,
    family: IndexFamily = IndexFamily.FLAT,
    num_probes: int = 2,
    payloads: list[Any] | None = None,
    sealed: bool = True,
    custom: dict[str, Any] | None = None,
) -> Manifest:
    """Writes a whole snapshot and points ``_CURRENT`` at it."""
    run_id = uuid.uuid4().hex
    shard_of = ClusterRouting(centroids, metric).assign(vectors)
    rows = table_of(ids, vectors, payloads)
    shards = [
        _write_shard(store, run_id, db_id, rows.filter(pa.array(shard_of == db_id)), metric, family, sealed=sealed)
        for db_id in range(len(centroids))
        if (shard_of == db_id).any()
    ]
    file = io.BytesIO()
    np.save(file, centroids)
    key = f"vector_meta/run_id={run_id}/centroids.npy"
    store.put(key, file.getvalue())
    meta = VectorMeta(
        dim=vectors.shape[1],
        metric=metric,
        sharding_strategy="cluster",
        num_probes=num_probes,
        centroids_ref=store.url_of(key),
        total_vectors=len(vectors),
    )
    created = datetime.now(UTC)
    manifest = Manifest(
        run_id=run_id,
        created_at=created,
        num_dbs=len(centroids),
        s3_prefix=store.url,
        custom={"vector": meta.to_custom() | (custom or {})},
        shards=tuple(shards),
    )
    name = manifest_name(run_id, created)
    data = encode_manifest(manifest)
    store.put(name, data)
    point_at(store, name, run_id, hashlib.sha256(data).hexdigest())
    return manifest


def point_at(store: Store, name: str, run_id: str, digest: str | None = None) -> None:
    """Moves the pointer."""
    pointer = Pointer(
        manifest_ref=store.url_of(name), run_id=run_id, updated_at=datetime.now(UTC), manifest_digest=digest
    )
    store.put(CURRENT, pointer.encode())


def _write_shard(
    store: Store,
    run_id: str,
    db_id: int,
    rows: pa.Table,
    metric: DistanceMetric,
    family: IndexFamily,
    *,
    sealed: bool,
) -> ShardRow:
    prefix = f"shards/run_id={run_id}/db={db_id:05d}/attempt=00"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LanceDBBackend().build(rows, folder, family=family, metric=metric, params=IndexParams())
        objects = []
        for path in sorted(item for item in folder.rglob("*") if item.is_file()):
            data, relative = path.read_bytes(), path.relative_to(folder).as_posix()
            store.put(f"{prefix}/{relative}", data)
            objects.append(ShardObject(path=relative, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return ShardRow(
        db_id=db_id,
        db_url=store.url_of(prefix),
        row_count=rows.num_rows,
        db_bytes=sum(item.size for item in objects),
        checkpoint_id=uuid.uuid4().hex,
        objects=tuple(objects) if sealed else None,
    )
