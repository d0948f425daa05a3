"""The checks of the gate: each looks at a staged manifest through the reader that will serve it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.assembly import shard_receipts
from sf_pipelines.snapshot.build import Build
from sf_pipelines.snapshot.errors import DigestMismatchError
from sf_pipelines.snapshot.evaluation import RecallEstimate, Truth, halves, id_array, recall_by_id, recall_per_query
from sf_pipelines.snapshot.ledger import Ledger
from sf_pipelines.snapshot.manifest.codec import decode_manifest
from sf_pipelines.snapshot.manifest.models import Manifest
from sf_pipelines.snapshot.metric import Float32, pair_distances
from sf_pipelines.snapshot.reader.state import load_state
from sf_pipelines.snapshot.reader.sync import ShardedVectorReader
from sf_pipelines.snapshot.reader.types import VectorSearchResponse
from sf_pipelines.snapshot.reader.unified import UnifiedShardedReader
from sf_pipelines.snapshot.receipts import ManifestReceipt, RouteReceipt, SampleReceipt, ShardReceipt
from sf_pipelines.snapshot.routed import vectors_of
from sf_pipelines.snapshot.routing import needs_training
from sf_pipelines.snapshot.sealing import changed_objects
from sf_pipelines.snapshot.sharding import CelSharding, ClusterSharding, HashSharding, LshSharding
from sf_pipelines.snapshot.source.contract import CONTEXT_PREFIX, SHARD_COLUMN
from sf_pipelines.snapshot.source.keys import KEY_COLUMN, VALUE_COLUMN
from sf_pipelines.snapshot.store import Store

Figures = dict[str, float | int | str]

# Beyond this, an unlimited skew is worth a warning.
_USUAL_SKEW = 4.0
# Queries of the stock-style figure: enough to see a wrong metric or a bad default, cheap enough to always measure.
_STOCK_QUERIES = 100
# Sampled rows whose context is tried.
_CONTEXTS = 16


@dataclass(frozen=True)
class Finding:
    """Outcome of a check before it is stored."""

    passed: bool
    message: str
    figures: Figures
    table: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Judged:
    """The manifest that is judged and the receipts that it was made from."""

    build: Build
    ledger: Ledger
    receipt: ManifestReceipt

    @property
    def sampled(self) -> SampleReceipt:
        """The build's samples."""
        return self.ledger.need(SampleReceipt)

    @property
    def reader(self) -> ShardedVectorReader | UnifiedShardedReader:
        """A reader of the staged manifest."""
        return self.build.reader(self.receipt.manifest_key)

    @property
    def shards(self) -> list[ShardReceipt]:
        """The shards that the manifest was assembled from."""
        return [self.ledger.read(ShardReceipt, key) for key in self.receipt.shards]

    def manifest(self) -> Manifest:
        """The staged manifest, decoded as a reader would."""
        data = staged_manifest(self.build.store, self.receipt)
        return decode_manifest(data, where=self.build.store.url_of(self.receipt.manifest_key))


def staged_manifest(store: Store, receipt: ManifestReceipt) -> bytes:
    """The staged bytes.

    Raises:
        DigestMismatchError: they are not the ones that were assembled.
    """
    data = store.get(receipt.manifest_key)
    found = hashlib.sha256(data).hexdigest()
    if found != receipt.manifest_digest:
        where = store.url_of(receipt.manifest_key)
        raise DigestMismatchError(f"{where} has SHA-256 {found}, but {receipt.manifest_digest} was assembled")
    return data


# The checks.


