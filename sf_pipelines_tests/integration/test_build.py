"""Whole builds: local disk, S3 and memory; what is published, what is refused, what is left alone."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sf_pipelines import S3Options, ShardedVectorReader, build_snapshot
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.errors import (
    ConfigError,
    DataContractError,
    DigestMismatchError,
    GateFailedError,
    GateMissingError,
    PublishConflictError,
    SfPipelinesError,
    SourceChangedError,
    SourceEmptyError,
    SourceNotFoundError,
    SourceSchemaError,
    StoreError,
)
from sf_pipelines.snapshot.manifest.publish import history, read_pointer
from sf_pipelines.snapshot.manifest.record import read_record
from sf_pipelines.snapshot.operations.verify import verify_snapshot
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import SampleReceipt, ScanReceipt, ShardReceipt
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.builds import assembled
from sf_pipelines_tests.tables import clustered, exact_scores, small_config, vector_table, write_source


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Where source and store are: config fields."""
    vectors = write_source(tmp_path / "source.parquet")
    fields: dict[str, Any] = {"source": str(tmp_path / "source.parquet"), "store": str(tmp_path / "store"), "s3": None}
    if request.param == "s3":
        options: S3Options = request.getfixturevalue("moto_options")
        root = f"s3://{request.getfixturevalue('bucket')}"
        Store.open(f"{root}/lake", options).upload(tmp_path / "source.parquet", "source.parquet")
        fields = {"source": f"{root}/lake/*.parquet", "store": f"{root}/serving/small", "s3": options}
    return {"fields": fields, "vectors": vectors, "cache": tmp_path / "cache"}


def test_a_snapshot_end_to_end(tmp_path: Path, place: dict[str, Any]) -> None:
    config = small_config(tmp_path, **place["fields"])
    seen: set[tuple[str, str]] = set()

    def watch(stage: str, done: int, total: int | None, unit: str) -> None:
        assert total is None or done <= total
        seen.add((stage, unit))

    result = build_snapshot(config, cache_dir=place["cache"], progress=watch)
    assert result.published
    assert (result.rows, result.rejected, len(result.shards)) == (600, 0, 3)
    assert result.recall_lower >= 0.95
    told = {("sample", "rows"), ("route", "rows"), ("shards", "shards"), ("assemble", "steps"), ("gate", "checks")}
    # Each phase is named as it begins, before it says how far it is.
    named = {"scan", "sample", "train", "route", "shards", "assemble", "gate", "promote"}
    assert seen == told | {(phase, "") for phase in named}
    assert all(verdict.passed for verdict in result.verdicts)
    vectors = place["vectors"]
    truth = exact_scores(vectors[:20], vectors, config.vector_spec.metric)
    with ShardedVectorReader(config.store, s3=config.s3, cache_dir=place["cache"]) as reader:
        info = reader.snapshot_info()
        assert (info.run_id, info.total_vectors, info.num_probes) == (result.run_id, 600, result.num_probes)
        for query in range(20):
            answer = reader.search(vectors[query], top_k=5, num_probes=3)
            assert [hit.id for hit in answer.results] == np.argsort(truth[query], kind="stable")[:5].tolist()
            assert [hit.score for hit in answer.results] == pytest.approx(np.sort(truth[query])[:5], abs=1e-9)
            assert answer.results[0].payload == {"title": f"row {query}"}
    store = Store.open(config.store, config.s3)
    record = read_record(store, Ledger(store, result.run_id).need(ScanReceipt).record_key)
    assert (record.status, record.manifest_ref) == ("succeeded", result.manifest_ref)
    assert [entry.run_id for entry in history(store)] == [result.run_id]
    assert verify_snapshot(config.store, s3=config.s3).passed


@pytest.mark.slow
def test_an_unchanged_source_is_not_published_again(tmp_path: Path, place: dict[str, Any]) -> None:
    config = small_config(tmp_path, **place["fields"])
    first = build_snapshot(config, cache_dir=place["cache"])
    store = Store.open(config.store, config.s3)
    before = store.get("_CURRENT")
    again = build_snapshot(config, cache_dir=place["cache"])
    assert not again.published
    assert (again.run_id, again.recall) == (first.run_id, first.recall)
    assert "nothing is new" in again.reason
    assert store.get("_CURRENT") == before
    forced = build_snapshot(config, cache_dir=place["cache"], force=True)
    assert forced.published
    assert (forced.previous_run_id, forced.seq) == (first.run_id, first.seq + 1)
    assert len(history(store)) == 2
    # Same input, same config: the same rows in the same shards.
    assert [shard.rows_digest for shard in forced.shards] == [shard.rows_digest for shard in first.shards]


