"""A source that changed a little: centroids are kept, unchanged shards are copied."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sf_pipelines import BuildResult, ShardedVectorReader, WriteConfig, build_snapshot
from sf_pipelines.snapshot.manifest.publish import history
from sf_pipelines.snapshot.operations.verify import verify_snapshot
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import ShardReceipt, TrainReceipt
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.format_checker.checker import assert_format
from sf_pipelines_tests.tables import clustered, small_config, vector_table, write_source

ROWS = 600


def build(config: WriteConfig, tmp_path: Path, **options: Any) -> BuildResult:
    return build_snapshot(config, cache_dir=tmp_path / "cache", **options)


def receipts(tmp_path: Path, run_id: str) -> tuple[TrainReceipt, list[ShardReceipt]]:
    ledger = Ledger(Store.open(tmp_path / "store"), run_id)
    return ledger.need(TrainReceipt), [ledger.need(ShardReceipt, f"db={n:05d}") for n in range(3)]


def rewrite(tmp_path: Path, vectors: np.ndarray) -> None:
    table = vector_table(vectors, title=[f"row {n}" for n in range(len(vectors))])
    pq.write_table(table, tmp_path / "source.parquet", row_group_size=150)


def grown(tmp_path: Path, vectors: np.ndarray, shard: int = 1, rows: int = 6) -> np.ndarray:
    """One per cent more rows, all next to rows of one shard."""
    with ShardedVectorReader(tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        near = vectors[[reader.route_vector(vector, 1) == [shard] for vector in vectors]]
    more = np.concatenate([vectors, near[:rows] * np.float32(1.001)])
    rewrite(tmp_path, more)
    return more


@pytest.mark.parametrize("spec", [{}, {"sharding": {"strategy": "lsh"}}, {"backend": "sqlite-vec"}], ids=str)
def test_new_rows_in_one_cluster_rebuild_one_shard(tmp_path: Path, spec: dict[str, Any]) -> None:
    vectors = write_source(tmp_path / "source.parquet")
    config = small_config(tmp_path, vector_spec={"dim": 16, **spec})
    first = build(config, tmp_path)
    more = grown(tmp_path, vectors)
    second = build(config, tmp_path)
    assert second.run_id != first.run_id
    trained, shards = receipts(tmp_path, second.run_id)
    old_trained, old = receipts(tmp_path, first.run_id)
    assert (trained.kept, trained.ref.sha256) == (True, old_trained.ref.sha256)
    assert trained.ref.key != old_trained.ref.key
    assert [shard.reused for shard in shards] == [old[0].db_key, None, old[2].db_key]
    assert shards[1].rows == old[1].rows + 6
    with ShardedVectorReader(tmp_path / "store", cache_dir=tmp_path / "fresh") as reader:
        answers = reader.search_arrays(more, 1, num_probes=1)
        assert np.mean(answers.ids[:, 0] == np.arange(len(more))) > 0.98
        assert answers.scores[ROWS:].max() < 1e-6
    assert verify_snapshot(tmp_path / "store").passed
    assert_format(tmp_path / "store")


def test_each_run_stands_alone(tmp_path: Path) -> None:
    """What the first build wrote can go: the second shares nothing with it."""
    vectors = write_source(tmp_path / "source.parquet")
    first = build(small_config(tmp_path), tmp_path)
    grown(tmp_path, vectors)
    build(small_config(tmp_path), tmp_path)
    store = Store.open(tmp_path / "store")
    for info in list(store.objects()):
        if f"run_id={first.run_id}/" in info.key:
            store.delete(info.key)
    assert verify_snapshot(tmp_path / "store").passed


def test_drifted_data_is_trained_anew(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    build(small_config(tmp_path), tmp_path)
    rewrite(tmp_path, clustered(ROWS, 16, seed=9))
    second = build(small_config(tmp_path), tmp_path)
    trained, shards = receipts(tmp_path, second.run_id)
    assert not trained.kept
    assert trained.drift is not None
    assert trained.drift > 1
    assert "drifted" in trained.retrained
    assert [shard.reused for shard in shards] == [None] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("retrain", "kept"), [("auto", True), ("always", False), ("never", True)])
def test_retrain_says_when(tmp_path: Path, retrain: str, kept: bool) -> None:
    vectors = write_source(tmp_path / "source.parquet")
    config = small_config(tmp_path, retrain=retrain)
    build(config, tmp_path)
    grown(tmp_path, vectors)
    trained, _ = receipts(tmp_path, build(config, tmp_path).run_id)
    assert trained.kept is kept
    rewrite(tmp_path, clustered(ROWS, 16, seed=9))
    trained, _ = receipts(tmp_path, build(config, tmp_path).run_id)
    assert trained.kept is (retrain == "never")


def test_force_takes_nothing_over(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    build(small_config(tmp_path), tmp_path)
    second = build(small_config(tmp_path), tmp_path, force=True)
    trained, shards = receipts(tmp_path, second.run_id)
    assert (trained.kept, trained.retrained) == (False, "asked for by force")
    assert [shard.reused for shard in shards] == [None] * 3


def test_another_kind_of_index_is_built(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    build(small_config(tmp_path), tmp_path)
    second = build(small_config(tmp_path, vector_spec={"dim": 16, "index_type": "ivf_flat"}), tmp_path)
    trained, shards = receipts(tmp_path, second.run_id)
    assert trained.kept
    assert [shard.reused for shard in shards] == [None] * 3


@pytest.mark.slow
def test_a_gate_that_fails_with_kept_centroids_asks_for_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = import_module("sf_pipelines.snapshot.stages.train")
    from sf_pipelines.snapshot.errors import GateFailedError

    write_source(tmp_path / "source.parquet")
    config = small_config(tmp_path, max_shard_skew=2.0)
    build(config, tmp_path)
    # All rows near one centroid: as if nobody had noticed the drift, the balance fails.
    monkeypatch.setattr(training, "_drift", lambda *_: 0.5)
    with ShardedVectorReader(tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        vectors = clustered(4000, 16)
        near = vectors[[reader.route_vector(vector, 1) == [0] for vector in vectors]][:ROWS]
    rewrite(tmp_path, near)
    with pytest.raises(GateFailedError, match="shard_balance"):
        build(config, tmp_path)
    second = build(config, tmp_path)
    trained, _ = receipts(tmp_path, second.run_id)
    assert not trained.kept
    assert "failed its gate" in trained.retrained
    assert len(history(Store.open(tmp_path / "store"))) == 2


def test_centroids_that_failed_a_gate_are_not_kept_when_the_source_is_new_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = import_module("sf_pipelines.snapshot.stages.train")
    from sf_pipelines.snapshot.errors import GateFailedError

    write_source(tmp_path / "source.parquet")
    config = small_config(tmp_path, max_shard_skew=2.0)
    build(config, tmp_path)
    monkeypatch.setattr(training, "_drift", lambda *_: 0.5)
    with ShardedVectorReader(tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        vectors = clustered(8000, 16)
        near = vectors[[reader.route_vector(vector, 1) == [0] for vector in vectors]]
    rewrite(tmp_path, near[:ROWS])
    with pytest.raises(GateFailedError, match="shard_balance"):
        build(config, tmp_path)
    rewrite(tmp_path, near[1 : ROWS + 1])
    second = build(config, tmp_path)
    trained, _ = receipts(tmp_path, second.run_id)
    assert not trained.kept
    assert "failed its gate" in trained.retrained


@pytest.mark.parametrize("damage", ["changed", "lost", "changed in the copy"])
def test_a_damaged_shard_is_built_in_place_of_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    vectors = write_source(tmp_path / "source.parquet")
    first = build(small_config(tmp_path), tmp_path)
    grown(tmp_path, vectors)
    store = Store.open(tmp_path / "store")
    _, old = receipts(tmp_path, first.run_id)
    key = f"{old[0].db_key}/{old[0].objects[0].path}"
    if damage == "lost":
        store.delete(key)
    else:
        store.put(key, b"\0" * old[0].objects[0].size)
    if damage == "changed in the copy":
        # Nobody looked before the copy was made.
        monkeypatch.setattr(import_module("sf_pipelines.snapshot.stages.shard"), "is_intact", lambda *_: True)
    second = build(small_config(tmp_path), tmp_path)
    _, shards = receipts(tmp_path, second.run_id)
    assert [shard.reused for shard in shards] == [None, None, old[2].db_key]
    assert verify_snapshot(tmp_path / "store").passed