def _custom_fields(judged: Judged) -> Finding:
    """The manifest decodes strictly, its fields agree with the config, and its routing can be loaded."""
    manifest, config = judged.manifest(), judged.build.config
    state = load_state(judged.build.store, judged.receipt.manifest_key)
    vector, extras, spec = manifest.vector, manifest.extras, config.vector_spec
    expected: dict[str, tuple[object, object]] = {
        "run_id": (manifest.run_id, judged.receipt.run_id),
        "num_dbs": (manifest.num_dbs, config.num_dbs),
        "s3_prefix": (manifest.s3_prefix, judged.build.store.url),
        "custom.vector.dim": (vector.dim, spec.dim),
        "custom.vector.metric": (vector.metric, spec.metric),
        "custom.vector.quantization": (vector.quantization, spec.quantization),
        "custom.vector.unified": (vector.unified, config.key_value is not None),
        "custom.sf_pipelines.gate_key": (extras.gate_key if extras else None, judged.receipt.gate_key),
        "custom.sf_pipelines.backend": (extras.backend if extras else None, spec.backend),
        "custom.sf_pipelines.vector_type": (extras.vector_type if extras else None, spec.vector_type),
    }
    if config.key_value is None:
        probed = needs_training(config.sharding)
        expected |= {
            "custom.vector.num_probes": (vector.num_probes, judged.receipt.num_probes if probed else 1),
            "custom.vector.sharding_strategy": (vector.sharding_strategy, config.sharding.strategy),
            "custom.vector.total_vectors": (vector.total_vectors, judged.receipt.rows),
        }
    else:
        expected |= {
            "custom.vector.backend": (vector.backend, spec.backend),
            "key_col": (manifest.key_col, config.key_value.key_col),
            "sharding.strategy": (manifest.sharding.strategy, config.sharding.strategy),
        }
    wrong = [
        f"{field} is {found!r}, expected {right!r}" for field, (found, right) in expected.items() if found != right
    ]
    figures: Figures = {"fields": len(expected), "wrong": len(wrong), "strategy": state.routing.strategy}
    if config.key_value is None:
        figures["num_probes"] = vector.num_probes
    return Finding(not wrong, "; ".join(wrong) or "all custom fields are as the config says", figures)


def _coverage(judged: Judged) -> Finding:
    """Every shard has a receipt, every row is in a shard or rejected, every object is as it was sealed."""
    sampled, shards, manifest = judged.sampled, judged.shards, judged.manifest()
    faults: list[str] = []
    newest = shard_receipts(judged.ledger, judged.ledger.need(RouteReceipt))
    if [shard.digest for shard in newest] != [shard.digest for shard in shards]:
        faults.append("a shard was built again after the manifest was assembled; assemble again")
    rows = sum(shard.rows for shard in shards)
    if rows + sampled.rejected != sampled.rows_in:
        faults.append(f"{rows} rows in shards and {sampled.rejected} rejected do not make {sampled.rows_in} read")
    listed = {row.db_id: row.row_count for row in manifest.shards}
    routed = {shard.db_id: shard.rows for shard in shards if shard.rows}
    if listed != routed:
        faults.append(f"the manifest lists rows by shard {listed}, routed were {routed}")
    for shard in shards:
        faults.extend(changed_objects(judged.build.store, shard))
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
    searched = 0
    for shard in judged.shards:
        if shard.witnesses is None:
            continue
        rows = judged.ledger.get_table(shard.witnesses)
        vectors, payloads = vectors_of(rows), rows.column("payload").to_pylist()
        own = pair_distances(vectors, vectors, metric)
        answers = _search_home(judged, vectors, k, shard.db_id)
        for place, (row_id, answer) in enumerate(zip(rows.column("id").to_pylist(), answers, strict=True)):
            searched += 1
            fault = _witness_fault(row_id, payloads[place], float(own[place]), answer.results, k, shard.db_id)
            if shard.db_id not in answer.shard_ids:
                fault = f"row {row_id!r} lies in shard {shard.db_id}, but its vector is routed to {answer.shard_ids}"
            if fault:
                faults.append(fault)
        faults.extend(_key_faults(judged, rows))
    faults.extend(_context_faults(judged, k))
    figures: Figures = {"rows_searched": searched, "not_found": len(faults)}
    return Finding(not faults, "; ".join(faults[:5]) or f"{searched} rows were found again", figures)


