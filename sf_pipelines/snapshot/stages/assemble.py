"""From sealed shards to a manifest: merging the truth, measuring the curve, choosing ``num_probes``."""

import hashlib
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.config import RecallGate, WriteConfig
from sf_pipelines.snapshot.errors import CountMismatchError
from sf_pipelines.snapshot.gate.recall import (
    RecallEstimate,
    Truth,
    asked_queries,
    halves,
    id_array,
    judged_record,
    merge_truth,
    recall_per_query,
    row_numbers,
)
from sf_pipelines.snapshot.manifest.codec import encode_manifest
from sf_pipelines.snapshot.manifest.models import JudgedRecord, Manifest, ShardingRecord, ShardRow, SnapshotExtras
from sf_pipelines.snapshot.metric import Float64
from sf_pipelines.snapshot.run import find
from sf_pipelines.snapshot.run.build import Build, Stopwatch
from sf_pipelines.snapshot.run.fork import fork_run
from sf_pipelines.snapshot.run.ledger import Ledger, shard_receipts
from sf_pipelines.snapshot.run.receipts import (
    CurvePoint,
    ManifestReceipt,
    PromoteReceipt,
    Ref,
    RunReceipts,
    ShardReceipt,
    inputs_of,
)

# Their hits from every shard are held at once, with ids that may be long.
_QUERIES_AT_A_TIME = 256
_TIMED_QUERIES = 3
_TIMED_POINTS = 8
# Truth, curve, latencies with the manifest: what the progress of ``assemble`` counts.
_STEPS = 3


def assemble(build: Build, run_id: str) -> ManifestReceipt:
    """Joins the shards of one run into a manifest under ``staging/`` and chooses ``num_probes``.

    A published run never changes: if a shard of it was built anew, the manifest is that of a fork (a copy under a new
    run id), and checks and promotion go on with the receipt's ``run_id``.

    Raises:
        ReceiptMissingError: a shard has not been built.
        CountMismatchError: the shards' rows and the rejects do not add up to the rows of the source.
    """
    run, ledger = build.receipts(run_id), build.ledger(run_id)
    scanned, sampled = run.scanned, run.sampled
    shards, standing = shard_receipts(ledger, run.routed), find.standing_shards(build, scanned)
    if standing is not None:
        shards = [standing.of(ledger, shard) for shard in shards]
    inputs = inputs_of(
        queries=sampled.queries.sha256,
        routing=run.routing_digest,
        gate_key=build.config.gate_key(),
        root=build.store.url,
        shards=[(shard.db_id, shard.digest) for shard in shards],
    )
    number = ledger.next_number(ManifestReceipt)
    found = ledger.find_whole(ManifestReceipt, inputs=inputs, published=scanned.published)
    if found is None and scanned.held:
        # Under another gate, or with a shard built anew, it would be that of a fork, which is held back as well.
        found = ledger.find(ManifestReceipt)
    if found is not None:
        return found.model_copy(update={"reason": "this manifest was assembled before"})
    if ledger.find(PromoteReceipt) is not None:
        return assemble(build, fork_run(build, run, shards))
    rows = sum(shard.rows for shard in shards)
    if rows + sampled.rejected != sampled.rows_in:
        raise CountMismatchError(
            f"build {run_id}: {rows} rows in shards and {sampled.rejected} rejected do not make the "
            f"{sampled.rows_in} read"
        )
    with build.working(scanned):
        return ledger.commit(assemble_manifest(build, run, shards, inputs), number=number)


def assemble_manifest(build: Build, run: RunReceipts, shards: list[ShardReceipt], inputs: str) -> ManifestReceipt:
    """Stages a manifest over all shards to measure with, then the one with the chosen number of probes."""
    run_id, sampled = run.scanned.run_id, run.sampled
    watch, ledger, created_at = Stopwatch(), build.ledger(run_id), datetime.now(UTC)
    queries = ledger.get_table(sampled.queries)
    parts = [ledger.get_table(shard.truth) for shard in shards if shard.truth is not None]
    asked = row_numbers(asked_queries(ledger, run).column("id"))
    merged = merge_truth(parts, asked, build.config.recall_gate.k)
    truth = Truth.of(merged, len(asked))
    build.report("assemble", 1, _STEPS, "steps")

    draft = _manifest(build, run, shards, created_at)
    drafted = _stage(ledger, draft)
    measured = measure_curve(build, drafted.key, queries, truth, [shard.rows for shard in shards])
    tuning, judging = halves(queries.num_rows, disjoint=sampled.disjoint)
    census = not sampled.disjoint
    estimates = {count: RecallEstimate.of(found[tuning], census=census) for count, (found, _) in measured.items()}
    curve = [
        CurvePoint(num_probes=count, recall=estimate.mean, lower=estimate.lower, rows_searched=measured[count][1])
        for count, estimate in estimates.items()
    ]
    build.report("assemble", 2, _STEPS, "steps")
    latencies = measure_latencies(build, drafted.key, queries, list(measured))
    gate = build.config.recall_gate
    num_probes = choose_probes(build.config.num_probes, estimates, gate.min_recall, len(judging))
    # Where a query's own shard is asked, or all are, there is one figure only.
    recalls, _ = measured.get(num_probes) or measured[curve[0].num_probes]
    final = _stage(ledger, _tuned(draft, curve, judged_record(recalls[judging], num_probes, census=census), gate))
    build.store.delete(drafted.key)
    build.report("assemble", _STEPS, _STEPS, "steps")
    return ManifestReceipt(
        run_id=run_id,
        inputs=inputs,
        manifest_key=final.key,
        manifest_digest=final.sha256,
        manifest_size=final.size,
        manifest_created_at=created_at,
        gate_key=build.config.gate_key(),
        num_probes=num_probes,
        curve=tuple(curve),
        latencies=latencies,
        rows=sum(shard.rows for shard in shards),
        shards=tuple(shard.key for shard in shards),
        truth=ledger.put_table("truth/merged", merged),
        seconds=watch.seconds,
    )


