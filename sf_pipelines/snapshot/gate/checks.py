"""The checks of the gate: each looks at a staged manifest through the reader that will serve it."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.gate.recall import (
    ROUNDING,
    RecallEstimate,
    Truth,
    halves,
    id_array,
    judged_record,
    recall_by_id,
    recall_per_query,
)
from sf_pipelines.snapshot.manifest.codec import decode_manifest
from sf_pipelines.snapshot.manifest.models import JudgedRecord, Manifest
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, pair_distances
from sf_pipelines.snapshot.reader.reader import ShardedVectorReader, UnifiedShardedReader
from sf_pipelines.snapshot.reader.state import load_state
from sf_pipelines.snapshot.reader.types import VectorSearchResponse
from sf_pipelines.snapshot.run.build import Build, Run
from sf_pipelines.snapshot.run.describe import describe
from sf_pipelines.snapshot.run.ledger import changed_objects, shard_receipts
from sf_pipelines.snapshot.run.receipts import ManifestReceipt, SampleReceipt, ShardReceipt
from sf_pipelines.snapshot.sharding import CelSharding, ClusterSharding, HashSharding, LshSharding
from sf_pipelines.snapshot.source.contract import CONTEXT_PREFIX, SHARD_COLUMN
from sf_pipelines.snapshot.source.keys import KEY_COLUMN, VALUE_COLUMN

Figures = dict[str, float | int | str]

# Beyond this, an unlimited skew is worth a warning.
_USUAL_SKEW = 4.0
# Queries of the stock-style figure: enough to see a wrong metric or a bad default, cheap enough to always measure.
_STOCK_QUERIES = 100
# Sampled rows of each shard whose context is tried.
_CONTEXTS = 4
# Searches that the round trip shows, and characters of their payloads.
_SHOWN_SEARCHES = 5
_SHOWN_PAYLOAD = 80
# The next family that finds more: 8-bit numbers are spoiled by rows of a far larger norm, graphs by equal vectors.
_MORE_EXACT = {"ivf_sq": "ivf_flat", "hnsw": "hnsw_flat or ivf_flat", "hnsw_flat": "ivf_flat", "ivf_flat": "flat"}
# What assemble wrote into the manifest and what its readers find are the same measurement.
_SAME_RECALL = 0.01


@dataclass(frozen=True)
class Finding:
    """Outcome of a check before it is stored."""

    passed: bool
    message: str
    figures: Figures
    table: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Judged:
    """The manifest that is judged, and the run that it was assembled from."""

    run: Run
    receipt: ManifestReceipt

    @property
    def build(self) -> Build:
        """The build."""
        return self.run.build

    @property
    def sampled(self) -> SampleReceipt:
        """The build's samples."""
        return self.run.sampled

    @property
    def reader(self) -> ShardedVectorReader | UnifiedShardedReader:
        """A reader of the staged manifest."""
        return self.build.reader(self.receipt.manifest_key)

    @cached_property
    def shards(self) -> list[ShardReceipt]:
        """The shards that the manifest was assembled from."""
        return [self.run.read(ShardReceipt, key) for key in self.receipt.shards]

    @cached_property
    def manifest(self) -> Manifest:
        """The staged manifest, decoded as a reader would."""
        data = self.build.store.get_sealed(self.receipt.staged)
        return decode_manifest(data, where=self.build.store.url_of(self.receipt.manifest_key))


# The checks.


def _custom_fields(judged: Judged) -> Finding:
    """The manifest decodes strictly, says what config and receipts say, and its routing can be loaded."""
    manifest = judged.manifest
    state = load_state(judged.build.store, judged.receipt.manifest_key)
    expected = _flat(describe(judged.run, judged.shards, manifest.created_at))
    if judged.build.config.key_value is None:
        # Described before it was chosen.
        expected["custom.vector.num_probes"] = judged.receipt.num_probes
    found = _flat(manifest)
    wrong = [
        f"{field} is {found.get(field)!r}, expected {expected.get(field)!r}"
        for field in sorted({*expected, *found})
        if found.get(field) != expected.get(field)
    ]
    figures: Figures = {"fields": len(expected), "wrong": len(wrong), "strategy": state.routing.strategy}
    if judged.build.config.key_value is None:
        figures["num_probes"] = manifest.vector.num_probes
    return Finding(not wrong, "; ".join(wrong) or "all custom fields are as the config says", figures)


def _flat(manifest: Manifest) -> dict[str, Any]:
    """Fields by dotted path, without those that other checks look at: shards, and the recall."""
    fields = manifest.model_dump(mode="json", exclude={"created_at", "shards", "custom"})
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}".rstrip("."): one for key, one in inner.items()}
    for name, values in manifest.custom.items():
        flat |= {f"custom.{name}.{key}": value for key, value in values.items() if key != "recall"}
    return flat