def _search_home(judged: Judged, vectors: Float32, k: int, db_id: int) -> list[VectorSearchResponse]:
    """Asks as few shards as the strategy allows: the one that each vector is routed to, the named one, or all."""
    reader, sharding = judged.reader, judged.build.config.sharding
    if isinstance(reader, UnifiedShardedReader):
        return reader.batch_search(vectors, top_k=k, shard_ids=None if isinstance(sharding, HashSharding) else [db_id])
    if isinstance(sharding, ClusterSharding | LshSharding):
        return reader.batch_search(vectors, top_k=k, num_probes=1)
    return reader.batch_search(vectors, top_k=k, shard_ids=[db_id])


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
    """Sampled rows must be found where their own columns, given as a query's context, lead."""
    if not isinstance(judged.build.config.sharding, CelSharding):
        return []
    rows = judged.ledger.get_table(judged.sampled.queries).slice(0, _CONTEXTS)
    names = [name for name in rows.column_names if name.startswith(CONTEXT_PREFIX)]
    contexts = [
        {name.removeprefix(CONTEXT_PREFIX): value for name, value in row.items()}
        for row in rows.select(names).to_pylist()
    ]
    homes = rows.column(SHARD_COLUMN).to_pylist()
    answers = judged.reader.batch_search(vectors_of(rows), top_k=k, routing_context=contexts)
    return [
        f"row {row_id!r} lies in shard {home}, but its context {context} leads to {answer.shard_ids}"
        for row_id, home, context, answer in zip(rows.column("id").to_pylist(), homes, contexts, answers, strict=True)
        if answer.shard_ids != [home]
    ]


def _witness_fault(row_id: object, payload: str | None, own: float, results: list[Any], wanted: int, db_id: int) -> str:
    hit = next((result for result in results if result.id == row_id and type(result.id) is type(row_id)), None)
    # Equal vectors, and under dot_product longer ones, may fill the answer; none of them is then further away.
    if hit is None and len(results) == wanted and all(result.score <= own + 1e-9 for result in results):
        return ""
    if hit is None:
        return f"row {row_id!r} of shard {db_id} is not found by its own vector"
    if abs(hit.score - own) > 1e-6 * max(1.0, abs(own)):
        return f"row {row_id!r} has score {hit.score} to itself, expected {own}"
    if hit.payload != (None if payload is None else json.loads(payload)):
        return f"row {row_id!r} came back with another payload: {hit.payload!r}"
    return ""


def _recall(judged: Judged) -> Finding:
    """Recall of the judging half of the sample queries at the manifest's number of probes."""
    gate, sampled, receipt = judged.build.config.recall_gate, judged.sampled, judged.receipt
    queries, rows, table = _half(judged)
    truth = Truth.of(table, sampled.query_rows).select(rows)
    answers = judged.reader.search_arrays(
        vectors_of(queries),
        gate.k + 1,
        num_probes=receipt.num_probes if needs_training(judged.build.config.sharding) else None,
        homes=judged.build.homes(queries),
    )
    estimate = RecallEstimate.of(
        recall_per_query(answers.ids, answers.scores, id_array(queries), truth), census=not sampled.disjoint
    )
    passed = estimate.lower >= gate.min_recall
    figures: Figures = {
        "recall": estimate.mean,
        "lower_bound": estimate.lower,
        "min_recall": gate.min_recall,
        "k": gate.k,
        "queries": estimate.queries,
        "num_probes": receipt.num_probes,
        "disjoint_from_training": str(sampled.disjoint),
    }
    verb = "meets" if passed else "is below"
    message = (
        f"recall@{gate.k} {estimate.mean:.4f} (at least {estimate.lower:.4f} with 95 % confidence, {estimate.queries} "
        f"queries, {receipt.num_probes} of {judged.build.config.num_dbs} shards) {verb} min_recall {gate.min_recall}"
    )
    return Finding(passed, message, figures, tuple(point.model_dump() for point in receipt.curve))


def _half(judged: Judged) -> tuple[pa.Table, NDArray[np.int64], pa.Table]:
    """The judging queries, their numbers among the sample queries, and the truth table of all."""
    queries = judged.ledger.get_table(judged.sampled.queries)
    _, rows = halves(queries.num_rows, disjoint=judged.sampled.disjoint)
    return queries.take(pa.array(rows)), rows, judged.ledger.get_table(judged.receipt.truth)


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
    word = "within" if skew <= bound else "above"
    return Finding(skew <= bound, f"the largest shard is {skew:.2f} times the mean, {word} {bound:g}", figures)


def _stock_recall(judged: Judged) -> Finding:
    """What a stock reader would find: default index parameters, its probe order, its raw scores."""
    gate, receipt = judged.build.config.recall_gate, judged.receipt
    queries, rows, truth = _half(judged)
    queries, rows = queries.slice(0, _STOCK_QUERIES), rows[:_STOCK_QUERIES]
    answers = judged.reader.stock_style(
        vectors_of(queries), gate.k + 1, receipt.num_probes, homes=judged.build.homes(queries)
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
