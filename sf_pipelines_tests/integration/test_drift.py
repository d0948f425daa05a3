"""The check that compares a staged snapshot with the one that is served."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sf_pipelines import BuildResult, ShardedVectorReader, build_snapshot
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.config import DriftLimits
from sf_pipelines.snapshot.errors import GateFailedError
from sf_pipelines.snapshot.gate import drift
from sf_pipelines.snapshot.gate import verdicts as gate
from sf_pipelines.snapshot.gate.verdicts import Verdict
from sf_pipelines.snapshot.manifest.codec import encode_manifest
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.operations.diff import diff
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import ManifestReceipt
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.builds import assembled
from sf_pipelines_tests.golden.snapshots import CLUSTER, fill
from sf_pipelines_tests.snapshots import point_at
from sf_pipelines_tests.tables import clustered, small_config, vector_table
from sf_pipelines_tests.unit.manifest_samples import CREATED, sample_manifest

VECTORS = clustered(680, 16, seed=4)


def write(root: Path, ids: range, vectors: Any) -> None:
    table = vector_table(vectors, ids=pa.array(list(ids)), title=[f"row {n}" for n in ids])
    pq.write_table(table, root / "source.parquet")


def build(root: Path, ids: range, vectors: Any, **fields: Any) -> BuildResult:
    write(root, ids, vectors)
    return build_snapshot(small_config(root, **fields), cache_dir=root / "cache")


def drift_of(result: BuildResult) -> Verdict:
    assert result.published
    return next(verdict for verdict in result.verdicts if verdict.name == "drift")


def first(root: Path, **fields: Any) -> None:
    build(root, range(600), VECTORS[:600], **fields)


def changed(root: Path) -> None:
    """50 of the first 600 rows are gone, 80 are new, and 7 have another vector."""
    vectors = VECTORS.copy()
    vectors[100:107] = vectors[200:207]
    write(root, range(50, 680), vectors[50:])


def test_the_first_snapshot_has_nothing_to_compare_with(tmp_path: Path) -> None:
    found = drift_of(build(tmp_path, range(600), clustered(600, 16)))
    assert (found.passed, found.severity, found.figures) == (True, "WARN", {"compared": 0})
    assert "nothing to compare with" in found.message


@pytest.mark.parametrize("spec", [{}, {"sharding": {"strategy": "lsh"}}, {"backend": "sqlite-vec"}], ids=str)
def test_figures(tmp_path: Path, spec: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"vector_spec": {"dim": 16, **spec}, "retrain": "always"}
    first(tmp_path, **fields)
    changed(tmp_path)
    found = drift_of(build_snapshot(small_config(tmp_path, **fields), cache_dir=tmp_path / "cache"))
    counts = ("compared", "rows", "rows_before", "rows_added", "rows_gone", "rows_kept", "rows_changed")
    assert [found.figures[name] for name in counts] == [1, 630, 600, 80, 50, 550, 7]
    assert found.figures["gone_fraction"] == pytest.approx(50 / 600)
    assert found.figures["added_fraction"] == pytest.approx(80 / 600)
    assert found.figures["changed_fraction"] == pytest.approx(7 / 600)
    other = diff(tmp_path / "store")
    assert other.ids is not None
    assert (other.ids.added, other.ids.gone, other.ids.changed) == (80, 50, 7)
    assert other.overlap is not None
    assert (found.figures["overlap"], found.figures["k"]) == (pytest.approx(other.overlap.mean), other.overlap.k)
    assert 0.2 < other.overlap.mean < 1
    assert other.routing is not None
    assert found.figures[f"{other.routing.artifact}_shift_largest"] == pytest.approx(other.routing.largest)
    assert found.figures[f"{other.routing.artifact}_shift_mean"] == pytest.approx(other.routing.mean)
    assert found.passed
    assert {row["figure"] for row in found.table} >= {*counts, "overlap", f"{other.routing.artifact}_shift_largest"}


def test_copied_shards_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(600, 16)
    build(tmp_path, range(600), vectors)
    with ShardedVectorReader(tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        near = vectors[[reader.route_vector(vector, 1) == [1] for vector in vectors]]
        rows = reader.shard_details()[1].vector_count
    more = np.concatenate([vectors, near[:6] * np.float32(1.001)])
    # Just enough for the shard that changed, on both sides.
    monkeypatch.setattr(drift, "MOST_ROWS", 2 * rows + 6)
    found = drift_of(build(tmp_path, range(606), more))
    counts = ("shards_reused", "rows_added", "rows_gone", "rows_kept", "rows_changed", "centroids_shift_largest")
    assert [found.figures[name] for name in counts] == pytest.approx([2, 6, 0, 600, 0, 0], abs=1e-12)


LIMITS: list[tuple[dict[str, Any], str]] = [
    ({"min_overlap": 0.9999}, "overlap"),
    ({"min_overlap": 0.01}, ""),
    ({"max_gone_fraction": 0.05}, "gone_fraction"),
    ({"max_gone_fraction": 0.1, "max_added_fraction": 0.2, "max_changed_fraction": 0.1, "max_routing_shift": 2.0}, ""),
    ({"max_added_fraction": 0.1}, "added_fraction"),
    ({"max_changed_fraction": 0.01}, "changed_fraction"),
    ({"max_routing_shift": 1e-6}, "centroids_shift_largest"),
]


def test_limits_warn_or_block(tmp_path: Path) -> None:
    first(tmp_path, retrain="always")
    changed(tmp_path)
    config, cache = small_config(tmp_path, retrain="always"), tmp_path / "cache"
    judged, run_id = assembled(config, cache)
    for limits, fault in LIMITS:
        with Build(config.model_copy(update={"drift": DriftLimits(**limits)}), cache_dir=cache) as asked:
            found = stages.check(asked, run_id, "drift")
            assert latest(asked, run_id) == found
        assert (found.passed, found.severity) == (not fault, "WARN"), limits
        assert found.message.startswith(f"{fault} " if fault else "compared with"), limits
        assert {row["figure"]: row["limit"] for row in found.table}[fault or "rows"] == (
            next(iter(limits.values())) if fault else None
        )
    for name in stages.CHECKS:
        if name != "drift":
            stages.check(judged, run_id, name)
    with Build(
        config.model_copy(update={"drift": DriftLimits(**LIMITS[0][0], blocking=True)}), cache_dir=cache
    ) as strict:
        # Another gate: the manifest is assembled for it, and every check has to judge it.
        strict_run = stages.assemble(strict, run_id).run_id
        verdicts = {verdict.name: verdict for verdict in stages.gate(strict, strict_run)}
        assert (verdicts["drift"].passed, verdicts["drift"].severity) == (False, "ERROR")
        with pytest.raises(GateFailedError, match="drift: overlap"):
            stages.promote(strict, strict_run)
    stages.assemble(judged, run_id)
    for name in stages.CHECKS:
        stages.check(judged, run_id, name)
    with Build(config.model_copy(update={"drift": DriftLimits(**LIMITS[0][0])}), cache_dir=cache) as asked:
        assert not stages.check(asked, run_id, "drift").passed
        assert stages.promote(asked, run_id).published
    judged.close()


def test_too_many_rows_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "MOST_ROWS", 1000)
    first(tmp_path)
    changed(tmp_path)
    limits = {"max_gone_fraction": 0.01}
    config = small_config(tmp_path, retrain="always", drift=limits)
    found = drift_of(build_snapshot(config, cache_dir=tmp_path / "cache"))
    assert found.passed
    assert "rows_added" not in found.figures
    assert "1,230 rows would be read, more than 1,000" in found.message
    assert "overlap" in found.figures


def latest(build: Build, run_id: str) -> Verdict | None:
    return gate.latest_verdict(build, build.ledger(run_id).need(ManifestReceipt), "drift")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vector_spec": {"dim": 8}}, "its dim is 16, here it is 8"),
        ({"vector_spec": {"dim": 16, "metric": "l2"}}, "its metric is 'cosine', here it is 'l2'"),
        ({"key_value": {"key_col": "id", "value_cols": ["title"]}}, "its kind is 'vector', here it is 'unified'"),
    ],
    ids=str,
)
def test_a_current_snapshot_of_another_make(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    build(tmp_path, range(600), clustered(600, 16))
    dim = change.get("vector_spec", {}).get("dim", 16)
    found = drift_of(build(tmp_path, range(500), clustered(500, dim), **change))
    assert found.passed
    assert reason in found.message
    assert found.figures == {"compared": 0}


def _no_manifest(store: Store) -> None:
    pointer = read_pointer(store).pointer
    assert pointer is not None
    store.delete(pointer.manifest_ref.removeprefix(store.url + "/"))


def _no_vectors(store: Store) -> None:
    manifest = sample_manifest("kv", store.url, created_at=CREATED).model_copy(update={"custom": {}})
    name = f"manifests/{CREATED:%Y-%m-%dT%H:%M:%S.%f}Z_run_id=kv/manifest"
    store.put(name, encode_manifest(manifest))
    point_at(store, name, "kv")


def _shards(store: Store) -> list[str]:
    return [info.key for info in store.objects("shards") if "/data/" in info.key]


def _no_shards(store: Store) -> None:
    for key in _shards(store):
        store.delete(key)


def _other_bytes(store: Store) -> None:
    for key in _shards(store):
        store.put(key, b"\0" * store.head(key).size)


@pytest.mark.parametrize(
    ("damage", "passed", "kind"),
    [
        (_no_manifest, True, "store.missing"),
        (_no_vectors, True, "reader.snapshot_kind"),
        (_no_shards, True, "store.missing"),
        (_other_bytes, False, "integrity.digest"),
    ],
)
def test_a_current_snapshot_that_cannot_be_read(tmp_path: Path, damage: Any, passed: bool, kind: str) -> None:
    vectors = clustered(600, 16)
    build(tmp_path, range(550), vectors[:550])
    damage(Store.open(tmp_path / "store"))
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    result = build(tmp_path, range(600), vectors)
    found = drift_of(result)
    assert (found.passed, found.severity, found.figures["error"]) == (passed, "WARN", kind)
    assert all(verdict.passed for verdict in result.verdicts if verdict.name != "drift")


def test_after_a_stock_snapshot(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    fill(store, CLUSTER[0])
    with ShardedVectorReader(store.url) as reader:
        dim, rows = reader.snapshot_info().dim, reader.snapshot_info().total_vectors
    found = drift_of(build(tmp_path, range(400), clustered(400, dim), vector_spec={"dim": dim}))
    assert found.passed
    assert found.figures["rows_before"] == rows
    assert found.figures["rows_added"] == 400 - int(found.figures["rows_kept"])
    assert 0 <= float(found.figures["overlap"]) <= 1
