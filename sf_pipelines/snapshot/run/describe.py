"""What the manifest of a run says: written by the stage assemble, asked for by the check on custom fields."""

from datetime import datetime
from typing import Any

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.manifest.models import Manifest, ShardingRecord, ShardRow, SnapshotExtras
from sf_pipelines.snapshot.run.build import Run
from sf_pipelines.snapshot.run.receipts import ShardReceipt


def describe(run: Run, shards: list[ShardReceipt], created_at: datetime) -> Manifest:
    """The manifest as the format wants it, asking all shards; our extras beside."""
    build, config, scanned = run.build, run.build.config, run.scanned
    rows = sum(shard.rows for shard in shards)
    extras = SnapshotExtras(
        build_key=scanned.build_key,
        gate_key=config.gate_key(),
        index_family=run.routed.index_family,
        id_type=scanned.id_type,
        backend=config.vector_spec.backend,
        vector_type=config.vector_spec.vector_type,
        payload_columns=config.payload_cols,
        filter_columns=scanned.filter_columns,
        key_type=scanned.key_type,
        value_format=None if config.key_value is None else config.key_value.value_format,
        row_count=rows,
        rejected=run.sampled.rejected,
        routing_sha256=run.trained.ref.sha256 if run.trained else None,
    )
    described = run.routing.describe()
    if run.trained is not None:
        described[f"{run.trained.artifact}_ref"] = build.store.url_of(run.trained.ref.key)
    vector, keyed = _vector_fields(config, run.routed.index_family), {}
    if config.key_value is None:
        vector |= {"total_vectors": rows, "num_probes": config.shards, **described}
    else:
        keyed = {
            "key_col": config.key_value.key_col,
            "key_encoding": scanned.key_encoding,
            "sharding": ShardingRecord(strategy=described.pop("sharding_strategy"), **described),
        }
    return Manifest(
        run_id=scanned.run_id,
        created_at=created_at,
        num_dbs=config.shards,
        s3_prefix=build.store.url,
        custom={"vector": vector, "sf_pipelines": extras.to_custom()},
        shards=tuple(
            _shard_row(shard, build.store.url_of(shard.db_key)) for shard in shards if shard.db_key is not None
        ),
        **keyed,
    )


def _vector_fields(config: WriteConfig, index_family: str) -> dict[str, Any]:
    """What both kinds of snapshots say of their vectors, and what only unified ones do."""
    spec = config.vector_spec
    fields = {
        "dim": spec.dim,
        "metric": spec.metric.value,
        "index_type": index_family,
        "quantization": spec.quantization,
    }
    if config.key_value is None:
        return fields
    kv_backend = "sqlite-vec" if spec.backend == "sqlite-vec" else "sqlite"
    return fields | {"unified": True, "backend": spec.backend, "kv_backend": kv_backend}


def _shard_row(shard: ShardReceipt, db_url: str) -> ShardRow:
    return ShardRow(
        db_id=shard.db_id,
        db_url=db_url,
        attempt=shard.attempt,
        row_count=shard.rows,
        db_bytes=shard.db_bytes,
        min_key=shard.min_key,
        max_key=shard.max_key,
        checkpoint_id=shard.checkpoint_id,
        writer_info={
            "stage_id": None,
            "task_attempt_id": None,
            "attempt": shard.attempt,
            "duration_ms": round(1000 * shard.seconds),
        },
        objects=shard.objects,
    )
