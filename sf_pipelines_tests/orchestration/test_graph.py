"""The graph on a real Dagster instance: one run, one shard alone, the gate, several snapshots."""

import json
import os
from collections import Counter
from importlib import import_module
from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest

from sf_pipelines import ShardedVectorReader
from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines.orchestration.graph import Graph
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import IndexBuildError
from sf_pipelines.snapshot.gate.verdicts import CHECKS
from sf_pipelines.snapshot.manifest.record import read_record
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import ShardReceipt
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.orchestration.conftest import ROWS, failures, launch, make_config, run_job

NOUNS = (
    "source_vectors",
    "training_data",
    "centroids",
    "routed_vectors",
    "shard_indexes",
    "manifest",
    "current_pointer",
)


def pointer(config: WriteConfig) -> dict[str, object] | None:
    path = Path(config.store, "_CURRENT")
    return json.loads(path.read_bytes()) if path.exists() else None


def manifests(config: WriteConfig) -> list[str]:
    folder = Path(config.store, "manifests")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def newest(instance: dg.DagsterInstance, config: WriteConfig, noun: str) -> dg.AssetMaterialization:
    event = instance.get_latest_materialization_event(dg.AssetKey([config.name, noun]))
    assert event is not None
    assert event.asset_materialization is not None
    return event.asset_materialization


def data_version(event: dg.AssetMaterialization) -> str:
    assert event.tags is not None
    return event.tags["dagster/data_version"]


def test_one_run_builds_everything(config: WriteConfig, instance: dg.DagsterInstance) -> None:
    result = run_job(config, instance)

    assert result.success, failures(result)
    graph = Graph(config)
    for noun in NOUNS:
        assert newest(instance, config, noun).metadata, noun
    done = instance.get_materialized_partitions(graph.asset("shard_indexes"))
    assert done == {"00000", "00001", "00002"}
    verdicts = {event.check_name: event for event in result.get_asset_check_evaluations()}
    assert set(verdicts) == set(CHECKS)
    assert all(verdicts[name].passed for name in CHECKS[:4])
    assert float(str(verdicts["recall"].metadata["recall"].value)) > 0.8
    rows = [newest_partition(instance, config, partition).metadata["dagster/row_count"].value for partition in done]
    assert sum(int(str(value)) for value in rows) == ROWS
    assert newest(instance, config, "current_pointer").metadata["published"].value is True
    assert_numbers(instance, config)
    assert_sample_searches(verdicts["search_round_trip"])
    lines = [entry.user_message for entry in instance.all_logs(result.run_id) if entry.dagster_event is None]
    for start in (
        "sample: 400 of 400 rows (100 %)",
        "route: 400 of 400 rows",
        "shard 2: ",
        "recall: recall@5",
        "drift: ",
    ):
        assert any(line.startswith(start) for line in lines), start
    with ShardedVectorReader(config.store) as reader:
        probe = digits_table()["pixels"][3].as_py()
        assert reader.search(probe, top_k=1).results[0].id == 3


# What the UI plots over time, under keys that stay.
NUMBERS = {
    "source_vectors": {"dagster/row_count", "seconds", "files", "MiB"},
    "training_data": {"dagster/row_count", "seconds", "rows_in", "rejected", "reject_rate"},
    "centroids": {"seconds"},
    "routed_vectors": {"dagster/row_count", "seconds", "largest_shard_rows", "smallest_shard_rows"},
    "shard_indexes": {"dagster/row_count", "seconds", "MiB"},
    "manifest": {
        "dagster/row_count",
        "seconds",
        "num_probes",
        "tuning_recall",
        "build_seconds",
        "sample_seconds",
        "train_seconds",
        "route_seconds",
        "shards_seconds",
        "assemble_seconds",
        "stored_MiB",
        "shards_copied",
    },
    "current_pointer": {"seconds", "seq"},
}


def assert_numbers(instance: dg.DagsterInstance, config: WriteConfig) -> None:
    for noun, keys in NUMBERS.items():
        metadata = newest(instance, config, noun).metadata
        numbers = {
            key for key, value in metadata.items() if isinstance(value, dg.IntMetadataValue | dg.FloatMetadataValue)
        }
        assert keys <= numbers, noun


