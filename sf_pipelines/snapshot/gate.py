"""The gate: checks on a staged manifest, through the reader that will serve it, and the verdicts that promote needs."""

import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from sf_pipelines.snapshot.assembly import shard_receipts
from sf_pipelines.snapshot.build import Build
from sf_pipelines.snapshot.errors import (
    ConfigError,
    DigestMismatchError,
    GateFailedError,
    GateMissingError,
    IntegrityError,
)
from sf_pipelines.snapshot.evaluation import RecallEstimate, Truth, halves, id_array, recall_by_id, recall_per_query
from sf_pipelines.snapshot.manifest.codec import decode_manifest
from sf_pipelines.snapshot.manifest.models import Manifest
from sf_pipelines.snapshot.metric import pair_distances
from sf_pipelines.snapshot.model import Model
from sf_pipelines.snapshot.reader.state import load_state
from sf_pipelines.snapshot.receipts import (
    STAGING,
    Ledger,
    ManifestReceipt,
    PromoteReceipt,
    RouteReceipt,
    SampleReceipt,
    ShardReceipt,
    TrainReceipt,
)
from sf_pipelines.snapshot.routed import vectors_of
from sf_pipelines.snapshot.sealing import changed_objects
from sf_pipelines.snapshot.store import Store

Severity = Literal["ERROR", "WARN"]
Figures = dict[str, float | int | str]

# Beyond this, an unlimited skew is worth a warning.
_USUAL_SKEW = 4.0
# Queries of the stock-style figure: enough to see a wrong metric or a bad default, cheap enough to always measure.
_STOCK_QUERIES = 100


class Verdict(Model):
    """What one check found on one manifest.

    Attributes:
        name: of the check.
        run_id: build.
        manifest_digest: SHA-256 of the manifest's bytes.
        gate_key: gate that it was judged by.
        passed: whether all is well.
        severity: ``ERROR`` keeps the snapshot from being published, ``WARN`` does not.
        message: one line for people.
        figures: what was measured.
        table: rows for people.
        judged_at: when, UTC.
        reason: why the check was not run this time; never stored.
    """

    name: str
    run_id: str
    manifest_digest: str
    gate_key: str
    passed: bool
    severity: Severity
    message: str
    figures: Figures = Field(default_factory=dict)
    table: tuple[dict[str, Any], ...] = ()
    judged_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    reason: str = ""


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
    """The manifest decodes strictly, its fields agree with the config, and its routing artifact loads."""
    manifest, config = judged.manifest(), judged.build.config
    state = load_state(judged.build.store, judged.receipt.manifest_key)
    vector, extras = manifest.vector, manifest.extras
    expected = {
        "run_id": (manifest.run_id, judged.receipt.run_id),
        "num_dbs": (manifest.num_dbs, config.num_dbs),
        "s3_prefix": (manifest.s3_prefix, judged.build.store.url),
        "custom.vector.dim": (vector.dim, config.vector_spec.dim),
        "custom.vector.metric": (vector.metric, config.vector_spec.metric),
        "custom.vector.num_probes": (vector.num_probes, judged.receipt.num_probes),
        "custom.vector.sharding_strategy": (vector.sharding_strategy, config.vector_spec.sharding.strategy),
        "custom.vector.total_vectors": (vector.total_vectors, judged.receipt.rows),
        "custom.sf_pipelines.gate_key": (extras.gate_key if extras else None, judged.receipt.gate_key),
    }
    wrong = [
        f"{field} is {found!r}, expected {right!r}" for field, (found, right) in expected.items() if found != right
    ]
    figures: Figures = {"fields": len(expected), "wrong": len(wrong), "num_probes": vector.num_probes}
    figures["centroids"] = state.routing.num_dbs if state.routing else 0
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
    """Known rows of every shard are found again: by their own vector, in one probe, with score and payload."""
    reader = judged.build.reader(judged.receipt.manifest_key)
    metric, k = judged.build.config.vector_spec.metric, judged.build.config.recall_gate.k
    faults: list[str] = []
    searched = 0
    for shard in judged.shards:
        if shard.witnesses is None:
            continue
        rows = judged.ledger.get_table(shard.witnesses)
        vectors, payloads = vectors_of(rows), rows.column("payload").to_pylist()
        own = pair_distances(vectors, vectors, metric)
        answers = reader.batch_search(vectors, top_k=k, num_probes=1)
        for place, (row_id, answer) in enumerate(zip(rows.column("id").to_pylist(), answers, strict=True)):
            searched += 1
            fault = _witness_fault(row_id, payloads[place], float(own[place]), answer.results, k, shard.db_id)
            if answer.shard_ids != [shard.db_id]:
                fault = f"row {row_id!r} lies in shard {shard.db_id}, but its vector is routed to {answer.shard_ids}"
            if fault:
                faults.append(fault)
    figures: Figures = {"rows_searched": searched, "not_found": len(faults)}
    return Finding(not faults, "; ".join(faults[:5]) or f"{searched} rows were found again", figures)


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
    reader = judged.build.reader(receipt.manifest_key)
    answers = reader.search_arrays(vectors_of(queries), gate.k + 1, num_probes=receipt.num_probes)
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
    reader = judged.build.reader(receipt.manifest_key)
    answers = reader.stock_style(vectors_of(queries), gate.k + 1, receipt.num_probes)
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


