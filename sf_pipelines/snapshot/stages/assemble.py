"""From sealed shards to a manifest: merging the truth, measuring the curve, choosing ``num_probes``."""

import hashlib
from contextlib import closing
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.config import RecallGate
from sf_pipelines.snapshot.errors import CountMismatchError
from sf_pipelines.snapshot.gate.recall import (
    RecallEstimate,
    Truth,
    halves,
    id_array,
    judged_record,
    merge_truth,
    recall_per_query,
    row_numbers,
)
from sf_pipelines.snapshot.manifest.codec import encode_manifest
from sf_pipelines.snapshot.manifest.models import MANIFEST_CONTENT_TYPE, CurvePoint, JudgedRecord, Manifest
from sf_pipelines.snapshot.metric import Float64
from sf_pipelines.snapshot.reader.reader import ShardedVectorReader, UnifiedShardedReader, reader_of
from sf_pipelines.snapshot.reader.state import state_of
from sf_pipelines.snapshot.run.build import Build, Run, Stopwatch
from sf_pipelines.snapshot.run.describe import describe
from sf_pipelines.snapshot.run.ledger import Ledger, shard_receipts
from sf_pipelines.snapshot.run.receipts import (
    ManifestReceipt,
    ShardReceipt,
    inputs_of,
)
from sf_pipelines.snapshot.run.successor import begin_successor, complete_successor, current_of, has_successor
from sf_pipelines.snapshot.store import Ref

# Their hits from every shard are held at once, with ids that may be long.
_QUERIES_AT_A_TIME = 256
_TIMED_QUERIES = 3
_TIMED_POINTS = 8
# Truth, curve, latencies with the manifest: what the progress of ``assemble`` counts.
_STEPS = 3


def assemble(build: Build, run_id: str) -> ManifestReceipt:
    """Joins the shards of one run into a manifest under ``staging/`` and chooses ``num_probes``.

    A published run never changes: if a shard of it was rebuilt, the manifest is that of its successor, and checks and
    promotion go on with the receipt's ``run_id``.
    """
    run, view = build.run(run_id), None
    if run.scanned.published and not run.scanned.held:
        run, view = current_of(run)
    scanned, sampled, shards = run.scanned, run.sampled, shard_receipts(run, run.routed)
    inputs = inputs_of(
        queries=sampled.queries.sha256,
        routing=run.routing_digest,
        gate_key=build.config.gate_key(),
        root=build.store.url,
        shards=[(shard.db_id, shard.digest) for shard in shards],
    )
    found, number = run.seek_whole(ManifestReceipt, inputs=inputs, published=scanned.published)
    if found is None and scanned.held:
        # Under another gate it would be that of a successor, which is held back as well.
        found = run.need(ManifestReceipt)
    if view is not None and (found is None or has_successor(run, view)):
        successor = begin_successor(run, view)
        complete_successor(successor, shards)
        return assemble(build, successor.run_id)
    if found is not None:
        run.take(found)
        return found.model_copy(update={"reason": "this manifest was assembled before"})
    rows = sum(shard.rows for shard in shards)
    if rows + sampled.rejected != sampled.rows_in:
        raise CountMismatchError(
            f"build {run_id}: {rows} rows in shards and {sampled.rejected} rejected do not make the "
            f"{sampled.rows_in} read"
        )
    with build.working(scanned):
        return run.commit(_assemble(run, shards, inputs), number=number)