def assert_sample_searches(check: dg.AssetCheckEvaluation) -> None:
    shown = check.metadata["table"]
    assert isinstance(shown, dg.TableMetadataValue)
    rows = [record.data for record in shown.records]
    labels = digits_table()["label"].to_pylist()
    assert len(rows) == 5
    assert {row["shard"] for row in rows} == {0, 1, 2}
    for row in rows:
        assert (row["found_at"], row["payload"]) == (1, f"label: {labels[int(str(row['row']))]}")
        assert row["other_payload"] == f"label: {labels[int(str(row['nearest_other']))]}"
        assert float(str(row["score"])) < float(str(row["other_score"]))


def newest_partition(instance: dg.DagsterInstance, config: WriteConfig, partition: str) -> dg.AssetMaterialization:
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(dg.AssetKey([config.name, "shard_indexes"]), asset_partitions=[partition]), limit=1
    ).records
    assert records[0].asset_materialization is not None
    return records[0].asset_materialization


@pytest.mark.slow
def test_an_unchanged_source_publishes_nothing_and_keeps_data_versions(
    config: WriteConfig, instance: dg.DagsterInstance
) -> None:
    assert run_job(config, instance).success
    before, first = pointer(config), {noun: newest(instance, config, noun) for noun in NOUNS}

    result = run_job(config, instance)

    assert result.success, failures(result)
    assert pointer(config) == before
    assert len(manifests(config)) == 1
    last = newest(instance, config, "current_pointer")
    assert last.metadata["published"].value is False
    assert "nothing is new" in str(last.metadata["reason"].value)
    for noun in NOUNS:
        assert data_version(newest(instance, config, noun)) == data_version(first[noun]), noun


@pytest.mark.slow
def test_a_changed_source_is_published_as_a_new_snapshot(
    config: WriteConfig, instance: dg.DagsterInstance, source: Path
) -> None:
    assert run_job(config, instance).success
    before = pointer(config)
    pq.write_table(digits_table().slice(0, ROWS + 50), source)

    result = run_job(config, instance)

    assert result.success, failures(result)
    after = pointer(config)
    assert before is not None
    assert after is not None
    assert after["run_id"] != before["run_id"]
    assert newest(instance, config, "current_pointer").metadata["previous_run_id"].value == before["run_id"]
    drift = next(event for event in result.get_asset_check_evaluations() if event.check_name == "drift").metadata
    assert [drift[name].value for name in ("rows_added", "rows_gone", "rows_changed")] == [50, 0, 0]
    for name in ("overlap", "gone_fraction", "centroids_shift_mean", "centroids_shift_largest"):
        assert isinstance(drift[name], dg.FloatMetadataValue), name
    assert isinstance(drift["table"], dg.TableMetadataValue)