def test_new_rows_are_a_new_snapshot_and_refresh_serves_it(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    config = small_config(tmp_path)
    first = build_snapshot(config, cache_dir=tmp_path / "cache")
    with ShardedVectorReader(config.store, cache_dir=tmp_path / "cache") as reader:
        vectors = write_source(tmp_path / "source.parquet", rows=700, seed=5)
        second = build_snapshot(config, cache_dir=tmp_path / "cache")
        assert reader.snapshot_info().run_id == first.run_id
        assert reader.refresh()
        assert reader.snapshot_info().run_id == second.run_id
        assert reader.search(vectors[699], top_k=1).results[0].id == 699
    assert second.previous_run_id == first.run_id


def test_a_gate_that_cannot_be_met_publishes_nothing(tmp_path: Path) -> None:
    vectors = write_source(tmp_path / "source.parquet")
    good = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    store = Store.open(tmp_path / "store")
    before = store.get("_CURRENT")
    # One probe of three on data without clusters cannot reach this.
    noise = np.random.default_rng(0).standard_normal((600, 16)).astype(np.float32)
    pq.write_table(vector_table(noise, title=["x"] * 600), tmp_path / "source.parquet")
    spec = {"dim": 16, "sharding": {"num_probes": 1}}
    strict = small_config(tmp_path, vector_spec=spec, recall_gate={"min_recall": 0.99})
    with pytest.raises(GateFailedError, match=r"recall@10 0\.\d+ .* is 0\.\d+ below min_recall 0\.99"):
        build_snapshot(strict, cache_dir=tmp_path / "cache")
    assert store.get("_CURRENT") == before
    assert [entry.run_id for entry in history(store)] == [good.run_id]
    with ShardedVectorReader(tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        assert reader.search(vectors[3], top_k=1).results[0].id == 3
    # A softer gate judges the same shards again: nothing is built anew.
    soft = small_config(tmp_path, vector_spec=spec, recall_gate={"min_recall": 0.1})
    result = build_snapshot(soft, cache_dir=tmp_path / "cache")
    assert result.published
    assert all(shard.attempt == 0 for shard in result.shards)
    assert {shard.reason for shard in result.shards} == {"this shard was built and sealed before"}


def test_promote_alone_asks_the_store_for_every_verdict(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    build, run_id = assembled(small_config(tmp_path), tmp_path / "cache")
    with build:
        with pytest.raises(GateMissingError, match="manifest_custom_fields has no verdict"):
            stages.promote(build, run_id)
        for name in stages.CHECKS[:3]:
            stages.check(build, run_id, name)
        with pytest.raises(GateMissingError, match="check recall has no verdict"):
            stages.promote(build, run_id)
        assert read_pointer(build.store).pointer is None
        assert history(build.store) == []
        stages.check(build, run_id, "recall")
        assert stages.promote(build, run_id).published


def test_a_verdict_under_another_gate_does_not_count(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    build, run_id = assembled(small_config(tmp_path, recall_gate={"min_recall": 0.5}), tmp_path / "cache")
    stages.gate(build, run_id)
    build.close()
    with Build(small_config(tmp_path), cache_dir=tmp_path / "cache") as stricter, pytest.raises(GateMissingError):
        stages.promote(stricter, run_id)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["changed", "deleted", "added"])
def test_a_shard_object_touched_after_the_build_fails_the_gate(tmp_path: Path, how: str) -> None:
    write_source(tmp_path / "source.parquet")
    good = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    write_source(tmp_path / "source.parquet", seed=9)
    build, run_id = assembled(small_config(tmp_path), tmp_path / "cache")
    shard = Ledger(build.store, run_id).need(ShardReceipt, "db=00001")
    name = f"{shard.db_key}/{next(item.path for item in shard.objects if '/data/' in item.path)}"
    path = tmp_path / "store" / name
    if how == "changed":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(bytes(data))
    elif how == "deleted":
        path.unlink()
    else:
        path, name = path.with_name("stranger.lance"), f"{Path(name).parent}/stranger.lance"
        path.write_bytes(b"x")
    with build:
        verdicts = {verdict.name: verdict for verdict in stages.gate(build, run_id)}
        assert not verdicts["shard_coverage"].passed
        assert Path(name).name in verdicts["shard_coverage"].message
        with pytest.raises(GateFailedError, match="shard_coverage"):
            stages.promote(build, run_id)
    assert read_pointer(build.store).pointer.run_id == good.run_id  # pyright: ignore[reportOptionalMemberAccess]
    # The next build notices, makes that shard again, and publishes.
    healed = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    assert (healed.run_id, healed.published) == (run_id, True)
    assert [shard.attempt for shard in healed.shards] == [0, 1, 0]
    assert verify_snapshot(tmp_path / "store").passed


def test_a_staged_manifest_that_changes_is_not_published(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    build, run_id = assembled(small_config(tmp_path), tmp_path / "cache")
    with build:
        stages.gate(build, run_id)
        (path,) = (tmp_path / "store" / "staging" / f"run_id={run_id}").glob("manifest-*")
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(SfPipelinesError, match="were recorded"):
            stages.promote(build, run_id)
        assert history(build.store) == []


@pytest.mark.parametrize("how", ["changed", "deleted"])
def test_verify_names_a_damaged_object_of_a_published_snapshot(tmp_path: Path, how: str) -> None:
    write_source(tmp_path / "source.parquet")
    result = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    shard = result.shards[2]
    name = next(item.path for item in shard.objects if "/data/" in item.path)
    path = tmp_path / "store" / f"{shard.db_key}/{name}"
    if how == "changed":
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(bytes(data))
    else:
        path.unlink()
    found = verify_snapshot(tmp_path / "store")
    assert not found.passed
    assert path.name in found.faults[0]
    assert found.recall is None


@pytest.mark.slow
def test_a_damaged_object_of_a_published_snapshot_is_healed(tmp_path: Path, place: dict[str, Any]) -> None:
    config = small_config(tmp_path, **place["fields"])
    first = build_snapshot(config, cache_dir=place["cache"])
    store = Store.open(config.store, config.s3)
    damaged = first.shards[1]
    key = f"{damaged.db_key}/{damaged.objects[0].path}"
    store.put(key, b"not what was sealed")
    assert not verify_snapshot(config.store, s3=config.s3).passed
    healed = build_snapshot(config, cache_dir=place["cache"])
    assert healed.published
    assert healed.run_id != first.run_id
    assert verify_snapshot(config.store, s3=config.s3).passed
    # The successor stands alone: with the published run gone, it still serves.
    for info in list(store.objects(f"shards/run_id={first.run_id}")):
        store.delete(info.key)
    for info in list(store.objects(f"vector_meta/run_id={first.run_id}")):
        store.delete(info.key)
    assert verify_snapshot(config.store, s3=config.s3).passed
    again = build_snapshot(config, cache_dir=place["cache"])
    assert (again.published, again.run_id) == (False, healed.run_id)


def test_one_shard_of_a_published_run_can_be_built_anew(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    first = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    with Build(small_config(tmp_path), cache_dir=tmp_path / "cache") as build:
        shard = stages.build_shard(build, first.run_id, 2, rebuild=True)
        assert (shard.attempt, shard.rows_digest) == (0, first.shards[2].rows_digest)
        assert shard.db_key != first.shards[2].db_key
        manifest = stages.assemble(build, first.run_id)
        assert manifest.run_id != first.run_id
        assert all(verdict.passed for verdict in stages.gate(build, manifest.run_id))
        promoted = stages.promote(build, manifest.run_id)
        assert (promoted.previous_run_id, promoted.seq) == (first.run_id, first.seq + 1)
        # Both snapshots of the history are whole.
        for entry in history(build.store):
            assert verify_snapshot(tmp_path / "store", manifest_key=entry.manifest_key).passed


def test_a_slow_older_build_does_not_overwrite_a_newer_one(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    slow, slow_run = assembled(small_config(tmp_path), tmp_path / "cache")
    write_source(tmp_path / "source.parquet", seed=2)
    quick = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    with slow:
        stages.gate(slow, slow_run)
        with pytest.raises(PublishConflictError) as caught:
            stages.promote(slow, slow_run)
    assert (caught.value.ours, caught.value.theirs) == (slow_run, quick.run_id)
    assert [entry.run_id for entry in history(slow.store)] == [quick.run_id]


# What is refused before any work.

BAD_CONFIGS: list[tuple[dict[str, Any], type[SfPipelinesError], str]] = [
    ({"colour": 1}, ConfigError, r"WriteConfig\.colour: unknown field"),
    ({"vector_spec": {"dim": 16, "metric": "manhattan"}}, ConfigError, r"vector_spec\.metric: .*'manhattan'"),
    ({"vector_spec": {"dim": 0}}, ConfigError, r"vector_spec\.dim: should be greater than 0 \(got 0\)"),
    ({"num_dbs": 0}, ConfigError, r"num_dbs: should be greater than 0"),
    ({"num_dbs": 601}, ConfigError, "601 shards for 600 rows"),
    ({"payload_cols": ("missing",)}, SourceSchemaError, "has a column missing; there are id, vector, title"),
    ({"id_col": "vector2"}, SourceSchemaError, "no column vector2"),
    ({"vector_spec": {"dim": 16, "vector_col": "title"}, "payload_cols": ()}, SourceSchemaError, "'title' is string"),
    ({"vector_spec": {"dim": 17}}, SourceSchemaError, "holds 16 numbers, but vector_spec.dim is 17"),
    ({"source": "nowhere/*.parquet"}, SourceNotFoundError, "nowhere"),
    ({"store": "/proc/sf_pipelines/store"}, StoreError, "cannot use /proc/sf_pipelines/store"),
    ({"store": "ftp://host/x"}, ConfigError, "unknown scheme ftp://"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD_CONFIGS)
def test_bad_config_is_a_typed_error_before_any_work(
    tmp_path: Path, change: dict[str, Any], kind: type[SfPipelinesError], message: str
) -> None:
    write_source(tmp_path / "source.parquet")
    with pytest.raises(kind, match=message):
        build_snapshot(small_config(tmp_path, **change))
    assert not (tmp_path / "store" / "staging").exists()


def test_a_bucket_that_is_not_there_is_an_error_at_scan(tmp_path: Path, moto_options: S3Options) -> None:
    write_source(tmp_path / "source.parquet")
    with pytest.raises(StoreError, match="s3://no-such-bucket/x"):
        build_snapshot(small_config(tmp_path, store="s3://no-such-bucket/x", s3=moto_options))


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    nothing = vector_table(np.empty((0, 16), np.float32), title=pa.array([], pa.string()))
    pq.write_table(nothing, tmp_path / "source.parquet")
    with pytest.raises(SourceEmptyError, match="no rows"):
        build_snapshot(small_config(tmp_path))


def test_a_source_that_changes_after_the_scan_is_noticed(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    with Build(small_config(tmp_path), cache_dir=tmp_path / "cache") as build:
        run_id = stages.scan(build).run_id
        write_source(tmp_path / "source.parquet", seed=1)
        with pytest.raises(SourceChangedError, match=r"source\.parquet changed while it was read"):
            stages.sample(build, run_id)
        assert history(build.store) == []
    assert build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache").run_id != run_id


def test_checked_rows_need_no_source_any_more(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    with Build(small_config(tmp_path), cache_dir=tmp_path / "cache") as build:
        run_id = stages.scan(build).run_id
        stages.sample(build, run_id)
        stages.train(build, run_id)
        (tmp_path / "source.parquet").unlink()
        assert stages.route(build, run_id).rows == 600


def test_checked_rows_that_were_damaged_are_noticed(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    with Build(small_config(tmp_path), cache_dir=tmp_path / "cache") as build:
        run_id = stages.scan(build).run_id
        parts = stages.sample(build, run_id).parts
        assert parts is not None
        stages.train(build, run_id)
        stored = tmp_path / "store" / parts[0].key
        data = bytearray(stored.read_bytes())
        data[len(data) // 2] ^= 1
        stored.write_bytes(bytes(data))
        with pytest.raises(DigestMismatchError, match="was recorded"):
            stages.route(build, run_id)


# Rejects.


def test_bad_rows_are_rejected_with_their_reason_and_nothing_is_lost(tmp_path: Path) -> None:
    vectors = clustered(400, 16)
    vectors[5, 3], vectors[7], vectors[9, 0] = np.nan, 0, np.inf
    ids = [str(n) for n in range(400)]
    ids[20], ids[390] = "19", "0"
    ids_column = pa.array([None if n == 30 else value for n, value in enumerate(ids)])
    (tmp_path / "lake").mkdir()
    for part in range(2):
        rows = slice(200 * part, 200 * part + 200)
        table = vector_table(vectors[rows], ids_column[rows], title=["t"] * 200)
        pq.write_table(table, tmp_path / "lake" / f"{part}.parquet")
    config = small_config(tmp_path, source=str(tmp_path / "lake"))
    with pytest.raises(DataContractError, match=r"6 of 400 rows were rejected .*more than max_reject_fraction 0\.0"):
        build_snapshot(config, cache_dir=tmp_path / "cache")
    result = build_snapshot(
        small_config(tmp_path, source=str(tmp_path / "lake"), max_reject_fraction=0.05), cache_dir=tmp_path / "cache"
    )
    assert (result.rows, result.rejected) == (394, 6)
    receipt = Ledger(Store.open(config.store), result.run_id).need(SampleReceipt)
    rejects = pq.read_table(tmp_path / "store" / receipt.rejects.key)
    found = {row["row"]: (row["reason"], row["source_file"], row["source_row"]) for row in rejects.to_pylist()}
    assert found == {
        5: ("not_finite", "0.parquet", 5),
        7: ("zero_norm", "0.parquet", 7),
        9: ("not_finite", "0.parquet", 9),
        20: ("duplicate_id", "0.parquet", 20),
        30: ("null_id", "0.parquet", 30),
        390: ("duplicate_id", "1.parquet", 190),
    }
    with ShardedVectorReader(config.store, cache_dir=tmp_path / "cache") as reader:
        answer = reader.search(vectors[19], top_k=400, num_probes=3)
    assert len(answer.results) == 394
    assert answer.results[0].id == "19"


# Odd tables.


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 17])
def test_tables_of_a_few_rows(tmp_path: Path, rows: int) -> None:
    vectors = write_source(tmp_path / "source.parquet", rows=rows)
    result = build_snapshot(small_config(tmp_path, num_dbs=min(rows, 3)), cache_dir=tmp_path / "cache")
    assert result.rows == rows
    with ShardedVectorReader(tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        for row in range(rows):
            assert reader.search(vectors[row], top_k=1, num_probes=1).results[0].id == row


def test_equal_vectors_leave_shards_empty_and_pass(tmp_path: Path) -> None:
    vectors = np.ones((50, 16), dtype=np.float32)
    pq.write_table(vector_table(vectors, title=["same"] * 50), tmp_path / "source.parquet")
    result = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    assert sorted(shard.rows for shard in result.shards) == [0, 0, 50]
    with ShardedVectorReader(tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        assert len(reader.search(vectors[0], top_k=60, num_probes=3).results) == 50
        assert [detail.vector_count for detail in reader.shard_details()] == [shard.rows for shard in result.shards]


@pytest.mark.slow
@pytest.mark.parametrize("index_type", ["flat", "ivf_flat", "ivf_sq", "hnsw", "hnsw_flat"])
@pytest.mark.parametrize("metric", ["cosine", "l2", "dot_product"])
def test_every_family_and_metric(tmp_path: Path, index_type: str, metric: str) -> None:
    vectors = write_source(tmp_path / "source.parquet", rows=900)
    spec = {"dim": 16, "metric": metric, "index_type": index_type}
    config = small_config(tmp_path, vector_spec=spec, recall_gate={"min_recall": 0.9})
    result = build_snapshot(config, cache_dir=tmp_path / "cache")
    truth = exact_scores(vectors[:30], vectors, config.vector_spec.metric)
    with ShardedVectorReader(tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        found = reader.search_arrays(vectors[:30], 10, num_probes=3)
    rows = np.arange(30)[:, None]
    assert np.allclose(found.scores, truth[rows, found.ids], atol=1e-9)
    hits = [len(set(found.ids[n]) & set(np.argsort(truth[n])[:10])) for n in range(30)]
    assert np.mean(hits) >= 9.5
    assert {verdict.name for verdict in result.verdicts if verdict.passed} >= set(stages.CHECKS[:4])


def test_receipts_are_readable_json_and_seal_the_objects(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    result = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    for shard in result.shards:
        said = json.loads((tmp_path / "store" / shard.key).read_bytes())
        for item in said["objects"]:
            data = (tmp_path / "store" / said["db_key"] / item["path"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (item["size"], item["sha256"])