def _coverage(judged: Judged) -> Finding:
    """Every shard has a receipt, every row is in a shard or rejected, every object is as it was sealed."""
    sampled, shards, manifest = judged.sampled, judged.shards, judged.manifest
    faults: list[str] = []
    newest = shard_receipts(judged.run, judged.run.routed)
    if [shard.digest for shard in newest] != [shard.digest for shard in shards]:
        faults.append("a shard was built again after the manifest was assembled; assemble again")
    rows = sum(shard.rows for shard in shards)
    if rows + sampled.rejected != sampled.rows_in:
        faults.append(f"{rows} rows in shards and {sampled.rejected} rejected do not make {sampled.rows_in} read")
    listed = {row.db_id: row.row_count for row in manifest.shards}
    routed = {shard.db_id: shard.rows for shard in shards if shard.rows}
    if listed != routed:
        faults.append(f"the manifest lists rows by shard {listed}, routed were {routed}")
    faults.extend(changed_objects(judged.build.store, shards))
    figures: Figures = {
        "rows_in": sampled.rows_in,
        "rejected": sampled.rejected,
        "rows": rows,
        "shards": len(shards),
        "empty_shards": sum(not shard.rows for shard in shards),
        "objects": sum(len(shard.objects) for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
    }
    message = (
        "; ".join(faults[:5]) or f"{rows} rows in {len(shards)} shards and {sampled.rejected} rejects are all rows"
    )
    table = tuple(
        {"db_id": shard.db_id, "rows": shard.rows, "bytes": shard.bytes, "attempt": shard.attempt} for shard in shards
    )
    return Finding(not faults, message, figures, table)


def _round_trip(judged: Judged) -> Finding:
    """Known rows of every shard are found again, by vector, by key and by context, with score and payload."""
    metric, k = judged.build.config.vector_spec.metric, judged.build.config.recall_gate.k
    faults: list[str] = []
    shown: list[dict[str, Any]] = []
    searched = 0
    for shard in judged.shards:
        if shard.witnesses is None:
            continue
        rows = judged.run.get_table(shard.witnesses)
        vectors, payloads = vectors_of(rows), rows.column("payload").to_pylist()
        answers = _search_home(judged, vectors, k, shard.db_id)
        for place, (row_id, answer) in enumerate(zip(rows.column("id").to_pylist(), answers, strict=True)):
            searched += 1
            fault = _witness_fault(metric, row_id, vectors[place], payloads[place], answer.results, k)
            if shard.db_id not in answer.shard_ids:
                fault = f"row {row_id!r} lies here, but its vector is routed to {answer.shard_ids}"
            if fault:
                faults.append(f"shard {shard.db_id}: {fault}")
            if place < _SHOWN_SEARCHES:
                shown.append(_shown_search(row_id, payloads[place], shard.db_id, answer.results))
        faults.extend(_key_faults(judged, rows))
    faults.extend(_context_faults(judged, k))
    figures: Figures = {"rows_searched": searched, "not_found": len(faults)}
    spread = np.unique(np.linspace(0, len(shown) - 1, min(_SHOWN_SEARCHES, len(shown))).astype(np.int64))
    table = tuple(shown[place] for place in spread)
    return Finding(not faults, "; ".join(faults[:5]) or f"{searched} rows were found again", figures, table)


def _shown_search(row_id: object, payload: str | None, db_id: int, results: list[Any]) -> dict[str, Any]:
    """One search by a row's own vector: where the row was found, and the nearest other row."""
    own = next((place for place, result in enumerate(results, start=1) if result.id == row_id), None)
    other = next((result for result in results if result.id != row_id), None)
    return {
        "row": str(row_id),
        "shard": db_id,
        "payload": _shown_payload(None if payload is None else json.loads(payload)),
        "found_at": own,
        "score": None if own is None else results[own - 1].score,
        "nearest_other": "" if other is None else str(other.id),
        "other_score": None if other is None else other.score,
        "other_payload": _shown_payload(None if other is None else other.payload),
    }


def _shown_payload(payload: dict[str, Any] | None) -> str:
    text = "" if payload is None else ", ".join(f"{name}: {value}" for name, value in payload.items())
    return text if len(text) <= _SHOWN_PAYLOAD else f"{text[: _SHOWN_PAYLOAD - 1]}…"


def _search_home(judged: Judged, vectors: Float32, k: int, db_id: int) -> list[VectorSearchResponse]:
    """Asks as few shards as the strategy allows: the one that each vector is routed to, the named one, or all."""
    reader, sharding = judged.reader, judged.build.config.sharding
    named: dict[str, Any] = {"shard_ids": [db_id]}
    if isinstance(reader, UnifiedShardedReader):
        named = {} if isinstance(sharding, HashSharding) else named
    elif isinstance(sharding, ClusterSharding | LshSharding):
        named = {"num_probes": 1}
    return reader.batch_search(vectors, top_k=k, include_vectors=True, **named)


def _key_faults(judged: Judged, rows: pa.Table) -> list[str]:
    """Keys that a reader finds by their hash alone must give their value."""
    reader = judged.reader
    if not isinstance(reader, UnifiedShardedReader) or not isinstance(judged.build.config.sharding, HashSharding):
        return []
    keys, values = rows.column(KEY_COLUMN).to_pylist(), rows.column(VALUE_COLUMN).to_pylist()
    found = reader.multi_get(keys)
    return [
        f"key {key!r} gives {'nothing' if found[key] is None else 'another value'} in place of its value"
        for key, value in zip(keys, values, strict=True)
        if found[key] != value
    ]


def _context_faults(judged: Judged, k: int) -> list[str]:
    """Sampled rows of every shard are found where their own columns, given as a context, lead: by vector and by key."""
    if not isinstance(judged.build.config.sharding, CelSharding):
        return []
    rows = _some_of_every_shard(judged.run.get_table(judged.sampled.queries))
    names = [name for name in rows.column_names if name.startswith(CONTEXT_PREFIX)]
    contexts = [
        {name.removeprefix(CONTEXT_PREFIX): value for name, value in row.items()}
        for row in rows.select(names).to_pylist()
    ]
    homes, reader = rows.column(SHARD_COLUMN).to_pylist(), judged.reader
    answers = reader.batch_search(vectors_of(rows), top_k=k, routing_context=contexts)
    faults: list[str] = []
    for row_id, home, context, answer in zip(rows.column("id").to_pylist(), homes, contexts, answers, strict=True):
        if answer.shard_ids != [home]:
            faults.append(f"row {row_id!r} lies in shard {home}, but its context {context} leads to {answer.shard_ids}")
        if isinstance(reader, UnifiedShardedReader):
            key = bytes.fromhex(row_id) if judged.run.scanned.key_type == "bytes" else row_id
            if reader.get(key, routing_context=context) is None:
                faults.append(f"key {key!r} of shard {home} gives nothing with its context {context}")
    return faults


def _some_of_every_shard(rows: pa.Table) -> pa.Table:
    """The first few sampled rows of each shard."""
    shards = rows.column(SHARD_COLUMN).to_numpy()
    order = np.argsort(shards, kind="stable")
    starts = np.searchsorted(shards[order], shards[order])
    return rows.take(pa.array(order[np.arange(len(order)) - starts < _CONTEXTS]))


def _witness_fault(
    metric: DistanceMetric, row_id: object, vector: Float32, payload: str | None, results: list[Any], wanted: int
) -> str:
    """Why the answer to a row's own vector is not as it must be; empty where it is."""
    hit = next((result for result in results if result.id == row_id and type(result.id) is type(row_id)), None)
    found = np.array([result.vector for result in results if hit is None or result is hit], dtype=np.float32)
    distances = pair_distances(np.tile(vector, (len(found), 1)), found.reshape(-1, len(vector)), metric)
    own = float(pair_distances(vector[None], vector[None], metric)[0])
    rounding = ROUNDING * abs(own)
    if hit is None:
        # Equal vectors, and under dot_product longer ones, may fill the answer; none of them is then further away.
        full = len(results) == wanted and bool((distances <= own + rounding).all())
        return "" if full else f"row {row_id!r} is not found by its own vector"
    if not np.array_equal(found[0], vector):
        return f"row {row_id!r} came back with another vector"
    score = own + metric.score_of_zero
    if not abs(hit.score - score) <= rounding:
        return f"row {row_id!r} has score {hit.score} to itself, expected {score}"
    if hit.payload != (None if payload is None else json.loads(payload)):
        return f"row {row_id!r} came back with another payload: {hit.payload!r}"
    return ""


def _recall(judged: Judged) -> Finding:
    """Recall of the judging half of the sample queries at the manifest's number of probes."""
    gate, sampled, receipt = judged.build.config.recall_gate, judged.sampled, judged.receipt
    queries, rows, table = _half(judged)
    truth = Truth.of(table, (judged.run.routed.queries or sampled.queries).rows or 0).select(rows)
    answers = judged.reader.search_arrays(vectors_of(queries), gate.k + 1, shard_of=judged.build.own_shards(queries))
    recalls = recall_per_query(answers.ids, answers.distances, id_array(queries), truth)
    found = judged_record(recalls, receipt.num_probes, census=not sampled.disjoint)
    passed = found.lower >= gate.min_recall
    figures: Figures = {
        "recall": found.recall,
        "lower_bound": found.lower,
        "percentile_5": found.percentile_5 or 0.0,
        "min_recall": gate.min_recall,
        "k": gate.k,
        "queries": found.queries,
        "num_probes": receipt.num_probes,
        "disjoint_from_training": str(sampled.disjoint),
    }
    verdict = "meets" if passed else f"is {gate.min_recall - found.lower:.4f} below"
    message = (
        f"recall@{gate.k} {found.recall:.4f} (at least {found.lower:.4f} with 95 % confidence, {found.queries} "
        f"queries, {receipt.num_probes} of {judged.build.config.shards} shards) {verdict} min_recall {gate.min_recall}"
    )
    if not passed:
        message += f"; {_what_would_pass(judged, found)}"
    recorded = _recorded(judged.manifest)
    if recorded is not None and abs(recorded.recall - found.recall) > _SAME_RECALL:
        passed = False
        message += f"; the manifest says {recorded.recall:.4f}, which its readers do not find: assemble again"
    return Finding(passed, message, figures, tuple(point.model_dump() for point in receipt.curve))


def _what_would_pass(judged: Judged, found: JudgedRecord) -> str:
    """From the measured curve: what to change so that a build of this source passes."""
    config, curve = judged.build.config, judged.receipt.curve
    least = config.recall_gate.min_recall
    better = next((point for point in curve if point.num_probes > found.num_probes and point.lower >= least), None)
    if better is not None:
        return (
            f"{better.num_probes} of {config.shards} shards would reach {better.lower:.4f}: set num_probes to auto or "
            f"{better.num_probes}, or min_recall to {_floor(found.lower)}"
        )
    best, family = max(curve, key=lambda point: point.lower), judged.run.routed.index_family
    if found.recall >= least:
        return f"its mean does: more queries narrow the bound, set recall_gate.query_rows above {2 * found.queries}"
    exact = _MORE_EXACT.get(family)
    if exact is None:
        advice = "the index is exact, so neighbours lie in other shards: use fewer, or another sharding"
    else:
        advice = f"index {family} loses neighbours: set index_type to {exact}"
    return f"all shards that may be asked reach {best.lower:.4f}; {advice}, or min_recall to {_floor(found.lower)}"


def _floor(recall: float) -> str:
    """To two digits, never above: this ``min_recall`` would pass."""
    return f"{math.floor(recall * 100) / 100:.2f}"


def _recorded(manifest: Manifest) -> JudgedRecord | None:
    """The recall as the manifest tells it."""
    extras = manifest.extras
    return extras.recall.judged if extras and extras.recall else None


def _half(judged: Judged) -> tuple[pa.Table, NDArray[np.int64], pa.Table]:
    """The judging queries, their numbers among the sample queries, and the truth table of all."""
    queries = judged.run.get_table(judged.sampled.queries)
    _, rows = halves(queries.num_rows, disjoint=judged.sampled.disjoint)
    return queries.take(pa.array(rows)), rows, judged.run.get_table(judged.receipt.truth)


def _balance(judged: Judged) -> Finding:
    """The largest shard is not too much larger than the mean."""
    rows = np.array([shard.rows for shard in judged.shards])
    limit = judged.build.config.max_shard_skew
    skew = float(rows.max() / rows.mean())
    bound = limit or _USUAL_SKEW
    figures: Figures = {
        "skew": skew,
        "limit": bound,
        "largest": int(rows.max()),
        "smallest": int(rows.min()),
        "empty": int((rows == 0).sum()),
    }
    return Finding(skew <= bound, f"largest shard is {skew:.2f}x the mean (limit {bound:g}x)", figures)


def _stock_recall(judged: Judged) -> Finding:
    """What a stock reader would find: default index parameters, its probe order, its raw scores."""
    gate, receipt = judged.build.config.recall_gate, judged.receipt
    queries, rows, truth = _half(judged)
    queries, rows = queries.slice(0, _STOCK_QUERIES), rows[:_STOCK_QUERIES]
    answers = judged.reader.stock_style(
        vectors_of(queries), gate.k + 1, receipt.num_probes, shard_of=judged.build.own_shards(queries)
    )
    estimate = RecallEstimate.of(recall_by_id(answers.ids, rows, truth))
    figures: Figures = {
        "recall": estimate.mean,
        "lower_bound": estimate.lower,
        "min_recall": gate.min_recall,
        "queries": estimate.queries,
        "num_probes": receipt.num_probes,
    }
    message = f"a stock reader's recall@{gate.k} is {estimate.mean:.4f} (at least {estimate.lower:.4f})"
    return Finding(estimate.lower >= gate.min_recall, message, figures)


Check = Callable[[Judged], Finding]
RUNNERS: dict[str, Check] = {
    "manifest_custom_fields": _custom_fields,
    "shard_coverage": _coverage,
    "search_round_trip": _round_trip,
    "recall": _recall,
    "shard_balance": _balance,
    "stock_recall": _stock_recall,
}
