"""From sealed shards to a manifest: merging the truth, measuring the curve, choosing ``num_probes``."""

import hashlib
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from sf_pipelines.snapshot.build import Build, Stopwatch
from sf_pipelines.snapshot.config import RecallGate
from sf_pipelines.snapshot.errors import ReceiptMissingError
from sf_pipelines.snapshot.evaluation import RecallEstimate, Truth, halves, id_array, merge_truth, recall_per_query
from sf_pipelines.snapshot.manifest.codec import encode_manifest
from sf_pipelines.snapshot.manifest.models import Manifest, ShardingRecord, ShardRow, SnapshotExtras
from sf_pipelines.snapshot.receipts import (
    CurvePoint,
    Ledger,
    ManifestReceipt,
    Ref,
    RouteReceipt,
    SampleReceipt,
    ScanReceipt,
    ShardReceipt,
    TrainReceipt,
)
from sf_pipelines.snapshot.routed import vectors_of


def shard_receipts(ledger: Ledger, routed: RouteReceipt) -> list[ShardReceipt]:
    """The newest receipt of every shard, all made from the rows of this routing.

    Raises:
        ReceiptMissingError: naming the shards that have none.
    """
    found = ledger.find_parts(ShardReceipt, inputs=routed.inputs)
    parts = [f"db={shard.db_id:05d}" for shard in routed.shards]
    missing = [part for part in parts if part not in found]
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise ReceiptMissingError(f"build {ledger.run_id}: {len(missing)} shards have not been built: {shown}")
    return [found[part] for part in parts]


def assemble_manifest(
    build: Build,
    scanned: ScanReceipt,
    sampled: SampleReceipt,
    trained: TrainReceipt,
    routed: RouteReceipt,
    shards: list[ShardReceipt],
    inputs: str,
) -> ManifestReceipt:
    """Stages a manifest over all shards to measure with, then the one with the chosen number of probes."""
    watch, ledger, created_at = Stopwatch(), build.ledger(scanned.run_id), datetime.now(UTC)
    queries = ledger.get_table(sampled.queries)
    parts = [ledger.get_table(shard.truth) for shard in shards if shard.truth is not None]
    merged = merge_truth(parts, queries.column("id").combine_chunks(), build.config.recall_gate.k)
    truth = Truth.of(merged, queries.num_rows)

    draft = _manifest(build, scanned, sampled, trained, routed, shards, created_at)
    drafted = _stage(ledger, draft)
    tuning, judging = halves(queries.num_rows, disjoint=sampled.disjoint)
    measured = measure_curve(
        build,
        drafted.key,
        queries.take(pa.array(tuning)),
        truth.select(tuning),
        [shard.rows for shard in shards],
        census=not sampled.disjoint,
    )
    gate, wanted = build.config.recall_gate, build.config.vector_spec.sharding.num_probes
    num_probes = choose_probes(wanted, measured, gate.min_recall, len(judging))
    curve = [point for point, _ in measured]
    final = _stage(ledger, _tuned(draft, num_probes, curve, gate))
    build.store.delete(drafted.key)
    return ManifestReceipt(
        run_id=scanned.run_id,
        inputs=inputs,
        manifest_key=final.key,
        manifest_digest=final.sha256,
        manifest_size=final.size,
        manifest_created_at=created_at,
        gate_key=build.config.gate_key(),
        num_probes=num_probes,
        curve=tuple(curve),
        rows=sum(shard.rows for shard in shards),
        shards=tuple(shard.key for shard in shards),
        truth=ledger.put_table("truth/merged", merged),
        seconds=watch.seconds,
    )