def _assemble(run: Run, shards: list[ShardReceipt], inputs: str) -> ManifestReceipt:
    """Measures a manifest over all shards in memory, then stages it with the chosen number of probes."""
    build, sampled = run.build, run.sampled
    watch, created_at = Stopwatch(), datetime.now(UTC)
    queries = run.get_table(sampled.queries)
    parts = [run.get_table(shard.truth) for shard in shards if shard.truth is not None]
    asked = row_numbers(run.queries.column("id"))
    merged = merge_truth(parts, asked, build.config.recall_gate.k)
    truth = Truth.of(merged, len(asked))
    build.report("assemble", 1, _STEPS, "steps")

    draft = describe(run, shards, created_at)
    with closing(_reader(run, draft)) as reader:
        measured = measure_curve(build, reader, queries, truth, [shard.rows for shard in shards])
        latencies = measure_latencies(build, reader, queries, list(measured))
    tuning, judging = halves(queries.num_rows, disjoint=sampled.disjoint)
    census = not sampled.disjoint
    estimates = {count: RecallEstimate.of(found[tuning], census=census) for count, (found, _) in measured.items()}
    curve = [
        CurvePoint(num_probes=count, recall=estimate.mean, lower=estimate.lower, rows_searched=measured[count][1])
        for count, estimate in estimates.items()
    ]
    build.report("assemble", 2, _STEPS, "steps")
    gate = build.config.recall_gate
    num_probes = choose_probes(build.config.num_probes, estimates, gate.min_recall, len(judging))
    # Where a query's own shard is asked, or all are, there is one figure only.
    recalls, _ = measured.get(num_probes) or measured[curve[0].num_probes]
    final = _stage(run, _tuned(draft, curve, judged_record(recalls[judging], num_probes, census=census), gate))
    build.report("assemble", _STEPS, _STEPS, "steps")
    return ManifestReceipt(
        run_id=run.run_id,
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
        truth=run.put_table("truth/merged", merged),
        seconds=watch.seconds,
    )


def _reader(run: Run, manifest: Manifest) -> ShardedVectorReader | UnifiedShardedReader:
    """A reader of a manifest that is stored nowhere; it asks the index of every shard, as ``Build.reader`` does."""
    key = f"{run.root}/manifest-draft"
    return reader_of(state_of(run.store, manifest, key, digest=""), run.store, **run.build.reader_options)


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
    ledger.store.put(key, data, content_type=MANIFEST_CONTENT_TYPE)
    return Ref(key=key, size=len(data), sha256=digest)


def measure_curve(
    build: Build,
    reader: ShardedVectorReader | UnifiedShardedReader,
    queries: pa.Table,
    truth: Truth,
    rows_by_shard: list[int],
) -> dict[int, tuple[Float64, float]]:
    """Recall of each query at every number of probes; each shard's index is searched once for all of them.

    Where a query is not routed by its vector there is one number only: its own shard, or all shards.
    """
    k = build.config.recall_gate.k
    vectors, ids, own = vectors_of(queries), id_array(queries), build.own_shards(queries)
    order = reader.route_batch(vectors, shard_of=own)
    covered = np.cumsum(np.asarray(rows_by_shard)[order], axis=1).mean(axis=0) / max(1, sum(rows_by_shard))
    found: dict[int, list[Float64]] = {}
    for start in range(0, len(vectors), _QUERIES_AT_A_TIME):
        part = slice(start, start + _QUERIES_AT_A_TIME)
        answered = list(reader.probe_curve(vectors[part], k + 1, shard_of=None if own is None else own[part]))
        # One point over several shards: there is no order among them, all are always asked.
        for probes, answers in enumerate(answered, start=order.shape[1] - len(answered) + 1):
            recalls = recall_per_query(
                answers.ids, answers.distances, ids[part], truth.select(np.arange(len(ids))[part])
            )
            found.setdefault(probes, []).append(recalls)
    return {probes: (np.concatenate(parts), float(covered[probes - 1])) for probes, parts in found.items()}


def measure_latencies(
    build: Build, reader: ShardedVectorReader | UnifiedShardedReader, queries: pa.Table, probes: list[int]
) -> dict[int, float]:
    """Median milliseconds of a few single searches at some of these numbers of probes, warm, on this machine.

    What they tell is how latency grows with probes, not what a serving machine will need: every shard is asked by its
    index, as a shard is that is too large to be scanned in memory.
    """
    k = build.config.recall_gate.k
    asked = queries.slice(0, _TIMED_QUERIES)
    vectors, own = vectors_of(asked), build.own_shards(asked)
    chosen = sorted({probes[place] for place in np.linspace(0, len(probes) - 1, _TIMED_POINTS).astype(int)})
    out: dict[int, float] = {}
    for count in chosen:
        times: list[float] = []
        for place in range(len(vectors)):
            watch = Stopwatch()
            one = slice(place, place + 1)
            its_own = None if own is None else own[one]
            reader.search_arrays(vectors[one], k, num_probes=count if len(probes) > 1 else None, shard_of=its_own)
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
