"""The gate: checks on a staged manifest, through the reader that will serve it, and the verdicts that promote needs."""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field, ValidationError

from sf_pipelines.snapshot.errors import (
    ConfigError,
    GateFailedError,
    GateMissingError,
    IntegrityError,
)
from sf_pipelines.snapshot.gate.checks import RUNNERS as CORE_RUNNERS
from sf_pipelines.snapshot.gate.checks import Check, Figures, Finding, Judged
from sf_pipelines.snapshot.gate.drift import drift
from sf_pipelines.snapshot.gate.per_shard import recall_spread, rows_reachable
from sf_pipelines.snapshot.manifest.models import Manifest
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.model import Model
from sf_pipelines.snapshot.run.build import Build, Run
from sf_pipelines.snapshot.run.ledger import STAGING, changed_objects
from sf_pipelines.snapshot.run.receipts import (
    ManifestReceipt,
    ShardReceipt,
)
from sf_pipelines.snapshot.store import Ref, Store

Severity = Literal["ERROR", "WARN"]


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


RUNNERS: dict[str, Check] = {
    **CORE_RUNNERS,
    "recall_spread": recall_spread,
    "rows_reachable": rows_reachable,
    "drift": drift,
}
CHECKS: tuple[str, ...] = tuple(RUNNERS)
_ALWAYS_REQUIRED = CHECKS[:4]
# What other centroids or hyperplanes may pass.
_ABOUT_ROUTING = frozenset({"recall", "shard_balance"})


def required_checks(build: Build) -> tuple[str, ...]:
    """The checks that must pass: the first four, and those others that the config limits or names."""
    config = build.config
    balance = ["shard_balance"] if config.max_shard_skew else []
    return (
        *_ALWAYS_REQUIRED,
        *balance,
        *config.recall_gate.blocking,
        *(["drift"] if config.drift and config.drift.blocking else []),
    )


def _run_check(run: Run, name: str) -> Verdict:
    """Runs one check on the newest staged manifest of a run and stores the verdict."""
    if name not in RUNNERS:
        raise ConfigError(f"check {name!r} does not exist; use one of {', '.join(CHECKS)}")
    build, run_id, receipt = run.build, run.run_id, run.manifest
    if run.scanned.published:
        # A snapshot that is held back is not judged anew, whatever the gate is now: it goes nowhere.
        earlier = latest_verdict(build, receipt, name, any_gate=run.scanned.held)
        if earlier is not None:
            return earlier.model_copy(update={"reason": f"run {run_id} is published; it was judged before"})
    try:
        finding = RUNNERS[name](Judged(run, receipt))
    except IntegrityError as error:
        # What is stored is not what was recorded: that is an answer to the question that the check asks.
        finding = Finding(False, str(error), {"error": error.kind})
    required, message = name in required_checks(build), finding.message
    if required and not finding.passed:
        message = f"{message}. {what_serves(build)}"
    verdict = Verdict(
        name=name,
        run_id=run_id,
        manifest_digest=receipt.manifest_digest,
        gate_key=build.config.gate_key(),
        severity="ERROR" if required else "WARN",
        passed=finding.passed,
        message=message,
        figures=finding.figures,
        table=finding.table,
    )
    key = f"{_folder(receipt, name)}/{verdict.judged_at:%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:8]}.json"
    build.store.put(key, verdict.model_dump_json(exclude={"reason"}).encode(), content_type="application/json")
    if name in _ABOUT_ROUTING and verdict.severity == "ERROR" and not verdict.passed and "error" not in verdict.figures:
        _note_outworn(run, verdict)
    return verdict


@dataclass(frozen=True)
class RecallFigures:
    """The recall of a snapshot: of the queries that judged it, which is what its gate was passed by.

    Attributes:
        k: neighbours asked for.
        min_recall: what the lower bound had to reach.
        num_probes: shards asked by default.
        recall: mean recall@k.
        lower: its lower confidence bound (one-sided, 95 %).
        percentile_5: recall that 95 % of the queries reach; None in snapshots from before it was recorded.
        queries: how many there were.
    """

    k: int
    min_recall: float
    num_probes: int
    recall: float
    lower: float
    percentile_5: float | None
    queries: int