def _manifest(
    build: Build,
    scanned: ScanReceipt,
    sampled: SampleReceipt,
    trained: TrainReceipt,
    routed: RouteReceipt,
    shards: list[ShardReceipt],
    created_at: datetime,
) -> Manifest:
    """The manifest as the format wants it, asking all shards; our extras beside."""
    spec, rows = build.config.vector_spec, sum(shard.rows for shard in shards)
    extras = SnapshotExtras(
        build_key=scanned.build_key,
        gate_key=build.config.gate_key(),
        index_family=routed.index_family,
        id_type=scanned.id_type,
        row_count=rows,
        rejected=sampled.rejected,
        routing_sha256=trained.ref.sha256,
    )
    vector = {
        "dim": spec.dim,
        "metric": spec.metric.value,
        "index_type": routed.index_family,
        "quantization": None,
        "total_vectors": rows,
        "num_probes": len(shards),
        "centroids_ref": build.store.url_of(trained.ref.key),
        **build.routing(trained.ref).describe(),
    }
    return Manifest(
        run_id=scanned.run_id,
        created_at=created_at,
        num_dbs=build.config.num_dbs,
        s3_prefix=build.store.url,
        key_col="_vector_id",
        db_path_template="db={db_id:05d}",
        shard_prefix="shards",
        key_encoding="raw",
        sharding=ShardingRecord(),
        custom={"vector": vector, "sf_pipelines": extras.to_custom()},
        shards=tuple(
            _shard_row(shard, build.store.url_of(shard.db_key)) for shard in shards if shard.db_key is not None
        ),
    )


def _shard_row(shard: ShardReceipt, db_url: str) -> ShardRow:
    return ShardRow(
        db_id=shard.db_id,
        db_url=db_url,
        attempt=shard.attempt,
        row_count=shard.rows,
        db_bytes=shard.bytes,
        checkpoint_id=shard.checkpoint_id,
        writer_info={
            "stage_id": None,
            "task_attempt_id": None,
            "attempt": shard.attempt,
            "duration_ms": round(1000 * shard.seconds),
        },
        objects=shard.objects,
    )


def _tuned(manifest: Manifest, num_probes: int, curve: list[CurvePoint], gate: RecallGate) -> Manifest:
    custom = {name: dict(value) for name, value in manifest.custom.items()}
    custom["vector"]["num_probes"] = num_probes
    custom["sf_pipelines"]["recall"] = {
        "k": gate.k,
        "min_recall": gate.min_recall,
        "curve": [point.model_dump() for point in curve],
    }
    return manifest.model_copy(update={"custom": custom})


def _stage(ledger: Ledger, manifest: Manifest) -> Ref:
    """Stores a manifest's bytes under ``staging/``."""
    data = encode_manifest(manifest)
    digest = hashlib.sha256(data).hexdigest()
    key = f"{ledger.root}/manifest-{digest[:32]}"
    ledger.store.put(key, data, content_type="application/x-sqlite3")
    return Ref(key=key, size=len(data), sha256=digest)


def measure_curve(
    build: Build, manifest_key: str, queries: pa.Table, truth: Truth, rows_by_shard: list[int], *, census: bool
) -> list[tuple[CurvePoint, RecallEstimate]]:
    """Recall of the queries at every number of probes; each shard's index is searched once for all of them.

    Args:
        build: what is built.
        manifest_key: a staged manifest.
        queries: table (id, vector) of n sample queries.
        truth: of these queries.
        rows_by_shard: rows of each shard.
        census: whether the queries are all rows there are.
    """
    reader, k = build.reader(manifest_key), build.config.recall_gate.k
    vectors, ids = vectors_of(queries), id_array(queries)
    order = reader.route_batch(vectors)
    covered = np.cumsum(np.asarray(rows_by_shard)[order], axis=1).mean(axis=0) / max(1, sum(rows_by_shard))
    out: list[tuple[CurvePoint, RecallEstimate]] = []
    for probes, answers in enumerate(reader.probe_curve(vectors, k + 1), start=1):
        estimate = RecallEstimate.of(recall_per_query(answers.ids, answers.scores, ids, truth), census=census)
        point = CurvePoint(
            num_probes=probes,
            recall=estimate.mean,
            lower=estimate.lower,
            rows_searched=float(covered[probes - 1]),
        )
        out.append((point, estimate))
    return out


def choose_probes(
    wanted: int | str, curve: list[tuple[CurvePoint, RecallEstimate]], min_recall: float, judging: int
) -> int:
    """``auto``: the smallest number of probes at which the judging half's bound, too, can be expected to hold.

    Asking only that the tuning half's own bound holds would let a snapshot fail its gate by chance every now and then
    where one more probe would have passed.
    """
    if wanted != "auto":
        return int(wanted)
    for point, estimate in curve:
        if estimate.lower_of_another(judging) >= min_recall:
            return point.num_probes
    return len(curve)
