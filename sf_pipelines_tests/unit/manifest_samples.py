"""Small manifests to try things on."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

from sf_pipelines.snapshot.manifest.codec import encode_manifest
from sf_pipelines.snapshot.manifest.models import (
    Manifest,
    RecallRecord,
    ShardObject,
    ShardRow,
    SnapshotExtras,
    VectorMeta,
)
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines_tests.snapshots import vector_fields

PREFIX = "s3://serving/products"
CREATED = datetime(2026, 11, 22, 12, 0, 0, 5, tzinfo=UTC)


def shard(db_id: int, prefix: str = PREFIX, **changes: Any) -> ShardRow:
    objects = (
        ShardObject(path="vector_index.lance/data/a.lance", size=70, sha256="a" * 64),
        ShardObject(path="vector_index.lance/_versions/1.manifest", size=30, sha256="b" * 64),
    )
    fields: dict[str, Any] = {
        "db_id": db_id,
        "db_url": f"{prefix}/shards/run_id=r1/db={db_id:05d}/attempt=00-0badcafe",
        "attempt": 1,
        "row_count": 10,
        "db_bytes": 100,
        "checkpoint_id": "c" * 32,
        "objects": objects,
    }
    return ShardRow.model_validate(fields | changes)


def sample_manifest(run_id: str = "r1", prefix: str = PREFIX, **changes: Any) -> Manifest:
    vector = VectorMeta(
        dim=8,
        metric=DistanceMetric.COSINE,
        index_type="flat",
        sharding_strategy="cluster",
        num_probes=2,
        total_vectors=30,
        centroids_ref=f"{prefix}/vector_meta/run_id={run_id}/centroids.npy",
    )
    extras = SnapshotExtras(
        build_key="bk",
        gate_key="gk",
        index_family="flat",
        id_type="int64",
        row_count=30,
        recall=RecallRecord(k=10, min_recall=0.95),
    )
    fields: dict[str, Any] = {
        "run_id": run_id,
        "created_at": CREATED,
        "num_dbs": 4,
        "s3_prefix": prefix,
        "custom": {"vector": vector_fields(vector), "sf_pipelines": extras.to_custom(), "team": "search"},
        "shards": (shard(0, prefix), shard(1, prefix), shard(3, prefix)),
    }
    return Manifest.model_validate(fields | changes)


def sabotaged(*statements: str | tuple[str, tuple[Any, ...]], manifest: Manifest | None = None) -> bytes:
    """The sample's bytes after somebody ran SQL on them."""

    def run(database: sqlite3.Connection) -> None:
        for statement in statements:
            if isinstance(statement, tuple):
                database.execute(*statement)
            else:
                database.execute(statement)

    return rewritten(run, manifest)


def rewritten(change: Callable[[sqlite3.Connection], None], manifest: Manifest | None = None) -> bytes:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        database.deserialize(encode_manifest(manifest or sample_manifest()))
        change(database)
        return database.serialize()