def judged_recall(store: Store, manifest: Manifest, manifest_digest: str) -> RecallFigures | None:
    """The recall that a published snapshot was judged by; any snapshot, also one that is not current any more.

    The manifest says it. Of snapshots that were published before it did, the verdict of their gate does, as long as
    the run's ``staging/`` is there.
    """
    recall = manifest.extras.recall if manifest.extras else None
    if recall is None:
        return None
    if recall.judged is not None:
        return RecallFigures(k=recall.k, min_recall=recall.min_recall, **recall.judged.model_dump())
    verdict = _newest(store, f"{STAGING}/run_id={manifest.run_id}/verdicts/{manifest_digest}/recall")
    if verdict is None or "recall" not in verdict.figures:
        return None
    return RecallFigures(
        k=recall.k,
        min_recall=recall.min_recall,
        num_probes=int(verdict.figures["num_probes"]),
        recall=float(verdict.figures["recall"]),
        lower=float(verdict.figures["lower_bound"]),
        percentile_5=None,
        queries=int(verdict.figures["queries"]),
    )


def latest_verdict(build: Build, receipt: ManifestReceipt, name: str, *, any_gate: bool = False) -> Verdict | None:
    """The newest verdict of a check on exactly this manifest and, unless ``any_gate``, this gate."""
    verdict = _newest(build.store, _folder(receipt, name))
    if verdict is None or verdict.manifest_digest != receipt.manifest_digest:
        return None
    return verdict if any_gate or verdict.gate_key == build.config.gate_key() else None


def _newest(store: Store, folder: str) -> Verdict | None:
    keys = sorted(info.key for info in store.objects(folder))
    if not keys:
        return None
    try:
        return Verdict.model_validate_json(store.get(keys[-1]))
    except ValidationError as error:
        raise IntegrityError(f"verdict {store.url_of(keys[-1])} cannot be understood: {error}") from error


def outworn_key(ref: Ref) -> str:
    """Key of the note that a snapshot which kept this artifact has failed its gate."""
    return f"{STAGING}/outworn/{ref.sha256}.json"


def is_outworn(build: Build, ref: Ref) -> bool:
    """Whether a snapshot that kept this artifact has failed its gate, whatever the source was then."""
    return build.store.exists(outworn_key(ref))


def _note_outworn(run: Run, verdict: Verdict) -> None:
    """Leaves a note where a snapshot fails with a routing artifact that it kept: it is not kept again."""
    trained = run.trained
    if trained is not None and trained.kept:
        note = verdict.model_dump_json(include={"name", "run_id", "message", "judged_at"}).encode()
        run.store.create(outworn_key(trained.ref), note, content_type="application/json")


def require_passed(build: Build, run_id: str, receipt: ManifestReceipt) -> None:
    """Asks the store whether every required check has passed on this manifest."""
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
        raise GateFailedError(f"run {run_id} is not published. {' '.join(failed)}")


def what_serves(build: Build) -> str:
    """One sentence for whoever reads that a gate has failed: what readers get now."""
    pointer = read_pointer(build.store).pointer
    return "Nothing is published yet." if pointer is None else f"Run {pointer.run_id} keeps serving."


def require_whole(run: Run, receipt: ManifestReceipt) -> None:
    """Asks the store whether everything that the manifest names is still what the checks have seen.

    Between the gate and this call may lie days.
    """
    store = run.store
    faults = changed_objects(store, [run.read(ShardReceipt, key) for key in receipt.shards])
    routing = run.trained.ref if run.trained else None
    if routing and not store.is_whole(routing):
        faults.append(f"{store.url_of(routing.key)} is missing or was changed")
    if faults:
        raise IntegrityError(f"run {run.run_id} is not published: {'; '.join(faults[:5])}; build again")


def _folder(receipt: ManifestReceipt, name: str) -> str:
    return f"{STAGING}/run_id={receipt.run_id}/verdicts/{receipt.manifest_digest}/{name}"


def check(build: Build, run_id: str, name: str) -> Verdict:
    """Runs one check on the run's staged manifest and stores its verdict.

    A manifest that is published already was judged before; its verdict is re-emitted.
    """
    run = build.run(run_id)
    with build.working(run.scanned):
        return _run_check(run, name)


def gate(build: Build, run_id: str) -> list[Verdict]:
    """All checks, in order."""
    verdicts: list[Verdict] = []
    for number, name in enumerate(CHECKS):
        verdicts.append(check(build, run_id, name))
        build.report("gate", number + 1, len(CHECKS), "checks")
    return verdicts