def _manifest(build: Build, run: RunReceipts, shards: list[ShardReceipt], created_at: datetime) -> Manifest:
    """The manifest as the format wants it, asking all shards; our extras beside."""
    config, scanned = build.config, run.scanned
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
    described = build.routing(run.trained).describe()
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


def _tuned(manifest: Manifest, curve: list[CurvePoint], judged: JudgedRecord, gate: RecallGate) -> Manifest:
    custom = {name: dict(value) for name, value in manifest.custom.items()}
    if "num_probes" in custom["vector"]:
        custom["vector"]["num_probes"] = judged.num_probes
    custom["sf_pipelines"]["recall"] = {
        "k": gate.k,
        "min_recall": gate.min_recall,
        "judged": judged.model_dump(),
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
    build: Build, manifest_key: str, queries: pa.Table, truth: Truth, rows_by_shard: list[int]
) -> dict[int, tuple[Float64, float]]:
    """Recall of each query at every number of probes; each shard's index is searched once for all of them.

    Where a query is not routed by its vector there is one number only: its own shard, or all shards.

    Args:
        build: what is built.
        manifest_key: a staged manifest.
        queries: table (id, vector) of n sample queries.
        truth: of these queries.
        rows_by_shard: rows of each shard.

    Returns:
        By number of probes: recall of each query, shape (n,), and the mean share of rows in the shards asked.
    """
    reader, k = build.reader(manifest_key), build.config.recall_gate.k
    vectors, ids, homes = vectors_of(queries), id_array(queries), build.homes(queries)
    order = reader.route_batch(vectors, homes=homes)
    covered = np.cumsum(np.asarray(rows_by_shard)[order], axis=1).mean(axis=0) / max(1, sum(rows_by_shard))
    found: dict[int, list[Float64]] = {}
    for start in range(0, len(vectors), _QUERIES_AT_A_TIME):
        part = slice(start, start + _QUERIES_AT_A_TIME)
        answered = list(reader.probe_curve(vectors[part], k + 1, homes=None if homes is None else homes[part]))
        # One point over several shards: there is no order among them, all are always asked.
        for probes, answers in enumerate(answered, start=order.shape[1] - len(answered) + 1):
            recalls = recall_per_query(
                answers.ids, answers.distances, ids[part], truth.select(np.arange(len(ids))[part])
            )
            found.setdefault(probes, []).append(recalls)
    return {probes: (np.concatenate(parts), float(covered[probes - 1])) for probes, parts in found.items()}


def measure_latencies(build: Build, manifest_key: str, queries: pa.Table, probes: list[int]) -> dict[int, float]:
    """Median milliseconds of a few single searches at some of these numbers of probes, warm, on this machine.

    What they tell is how latency grows with probes, not what a serving machine will need: every shard is asked by its
    index, as a shard is that is too large to be scanned in memory.
    """
    reader, k = build.reader(manifest_key), build.config.recall_gate.k
    asked = queries.slice(0, _TIMED_QUERIES)
    vectors, homes = vectors_of(asked), build.homes(asked)
    chosen = sorted({probes[place] for place in np.linspace(0, len(probes) - 1, _TIMED_POINTS).astype(int)})
    out: dict[int, float] = {}
    for count in chosen:
        times: list[float] = []
        for place in range(len(vectors)):
            watch = Stopwatch()
            one = slice(place, place + 1)
            home = None if homes is None else homes[one]
            reader.search_arrays(vectors[one], k, num_probes=count if len(probes) > 1 else None, homes=home)
            times.append(1000 * watch.seconds)
        out[count] = float(np.median(times))
    return out


def choose_probes(wanted: int | str, curve: dict[int, RecallEstimate], min_recall: float, judging: int) -> int:
    """``auto``: the smallest number of probes at which the judging half's bound, too, can be expected to hold.

    Asking only that the tuning half's own bound holds would let a snapshot fail its gate by chance every now and then
    where one more probe would have passed.
    """
    if wanted != "auto":
        return int(wanted)
    reached = (count for count, estimate in curve.items() if estimate.lower_of_another(judging) >= min_recall)
    return next(reached, max(curve))