_Check = Callable[[Judged], Finding]
_RUNNERS: dict[str, _Check] = {
    "manifest_custom_fields": _custom_fields,
    "shard_coverage": _coverage,
    "search_round_trip": _round_trip,
    "recall": _recall,
    "shard_balance": _balance,
    "stock_recall": _stock_recall,
}
CHECKS: tuple[str, ...] = tuple(_RUNNERS)
_ALWAYS_REQUIRED = CHECKS[:4]


def required_checks(build: Build) -> tuple[str, ...]:
    """The checks that must pass: the first four, and the balance where ``max_shard_skew`` is set."""
    return (*_ALWAYS_REQUIRED, *(["shard_balance"] if build.config.max_shard_skew else []))


def run_check(build: Build, run_id: str, name: str) -> Verdict:
    """Runs one check on the newest staged manifest of a run and stores the verdict; see ``stages.check``."""
    if name not in _RUNNERS:
        raise ConfigError(f"check {name!r} does not exist; use one of {', '.join(CHECKS)}")
    ledger = build.ledger(run_id)
    receipt = ledger.need(ManifestReceipt)
    if ledger.find(PromoteReceipt) is not None:
        earlier = latest_verdict(build, receipt, name)
        if earlier is not None:
            return earlier.model_copy(update={"reason": f"run {run_id} is published; it was judged before"})
    try:
        finding = _RUNNERS[name](Judged(build, ledger, receipt))
    except IntegrityError as error:
        # What is stored is not what was recorded: that is an answer to the question that the check asks.
        finding = Finding(False, str(error), {"error": error.kind})
    verdict = Verdict(
        name=name,
        run_id=run_id,
        manifest_digest=receipt.manifest_digest,
        gate_key=build.config.gate_key(),
        severity="ERROR" if name in required_checks(build) else "WARN",
        passed=finding.passed,
        message=finding.message,
        figures=finding.figures,
        table=finding.table,
    )
    key = f"{_folder(receipt, name)}/{verdict.judged_at:%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:8]}.json"
    build.store.put(key, verdict.model_dump_json(exclude={"reason"}).encode(), content_type="application/json")
    return verdict


def latest_verdict(build: Build, receipt: ManifestReceipt, name: str) -> Verdict | None:
    """The newest verdict of a check on exactly this manifest and gate.

    Raises:
        IntegrityError: it cannot be understood.
    """
    keys = sorted(info.key for info in build.store.objects(_folder(receipt, name)))
    if not keys:
        return None
    try:
        verdict = Verdict.model_validate_json(build.store.get(keys[-1]))
    except ValidationError as error:
        raise IntegrityError(f"verdict {build.store.url_of(keys[-1])} cannot be understood: {error}") from error
    same = (verdict.manifest_digest, verdict.gate_key) == (receipt.manifest_digest, build.config.gate_key())
    return verdict if same else None


def require_passed(build: Build, run_id: str, receipt: ManifestReceipt) -> None:
    """Asks the store whether every required check has passed on this manifest.

    Raises:
        GateMissingError: one has no verdict.
        GateFailedError: one has failed.
    """
    failed: list[str] = []
    for name in required_checks(build):
        verdict = latest_verdict(build, receipt, name)
        if verdict is None:
            raise GateMissingError(
                f"run {run_id} may not be published: check {name} has no verdict on manifest "
                f"{receipt.manifest_digest[:16]} under this gate; run the checks"
            )
        if not verdict.passed:
            failed.append(f"{name}: {verdict.message}")
    if failed:
        raise GateFailedError(f"run {run_id} may not be published. {'; '.join(failed)}")


def require_whole(build: Build, run_id: str, receipt: ManifestReceipt) -> None:
    """Asks the store whether everything that the manifest names is still what the checks have seen.

    Between the gate and this call may lie days.

    Raises:
        IntegrityError: naming the objects that are gone or changed.
    """
    ledger = build.ledger(run_id)
    faults: list[str] = []
    for key in receipt.shards:
        faults.extend(changed_objects(build.store, ledger.read(ShardReceipt, key)))
    routing = ledger.need(TrainReceipt).ref
    if not build.store.exists(routing.key) or build.store.sha256(routing.key) != routing.sha256:
        faults.append(f"{build.store.url_of(routing.key)} is missing or was changed")
    if faults:
        raise IntegrityError(f"run {run_id} is not published: {'; '.join(faults[:5])}; build again")


def _folder(receipt: ManifestReceipt, name: str) -> str:
    return f"{STAGING}/run_id={receipt.run_id}/verdicts/{receipt.manifest_digest}/{name}"
