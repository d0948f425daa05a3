"""Centroids and hyperplanes: trained anew, or kept from the current snapshot."""

import io
import uuid
from dataclasses import dataclass

import numpy as np

from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.config import BUILD_VERSION, WriteConfig, digest_json
from sf_pipelines.snapshot.errors import ConfigError, IntegrityError, ObjectMissingError
from sf_pipelines.snapshot.gate.verdicts import is_outworn
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.routing import Fit, fit_of, needs_training
from sf_pipelines.snapshot.routing import train as train_routing
from sf_pipelines.snapshot.run.build import Build, Stopwatch
from sf_pipelines.snapshot.run.receipts import ScanReceipt, TrainReceipt, inputs_of
from sf_pipelines.snapshot.store import Ref

# Fit is measured on samples, so it varies by some percent between equal ones. From a tenth on, centroids that are
# trained anew are noticeably better; a fullest shard that grows by a quarter is noticeably slower.
_SPREAD = 1.10
_BALANCE = 1.25
# A spread that is only rounding.
_NOTHING = 1e-6


def train(build: Build, run_id: str) -> TrainReceipt:
    """Trains centroids or hyperplanes, or keeps those of the current snapshot."""
    config = build.config
    if not needs_training(config.sharding):
        raise ConfigError(f"snapshot {config.name!r} is sharded by {config.sharding.strategy}, which trains nothing")
    run = build.run(run_id)
    scanned, sampled = run.scanned, run.sampled
    inputs = inputs_of(build_key=scanned.build_key, training=sampled.training.sha256)
    found, number = run.seek_whole(TrainReceipt, inputs=inputs, published=scanned.published)
    # What was kept and failed the gate is trained anew; what was trained on this sample would come out the same.
    may_go = not scanned.published and config.retrain == "auto"
    if found is not None and not (found.kept and may_go and is_outworn(build, found.ref)):
        run.take(found)
        what = "kept" if found.kept else "trained"
        return found.model_copy(update={"reason": f"these {found.artifact} were {what} before"})
    vectors = vectors_of(run.get_table(sampled.training))
    with build.working(scanned):
        return run.commit(_train_or_keep(build, scanned, vectors, inputs), number=number)


@dataclass(frozen=True)
class _Found:
    """What the current snapshot has, and how it fits.

    Attributes:
        receipt: of its training.
        data: the matrix as stored.
        drift: how badly it fits the new sample, as a part of what is still good enough.
        fault: why it is not kept; empty where it may be.
    """

    receipt: TrainReceipt | None
    data: bytes
    drift: float | None
    fault: str


def _train_or_keep(build: Build, scanned: ScanReceipt, vectors: Float32, inputs: str) -> TrainReceipt:
    """Stores the routing artifact of a run, trained anew or copied from the current snapshot."""
    watch, run_id = Stopwatch(), scanned.run_id
    found = _current(build, scanned, vectors)
    if found.receipt is not None and not found.fault:
        old = found.receipt
        ref = _stored(build, run_id, old.artifact, found.data)
        changes = {"run_id": run_id, "inputs": inputs, "ref": ref, "kept": True, "drift": found.drift}
        return old.renewed(**changes, retrained="", seconds=watch.seconds)
    config = build.config
    trained = train_routing(config.sharding, vectors, num_dbs=config.shards, metric=config.vector_spec.metric)
    file = io.BytesIO()
    np.save(file, trained.matrix, allow_pickle=False)
    (rows, columns), fit = trained.matrix.shape, _fit(config, trained.matrix, vectors)
    return TrainReceipt(
        run_id=run_id,
        inputs=inputs,
        artifact=trained.kind,
        ref=_stored(build, run_id, trained.kind, file.getvalue()),
        shape=(rows, columns),
        figures=trained.figures | {"balance": fit.balance} | ({} if fit.spread is None else {"spread": fit.spread}),
        recipe=_recipe(config),
        drift=found.drift,
        retrained=found.fault,
        seconds=watch.seconds,
    )


def _current(build: Build, scanned: ScanReceipt, vectors: Float32) -> _Found:
    base = scanned.base_run_id
    receipt = None if base is None else build.ledger(base).find(TrainReceipt)
    if receipt is None:
        return _Found(None, b"", None, "")
    if fault := _why_not_looked_at(build.config, scanned, receipt):
        return _Found(receipt, b"", None, fault)
    try:
        data = build.store.get_sealed(receipt.ref)
    except (IntegrityError, ObjectMissingError) as error:
        return _Found(receipt, b"", None, f"that of {base} cannot be read: {error}")
    drift = _drift(receipt.figures, _fit(build.config, np.load(io.BytesIO(data), allow_pickle=False), vectors))
    fault = ""
    if build.config.retrain == "auto" and is_outworn(build, receipt.ref):
        fault = f"a snapshot that kept that of {base} failed its gate"
    elif build.config.retrain == "auto" and drift > 1:
        fault = f"the data has drifted from that of {base} (drift {drift:.2f}, up to 1 it is kept)"
    return _Found(receipt, data, drift, fault)


def _why_not_looked_at(config: WriteConfig, scanned: ScanReceipt, receipt: TrainReceipt) -> str:
    """Why what was trained before is not even looked at."""
    if scanned.forced:
        return "asked for by force"
    if config.retrain == "always":
        return "asked for by retrain: always"
    same = receipt.recipe == _recipe(config)
    return "" if same else f"that of {scanned.base_run_id} was trained for another configuration"


def _drift(then: dict[str, float | int], now: Fit) -> float:
    """The fit as a part of what is still good enough: above 1 it is not."""
    balance = now.balance / (_BALANCE * then["balance"])
    if now.spread is None:
        return balance
    # Where all vectors were equal, any other is far away.
    spread = now.spread / max(_SPREAD * then["spread"], _NOTHING)
    return max(balance, spread)


def _fit(config: WriteConfig, matrix: Float32, vectors: Float32) -> Fit:
    return fit_of(config.sharding, matrix, vectors, num_dbs=config.shards, metric=config.vector_spec.metric)


def _recipe(config: WriteConfig) -> str:
    """Digest of what centroids and hyperplanes depend on beside the vectors; on those, ``drift`` keeps an eye."""
    spec = config.vector_spec
    sharding = config.sharding.model_dump(mode="json", exclude={"num_probes"})
    return digest_json(
        {
            "build_version": BUILD_VERSION,
            "sharding": sharding,
            "num_dbs": config.shards,
            "dim": spec.dim,
            "metric": spec.metric.value,
            "vector": [spec.vector_col, spec.vector_fn, spec.vector_fn_version, spec.vector_type],
        }
    )


def _stored(build: Build, run_id: str, kind: str, data: bytes) -> Ref:
    key = f"vector_meta/run_id={run_id}/{kind}.npy"
    if not build.store.create(key, data):
        # Another attempt with other bytes (other library versions) was here; what is stored is never replaced.
        key = f"vector_meta/run_id={run_id}/{kind}-{uuid.uuid4().hex[:8]}.npy"
        build.store.put(key, data)
    return Ref.of(key, data)