def test_a_gate_that_is_not_met_fails_the_run_and_keeps_the_pointer(
    config: WriteConfig, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    assert run_job(config, instance).success
    before = pointer(config)
    strict = make_config(
        tmp_path,
        recall_gate={"k": 5, "min_recall": 1.0, "query_rows": 200},
        vector_spec={"dim": 64, "vector_col": "pixels", "metric": "cosine", "sharding": {"num_probes": 1}},
    )

    result = run_job(strict, instance)

    assert not result.success
    verdicts = {event.check_name: event for event in result.get_asset_check_evaluations()}
    assert not verdicts["recall"].passed
    assert verdicts["recall"].severity == dg.AssetCheckSeverity.ERROR
    assert verdicts["recall"].metadata["min_recall"].value == "1.0"
    assert set(verdicts) == set(CHECKS)
    told = failures(result)["tiny_gate"]
    assert before is not None
    for said in (
        "GateFailedError",
        "below min_recall 1.0",
        "set num_probes to",
        f"Run {before['run_id']} keeps serving",
    ):
        assert said in told, told
    assert pointer(config) == before
    assert len(manifests(config)) == 1

    alone = launch(strict, instance, "current_pointer")

    assert not alone.success
    assert "recall" in failures(alone)["tiny__current_pointer"]
    assert "GateFailedError" in failures(alone)["tiny__current_pointer"]
    assert pointer(config) == before
    assert len(manifests(config)) == 1


def test_what_is_served_is_told_first_and_in_figures_for_people(
    config: WriteConfig, instance: dg.DagsterInstance
) -> None:
    result = run_job(config, instance)
    (event,) = result.asset_materializations_for_node("tiny__current_pointer")
    names = list(event.metadata)
    assert names[:5] == ["recall", "recall_lower_bound", "dagster/row_count", "MiB", "since"]
    assert names[-3:] == ["run_id", "receipt", "seconds"]
    for evaluation in result.get_asset_check_evaluations():
        for name, value in evaluation.metadata.items():
            plotted = isinstance(value, dg.FloatMetadataValue | dg.IntMetadataValue)
            assert not (plotted and name in {"k", "limit", "queries", "min_recall"}), (evaluation.check_name, name)
            if isinstance(value, dg.FloatMetadataValue) and value.value is not None:
                assert len(f"{value.value:.12g}") <= 8, (evaluation.check_name, name, value.value)


def partition_events(instance: dg.DagsterInstance, key: dg.AssetKey) -> dict[str, int]:
    """Materializations of each partition."""
    records = instance.fetch_materializations(key, limit=1000).records
    return dict(Counter(str(record.partition_key) for record in records))


def test_each_shard_is_materialized_once_a_run(config: WriteConfig, instance: dg.DagsterInstance) -> None:
    key = Graph(config).asset("shard_indexes")
    assert run_job(config, instance).success
    assert partition_events(instance, key) == {"00000": 1, "00001": 1, "00002": 1}
    (record, *_) = instance.fetch_materializations(key, limit=1).records
    assert record.asset_materialization is not None
    tags, facts = record.asset_materialization.tags or {}, record.asset_materialization.metadata
    routed = instance.get_latest_materialization_event(Graph(config).asset("routed_vectors"))
    assert routed is not None
    assert routed.asset_materialization is not None
    before = (routed.asset_materialization.tags or {})["dagster/data_version"]
    assert tags["dagster/input_data_version/tiny/routed_vectors"] == before
    assert {"dagster/row_count", "MiB", "seconds", "receipt"} <= set(facts)
    assert run_job(config, instance).success
    assert partition_events(instance, key) == {"00000": 2, "00001": 2, "00002": 2}


def build_now(config: WriteConfig, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    """The job with a Launchpad, as it is launched from there."""
    job = build_snapshot_defs(config).resolve_job_def(f"build_now_{config.name}")
    return job.execute_in_process(instance=instance, raise_on_error=False)


def test_build_now_is_one_step_that_tells_what_the_assets_tell(
    config: WriteConfig, instance: dg.DagsterInstance
) -> None:
    graph = Graph(config)
    result = build_now(config, instance)
    assert result.success
    assert [event.step_key for event in result.all_events if event.is_step_success] == ["tiny_build_now"]
    assert partition_events(instance, graph.asset("shard_indexes")) == {"00000": 1, "00001": 1, "00002": 1}
    told = {
        event.asset_key.path[-1]: event.step_materialization_data.materialization
        for event in result.all_events
        if event.is_step_materialization and event.asset_key
    }
    assert set(told) == set(NOUNS)
    verdicts = {event.check_name: event.passed for event in result.get_asset_check_evaluations()}
    assert set(verdicts) == set(CHECKS)
    first = pointer(config)
    assert first is not None
    assert told["current_pointer"].metadata["run_id"].value == first["run_id"]

    # Nothing is marked as outdated by what it was made from.
    defs = build_snapshot_defs(config)
    resolver = CachingStaleStatusResolver(instance, defs.resolve_asset_graph(), LoadingContextForTest(instance))
    for noun in NOUNS:
        partition = "00001" if noun == "shard_indexes" else None
        causes = resolver.get_stale_causes(graph.asset(noun), partition)
        assert not causes, (noun, causes)

    # What comes after in the graph goes on from what it built, and it from what the assets built.
    assert launch(config, instance, "manifest").success
    assert launch(config, instance, "current_pointer").success
    assert pointer(config) == first
    again = run_job(config, instance)
    assert again.success
    assert pointer(config) == first
    versions = {noun: (told[noun].tags or {})["dagster/data_version"] for noun in NOUNS if noun != "shard_indexes"}
    for noun, version in versions.items():
        latest = instance.get_latest_materialization_event(graph.asset(noun))
        assert latest is not None
        assert latest.asset_materialization is not None
        assert (latest.asset_materialization.tags or {})["dagster/data_version"] == version, noun


def test_build_now_fails_with_what_the_gate_found(
    config: WriteConfig, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    del config
    spec = {"dim": 64, "vector_col": "pixels", "metric": "cosine", "sharding": {"num_probes": 1}}
    strict = make_config(tmp_path, recall_gate={"k": 5, "min_recall": 1.0, "query_rows": 200}, vector_spec=spec)
    result = build_now(strict, instance)
    assert not result.success
    assert "below min_recall 1.0" in failures(result)["tiny_build_now"]
    verdicts = {event.check_name: event.passed for event in result.get_asset_check_evaluations()}
    assert not verdicts["recall"]
    assert set(verdicts) == set(CHECKS)
    assert pointer(strict) is None


@pytest.mark.slow
def test_the_pointer_launched_alone_waits_for_verdicts(config: WriteConfig, instance: dg.DagsterInstance) -> None:
    for nouns in (NOUNS[:4], ["manifest"]):
        if nouns == ["manifest"]:
            for partition in Graph(config).partitions.get_partition_keys():
                assert launch(config, instance, "shard_indexes", partition=partition).success
        defs = build_snapshot_defs(config)
        made = dg.materialize(
            list(defs.assets or ()),  # pyright: ignore[reportArgumentType]
            selection=[dg.AssetKey([config.name, noun]) for noun in nouns],
            resources=defs.resources,
            instance=instance,
        )
        assert made.success

    result = launch(config, instance, "current_pointer")

    assert not result.success
    assert "GateMissingError" in failures(result)["tiny__current_pointer"]
    assert pointer(config) is None
    assert manifests(config) == []


@pytest.mark.slow
def test_one_shard_is_rebuilt_alone(config: WriteConfig, instance: dg.DagsterInstance) -> None:
    assert launch(config, instance, *NOUNS[:4]).success
    for partition in ("00000", "00001", "00002"):
        assert launch(config, instance, "shard_indexes", partition=partition).success
    untouched = newest_partition(instance, config, "00000").metadata["receipt"]

    result = launch(config, instance, "shard_indexes", partition="00001")

    assert result.success, failures(result)
    assert newest_partition(instance, config, "00000").metadata["receipt"] == untouched
    attempts = sorted(path.name for path in Path(config.store).glob("shards/*/db=00001/*"))
    assert [name[:10] for name in attempts] == ["attempt=00", "attempt=01"]

    rest = launch(config, instance, "manifest", "current_pointer")

    assert rest.success, failures(rest)
    published = pointer(config)
    assert published is not None
    with ShardedVectorReader(config.store) as reader:
        assert attempts[1] in str(reader.shard_details()[1].db_url)


@pytest.mark.slow
def test_one_shard_of_a_published_snapshot_is_rebuilt_alone(config: WriteConfig, instance: dg.DagsterInstance) -> None:
    assert run_job(config, instance).success
    before = pointer(config)
    assert before is not None

    result = launch(config, instance, "shard_indexes", partition="00001")

    assert result.success, failures(result)
    assert pointer(config) == before

    rest = launch(config, instance, "manifest", "current_pointer")

    assert rest.success, failures(rest)
    after = pointer(config)
    assert after is not None
    assert after["run_id"] != before["run_id"]
    with ShardedVectorReader(config.store) as reader:
        assert sum(shard.vector_count for shard in reader.shard_details()) == ROWS
    again = run_job(config, instance)
    assert again.success, failures(again)
    assert pointer(config) == after


def reexecutable_job() -> dg.JobDefinition:
    """The job of the snapshot below the folder that the environment names."""
    return build_snapshot_defs(make_config(Path(os.environ["SF_PIPELINES_TEST_ROOT"]))).resolve_job_def("build_tiny")


@pytest.mark.slow
def test_reexecution_from_failure_builds_only_the_failed_shard(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SF_PIPELINES_TEST_ROOT", str(tmp_path))
    built: list[int] = []
    broken = {1}
    build_shard = stages.build_shard

    def fragile(build: Build, run_id: str, db_id: int, *, rebuild: bool = False) -> ShardReceipt:
        if db_id in broken:
            raise IndexBuildError("shard 1 is broken today")
        built.append(db_id)
        return build_shard(build, run_id, db_id, rebuild=rebuild)

    monkeypatch.setattr(import_module("sf_pipelines.snapshot.stages.shard"), "build_shard", fragile)
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance:
        job = dg.reconstructable(reexecutable_job)
        tags = dict(reexecutable_job().tags)
        with dg.execute_job(job, instance, tags=tags) as failed:
            assert not failed.success
        done = instance.get_materialized_partitions(dg.AssetKey(["tiny", "shard_indexes"]))
        assert (built, done) == ([0, 2], {"00000", "00002"})
        broken.clear()

        options = dg.ReexecutionOptions.from_failure(failed.run_id, instance)
        with dg.execute_job(job, instance, reexecution_options=options) as repaired:
            assert repaired.success
        assert built == [0, 2, 1]
    assert pointer(make_config(tmp_path)) is not None


@pytest.mark.parametrize("noun", NOUNS)
def test_every_asset_can_be_launched_alone(config: WriteConfig, noun: str) -> None:
    job = build_snapshot_defs(config).resolve_implicit_global_asset_job_def()
    # What the webserver and the backfill daemon ask for before they launch a run.
    assert job.get_subset(asset_selection={dg.AssetKey([config.name, noun])}).get_job_snapshot()


@pytest.mark.slow
def test_a_missing_shard_stops_the_manifest(config: WriteConfig, instance: dg.DagsterInstance) -> None:
    assert launch(config, instance, *NOUNS[:4]).success
    for partition in ("00000", "00002"):
        assert launch(config, instance, "shard_indexes", partition=partition).success

    result = launch(config, instance, "manifest")

    assert not result.success
    assert "00001" in failures(result)["tiny__manifest"]


@pytest.mark.slow
def test_two_snapshots_live_side_by_side(source: Path, tmp_path: Path, instance: dg.DagsterInstance) -> None:
    one = make_config(tmp_path)
    other = make_config(
        tmp_path,
        name="other",
        store=str(tmp_path / "other"),
        num_dbs=2,
        vector_spec={"dim": 64, "vector_col": "pixels", "metric": "l2"},
    )
    merged = dg.Definitions.merge(build_snapshot_defs(one), build_snapshot_defs(other, backfill="run_per_shard"))
    dg.Definitions.validate_loadable(merged)

    for config in (one, other):
        result = merged.resolve_job_def(f"build_{config.name}").execute_in_process(instance=instance)
        assert result.success
    for config, shards in ((one, 3), (other, 2)):
        with ShardedVectorReader(config.store) as reader:
            assert reader.snapshot_info().num_dbs == shards
            assert str(reader.snapshot_info().metric) == str(config.vector_spec.metric)


@pytest.mark.parametrize("noun", ["training_data", "shard_indexes", "manifest", "current_pointer"])
def test_an_asset_before_its_input_says_what_to_do(
    config: WriteConfig, instance: dg.DagsterInstance, noun: str
) -> None:
    result = launch(config, instance, noun, partition="00000" if noun == "shard_indexes" else None)

    assert not result.success
    assert any("materialize it first" in reason for reason in failures(result).values())


def test_code_references_lead_to_the_stages(config: WriteConfig) -> None:
    graph = build_snapshot_defs(config).get_repository_def().asset_graph
    found = {
        noun: graph.get(dg.AssetKey([config.name, noun])).metadata["dagster/code_references"].value.code_references
        for noun in NOUNS
    }
    functions = ("scan", "sample", "train", "route", "build_shard", "assemble", "promote")
    for noun, name in zip(NOUNS, functions, strict=True):
        (place,) = found[noun]
        line = Path(place.file_path).read_text(encoding="utf-8").splitlines()[place.line_number - 1]
        assert line.startswith(f"def {name}("), noun


def test_a_failed_gate_gives_the_lease_back(config: WriteConfig, instance: dg.DagsterInstance) -> None:
    strict = config.model_copy(update={"max_shard_skew": 1.0})
    assert not run_job(strict, instance).success
    store = Store.open(config.store)
    (found,) = [read_record(store, info.key) for info in store.objects("runs")]
    assert (found.status, found.error_type) == ("failed", "GateFailedError")
    assert "shard_balance" in str(found.error_message)
    assert not found.alive(found.updated_at)
