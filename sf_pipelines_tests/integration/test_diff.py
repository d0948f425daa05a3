"""The figures of a comparison, against plain ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.optimize import linear_sum_assignment

from sf_pipelines import S3Options, ShardedVectorReader, WriteConfig, build_snapshot
from sf_pipelines.snapshot.errors import OperationError, RunNotFoundError, SnapshotKindError, SnapshotNotFoundError
from sf_pipelines.snapshot.manifest.codec import encode_manifest
from sf_pipelines.snapshot.manifest.publish import history
from sf_pipelines.snapshot.operations.diff import diff
from sf_pipelines.snapshot.operations.rollback import rollback
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import SampleReceipt
from sf_pipelines.snapshot.source import samples
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.golden.snapshots import CLUSTER, fill
from sf_pipelines_tests.snapshots import point_at
from sf_pipelines_tests.tables import clustered, exact_distances, small_config, vector_table
from sf_pipelines_tests.unit.manifest_samples import CREATED, sample_manifest


def write(path: Path, ids: Any, vectors: Any) -> None:
    pq.write_table(vector_table(vectors, ids=ids, title=[f"row {value}" for value in list(ids)]), path)


def two(root: Path, **fields: Any) -> tuple[WriteConfig, list[str]]:
    """600 rows, then 50 of them gone and 80 new ones."""
    vectors = clustered(680, 16, seed=4)
    ids = pa.array([f"id-{number}" for number in range(680)])
    config = small_config(root, **fields)
    runs: list[str] = []
    for start, end in ((0, 600), (50, 680)):
        write(root / "source.parquet", ids[start:end], vectors[start:end])
        runs.append(build_snapshot(config, cache_dir=root / "cache").run_id)
    return config, runs


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    if request.param == "local":
        return {}
    options: S3Options = request.getfixturevalue("moto_options")
    return {"store": f"s3://{request.getfixturevalue('bucket')}/small", "s3": options}


def test_figures_of_two_snapshots(tmp_path: Path, place: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Several buckets, as a large table has them.
    monkeypatch.setattr(samples, "_BUCKET_ROWS", 100)
    config, (first, second) = two(tmp_path, **place)
    seen: list[tuple[str, int, int | None, str]] = []

    def watch(stage: str, done: int, total: int | None, unit: str) -> None:
        seen.append((stage, done, total, unit))

    found = diff(config.store, s3=config.s3, progress=watch)
    assert seen == [("diff", number, 6, "shards") for number in range(1, 7)]
    assert (found.before.run_id, found.after.run_id, found.before.rows, found.after.rows) == (first, second, 600, 630)
    assert found.ids is not None
    assert (found.ids.added, found.ids.gone, found.ids.kept, found.ids.changed) == (80, 50, 550, 0)
    assert not found.ids.as_text
    assert found.notes == ()

    store = Store.open(config.store, config.s3)
    sides = [
        ShardedVectorReader(config.store, s3=config.s3, cache_dir=tmp_path / "cache", manifest_key=side.manifest_key)
        for side in (found.before, found.after)
    ]
    rows = [[detail.vector_count for detail in reader.shard_details()] for reader in sides]
    assert [shard.rows_before for shard in found.shards] == rows[0]
    assert [shard.rows_after for shard in found.shards] == rows[1]
    for side, run_id in ((found.before, first), (found.after, second)):
        assert side.bytes == sum(info.size for info in store.objects(f"shards/run_id={run_id}"))
        assert side.recall is not None
        assert side.recall.lower is not None
        assert side.recall.lower >= 0.95
        assert (side.recall.k, side.recall.min_recall) == (10, 0.95)
    assert sum(shard.bytes_after for shard in found.shards) == found.after.bytes

    # Centroids, matched by brute force.
    centroids = [np.load(_local(store, f"vector_meta/run_id={run}/centroids.npy", tmp_path)) for run in (first, second)]
    table = exact_distances(centroids[0], centroids[1], config.vector_spec.metric)
    at = linear_sum_assignment(table)
    assert found.routing is not None
    assert found.routing.measure == "cosine"
    assert found.routing.mean == pytest.approx(table[at].mean())
    assert found.routing.largest == pytest.approx(table[at].max())
    assert sorted(pair[:2] for pair in found.routing.pairs) == sorted(zip(*(part.tolist() for part in at), strict=True))

    # Answers, query by query.
    ledger = Ledger(store, second)
    queries = ledger.get_table(ledger.need(SampleReceipt).queries)
    answers = [reader.batch_search(queries["vector"].to_pylist(), 11) for reader in sides]
    shares: list[float] = []
    for row_id, *responses in zip(queries["id"].to_pylist(), *answers, strict=True):
        one, other = ([hit.id for hit in found.results if hit.id != row_id][:10] for found in responses)
        shares.append(len(set(one) & set(other)) / 10)
    assert found.overlap is not None
    assert (found.overlap.k, found.overlap.queries) == (10, len(shares))
    assert found.overlap.mean == pytest.approx(np.mean(shares))
    assert found.overlap.same == pytest.approx(np.mean(np.array(shares) == 1.0))
    assert 0 < found.overlap.mean < 1
    for reader in sides:
        reader.close()


def _local(store: Store, key: str, folder: Path) -> Path:
    path = folder / key.replace("/", "-")
    store.download(key, path)
    return path


@pytest.mark.slow
def test_a_snapshot_with_itself(tmp_path: Path) -> None:
    config, (first, _) = two(tmp_path)
    found = diff(config.store, first, first)
    assert found.ids is not None
    assert (found.ids.added, found.ids.gone, found.ids.kept) == (0, 0, 600)
    assert found.config == ()
    assert found.routing is not None
    assert found.routing.largest == pytest.approx(0, abs=1e-12)
    assert found.overlap is not None
    assert (found.overlap.mean, found.overlap.same) == (1.0, 1.0)


def test_config_and_sides(tmp_path: Path) -> None:
    config, (first, second) = two(tmp_path)
    other = small_config(tmp_path, num_dbs=4, vector_spec={"dim": 16, "metric": "l2", "index_type": "ivf_flat"})
    third = build_snapshot(other, cache_dir=tmp_path / "cache").run_id
    found = diff(config.store, ids=False, answers=False)
    assert (found.before.run_id, found.after.run_id, found.ids, found.overlap) == (second, third, None, None)
    changed = {change.name: (change.before, change.after) for change in found.config}
    assert changed["num_dbs"] == (3, 4)
    assert changed["metric"] == ("cosine", "l2")
    assert changed["index_type"] == ("flat", "ivf_flat")
    assert not {"dim", "strategy", "backend", "id_type"} & set(changed)
    assert found.routing is not None
    assert (found.routing.unmatched, found.routing.measure, len(found.routing.pairs)) == (1, "euclidean", 3)
    assert [(shard.db_id, shard.rows_before) for shard in found.shards][3] == (3, 0)
    # After a rollback, what was served before is the one that was withdrawn.
    rollback(config.store, first)
    found = diff(config.store, ids=False, answers=False)
    assert (found.before.run_id, found.after.run_id) == (third, first)


def test_without_a_query_sample_the_note_says_so(tmp_path: Path) -> None:
    config, (_, second) = two(tmp_path)
    store = Store.open(config.store)
    for info in list(store.objects(f"staging/run_id={second}/samples")):
        store.delete(info.key)
    found = diff(config.store, ids=False)
    assert found.overlap is None
    assert "query sample cannot be used" in found.notes[0]


@pytest.mark.parametrize("name", CLUSTER)
def test_stock_and_ours(name: str, tmp_path: Path) -> None:
    """Its ids come as text, and it has left no sample; ours after it has."""
    store = Store.open(tmp_path / "store", create=True)
    fill(store, name)
    with pytest.raises(OperationError, match="nothing was served before"):
        diff(store)
    itself = diff(store, "golden-run")
    assert itself.ids is not None
    assert (itself.ids.added, itself.ids.gone) == (0, 0)
    assert itself.before.bytes > 0
    assert any("no query sample" in note for note in itself.notes)
    dim = _dim(store)
    vectors = clustered(400, dim, seed=1)
    write(tmp_path / "source.parquet", pa.array(range(400)), vectors)
    build_snapshot(small_config(tmp_path, vector_spec={"dim": dim}), cache_dir=tmp_path / "cache")
    found = diff(store)
    assert found.ids is not None
    assert found.ids.as_text
    assert found.ids.added + found.ids.kept == 400
    assert found.overlap is not None
    assert {change.name: change.after for change in found.config}["writer"] == "sf_pipelines"


def _dim(store: Store) -> int:
    with ShardedVectorReader(store.url) as reader:
        return reader.snapshot_info().dim


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    with pytest.raises(SnapshotNotFoundError, match="nothing has been published"):
        diff(store)
    manifest = sample_manifest("kv", store.url, created_at=CREATED).model_copy(update={"custom": {}})
    name = f"manifests/{CREATED:%Y-%m-%dT%H:%M:%S.%f}Z_run_id=kv/manifest"
    store.put(name, encode_manifest(manifest))
    point_at(store, name, "kv")
    assert len(history(store)) == 1
    with pytest.raises(SnapshotKindError, match=r"no custom\.vector"):
        diff(store, "kv")
    with pytest.raises(RunNotFoundError, match="'nobody'"):
        diff(store, "nobody")
    with pytest.raises(SnapshotKindError, match=r"no custom\.vector"):
        rollback(_with_another(store), "kv")


def _with_another(store: Store) -> Store:
    """The pointer names something else."""
    point_at(store, "manifests/2026-01-01T00:00:00.000000Z_run_id=other/manifest", "other")
    return store
