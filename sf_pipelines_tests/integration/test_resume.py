"""What a build may go on with, and what it must not."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sf_pipelines import ShardedVectorReader, VectorSpec, build_snapshot
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.errors import ConfigError, IntegrityError
from sf_pipelines.snapshot.gate.recall import RecallEstimate
from sf_pipelines.snapshot.manifest.publish import history, read_pointer
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.operations.verify import verify_snapshot
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import SampleReceipt, ShardReceipt, TrainReceipt
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.builds import assembled, routed
from sf_pipelines_tests.tables import clustered, small_config, vector_table, write_source


@pytest.mark.parametrize(
    "change",
    [
        {"vector_spec": VectorSpec(dim=16, metric=DistanceMetric.L2)},
        {"vector_spec": VectorSpec(dim=16, index_type="hnsw")},
        {"recall_gate": {"k": 50}},
        {"num_dbs": 4},
        {"payload_cols": ()},
    ],
)
def test_a_run_is_not_continued_under_another_config(tmp_path: Path, change: dict[str, object]) -> None:
    write_source(tmp_path / "source.parquet")
    build, run_id = assembled(small_config(tmp_path), tmp_path / "cache")
    build.close()
    with Build(small_config(tmp_path, **change), cache_dir=tmp_path / "cache") as other:
        for stage in (stages.sample, stages.route, stages.assemble, stages.gate, stages.promote):
            with pytest.raises(ConfigError, match="was begun with another configuration"):
                stage(other, run_id)
        with pytest.raises(ConfigError, match="was begun with another configuration"):
            stages.build_shard(other, run_id, 0)
        assert history(other.store) == []


@pytest.mark.parametrize("what", ["shard", "centroids"])
def test_what_is_lost_after_the_gate_is_not_published(tmp_path: Path, what: str) -> None:
    write_source(tmp_path / "source.parquet")
    build, run_id = assembled(small_config(tmp_path), tmp_path / "cache")
    with build:
        stages.gate(build, run_id)
        ledger = build.ledger(run_id)
        shard = ledger.need(ShardReceipt, "db=00002")
        key = ledger.need(TrainReceipt).ref.key if what == "centroids" else f"{shard.db_key}/{shard.objects[0].path}"
        build.store.delete(key)
        with pytest.raises(IntegrityError, match=key.rsplit("/", 1)[-1]):
            stages.promote(build, run_id)
        assert read_pointer(build.store).pointer is None
    assert build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache").published
    assert verify_snapshot(tmp_path / "store").passed


def lost(pattern: str) -> Callable[[Path], None]:
    """Deletes the one file that matches."""

    def lose(store: Path) -> None:
        (path,) = store.glob(pattern)
        path.unlink()

    return lose


def damaged(pattern: str) -> Callable[[Path], None]:
    """Changes a byte of the one file that matches."""

    def damage(store: Path) -> None:
        (path,) = store.glob(pattern)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(bytes(data))

    return damage


@pytest.mark.parametrize(
    "harm",
    [
        lost("staging/run_id=*/routed/range-*"),
        lost("staging/run_id=*/samples/queries-*"),
        damaged("staging/run_id=*/samples/queries-*"),
        damaged("staging/run_id=*/rejects-*"),
        lost("vector_meta/run_id=*/centroids.npy"),
        lost("runs/*/run.yaml"),
        lost("staging/run_id=*/manifest-*"),
        damaged("staging/run_id=*/manifest-*"),
        lost("staging/run_id=*/truth/merged-*"),
    ],
)
def test_an_unfinished_build_heals_what_was_lost(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    write_source(tmp_path / "source.parquet")
    build, _ = assembled(small_config(tmp_path), tmp_path / "cache")
    build.close()
    harm(tmp_path / "store")
    assert build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache").published
    assert verify_snapshot(tmp_path / "store").passed


def test_force_begins_anew_where_nothing_can_be_healed(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    config = small_config(tmp_path)
    with Build(config, cache_dir=tmp_path / "cache") as build:
        run_id = routed(build)
    damaged("staging/run_id=*/routed/range-*")(tmp_path / "store")
    with pytest.raises(IntegrityError, match="force"):
        build_snapshot(config, cache_dir=tmp_path / "cache")
    forced = build_snapshot(config, cache_dir=tmp_path / "cache", force=True)
    assert forced.published
    assert forced.run_id != run_id


@pytest.mark.parametrize("what", ["centroids", "manifest"])
def test_a_published_snapshot_that_cannot_be_opened_is_built_anew(tmp_path: Path, what: str) -> None:
    vectors = write_source(tmp_path / "source.parquet")
    first = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    lost("vector_meta/run_id=*/centroids.npy" if what == "centroids" else "manifests/*/manifest")(tmp_path / "store")
    second = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    assert second.published
    assert second.run_id != first.run_id
    with ShardedVectorReader(tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        assert reader.search(vectors[1], top_k=1).results[0].id == 1


def test_of_two_attempts_at_one_shard_the_first_receipt_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "source.parquet")
    config = small_config(tmp_path)
    with Build(config, cache_dir=tmp_path / "cache") as build:
        run_id = routed(build)
        sealing = import_module("sf_pipelines.snapshot.stages.shard")
        plain = sealing.seal_shard

        def overtaken(*arguments: object) -> ShardReceipt:
            # While this attempt works, another process does everything and publishes.
            monkeypatch.setattr(sealing, "seal_shard", plain)
            build_snapshot(config, cache_dir=tmp_path / "cache")
            return plain(*arguments)

        monkeypatch.setattr(sealing, "seal_shard", overtaken)
        late = stages.build_shard(build, run_id, 0)
        assert late.key.endswith("/0000.json")
        assert late == build.ledger(run_id).need(ShardReceipt, "db=00000")
    again = build_snapshot(config, cache_dir=tmp_path / "cache")
    assert not again.published
    assert len(history(Store.open(tmp_path / "store"))) == 1


def test_a_moved_store_is_finished_where_it_is_now(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    build, _ = assembled(small_config(tmp_path), tmp_path / "cache")
    build.close()
    (tmp_path / "store").rename(tmp_path / "moved")
    moved = small_config(tmp_path, store=str(tmp_path / "moved"))
    assert build_snapshot(moved, cache_dir=tmp_path / "cache").published
    assert verify_snapshot(tmp_path / "moved").passed


@pytest.mark.parametrize("place", ["", "/inside"])
def test_a_store_inside_the_source_is_refused(tmp_path: Path, place: str) -> None:
    write_source(tmp_path / "lake" / "source.parquet")
    config = small_config(tmp_path, source=str(tmp_path / "lake"), store=str(tmp_path / "lake") + place)
    with pytest.raises(ConfigError, match="lies in the source"):
        build_snapshot(config)


def test_recall_of_a_small_table_is_counted_over_all_rows(tmp_path: Path) -> None:
    pq.write_table(vector_table(clustered(120, 16), title=["x"] * 120), tmp_path / "source.parquet")
    result = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    receipt = Ledger(Store.open(tmp_path / "store"), result.run_id).need(SampleReceipt)
    assert (receipt.disjoint, receipt.query_rows) == (False, 120)
    verdict = next(verdict for verdict in result.verdicts if verdict.name == "recall")
    assert verdict.figures["queries"] == 120
    assert verdict.figures["lower_bound"] == verdict.figures["recall"]


def test_too_small_a_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="query_rows: should be greater than or equal to 200"):
        small_config(tmp_path, recall_gate={"query_rows": 100})


def test_the_bound_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    # As many judging queries as by default, each finding every neighbour with a chance of 0.9.
    bounds = [RecallEstimate.of(rng.binomial(10, 0.9, 250) / 10).lower for _ in range(2000)]
    assert 0.93 < np.mean(np.array(bounds) <= 0.9) < 0.97
    # The hardest case for a bound by variance: one query in ten finds nothing at all.
    bounds = [RecallEstimate.of((rng.random(250) > 0.1).astype(float)).lower for _ in range(2000)]
    assert np.mean(np.array(bounds) <= 0.9) > 0.9
    judged = RecallEstimate.of((rng.random(250) > 0.1).astype(float))
    assert judged.lower_of_another(250) < judged.lower < judged.mean < judged.upper


def test_an_index_takes_any_number_of_queries(tmp_path: Path) -> None:
    vectors = write_source(tmp_path / "source.parquet", rows=1500)
    spec = VectorSpec(dim=16, index_type="ivf_sq")
    build_snapshot(small_config(tmp_path, num_dbs=1, vector_spec=spec), cache_dir=tmp_path / "cache")
    with ShardedVectorReader(tmp_path / "store", cache_dir=tmp_path / "cache", exact_scan=False) as reader:
        for count in (1, 63, 64, 65, 128, 129):
            found = reader.search_arrays(vectors[:count], 3)
            assert found.ids[:, 0].tolist() == list(range(count))
            raw = reader.stock_style(vectors[:count], 3, 1)
            assert raw.ids.shape == (count, 3)
