"""Declarative automation: fan-in waits for all shards, the pointer for the checks."""

from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest

from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines_tests.orchestration.conftest import ROWS, failures, make_config

UPSTREAM = dg.AssetKey(["lake", "digits"])


class Daemon:
    """Evaluates the conditions and executes what they ask for, like the daemon: run after run, tick after tick."""

    def __init__(self, config: WriteConfig, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        ours = build_snapshot_defs(config, automation={}, source_assets=[UPSTREAM])
        self.defs = dg.Definitions.merge(ours, dg.Definitions(assets=[dg.AssetSpec(UPSTREAM)]))
        self.graph = self.defs.resolve_asset_graph()
        self.cursor: Any = None

    def tick(self) -> dict[str, set[str | None]]:
        """What is requested: partitions by noun."""
        result = dg.evaluate_automation_conditions(self.defs, instance=self.instance, cursor=self.cursor)
        self.cursor = result.cursor
        found = {key: set(result.get_requested_partitions(key)) for key in self.graph.materializable_asset_keys}
        return {key.path[-1]: parts for key, parts in found.items() if parts}

    def execute(self, requested: dict[str, set[str | None]]) -> list[dg.ExecuteInProcessResult]:
        """One run for the unpartitioned assets, with their checks, and one for each shard."""
        job = self.defs.resolve_implicit_global_asset_job_def()
        results: list[dg.ExecuteInProcessResult] = []
        for partition in sorted({part for parts in requested.values() for part in parts}, key=lambda part: part or ""):
            nouns = [noun for noun, parts in requested.items() if partition in parts]
            results.append(
                job.execute_in_process(
                    instance=self.instance,
                    asset_selection=[dg.AssetKey(["tiny", noun]) for noun in nouns],
                    partition_key=partition,
                    raise_on_error=False,
                )
            )
        return results

    def settle(self) -> list[list[str]]:
        """Ticks until nothing is requested; what was requested at each."""
        seen: list[list[str]] = []
        for _ in range(10):
            requested = self.tick()
            if not requested:
                return seen
            seen.append(sorted(requested))
            self.execute(requested)
        raise AssertionError(f"still asking after {seen}")

    def touch_source(self) -> None:
        self.instance.report_runless_asset_event(dg.AssetMaterialization(UPSTREAM))


@pytest.fixture
def daemon(config: WriteConfig, instance: dg.DagsterInstance) -> Daemon:
    return Daemon(config, instance)


def published(config: WriteConfig) -> bytes | None:
    path = Path(config.store, "_CURRENT")
    return path.read_bytes() if path.exists() else None


@pytest.mark.slow
def test_a_new_source_flows_to_the_pointer(daemon: Daemon, config: WriteConfig, source: Path) -> None:
    daemon.tick()
    daemon.touch_source()
    asked = daemon.settle()
    assert published(config) is not None, asked
    first = published(config)
    for nouns in asked:
        assert not {"manifest", "shard_indexes"} <= set(nouns), "the manifest is asked for beside the shards"
        assert not {"manifest", "current_pointer"} <= set(nouns), "the pointer is asked for beside the checks"

    pq.write_table(digits_table().slice(0, ROWS + 40), source)
    daemon.touch_source()
    asked = daemon.settle()
    assert published(config) != first, asked
    assert sum("manifest" in nouns for nouns in asked) == 1
    assert sum("current_pointer" in nouns for nouns in asked) == 1


@pytest.mark.slow
def test_one_new_shard_is_not_enough_for_the_manifest(daemon: Daemon, config: WriteConfig, source: Path) -> None:
    daemon.tick()
    daemon.touch_source()
    daemon.settle()
    pq.write_table(digits_table().slice(0, ROWS + 40), source)
    daemon.touch_source()
    requested = daemon.tick()
    while "shard_indexes" not in requested:
        daemon.execute(requested)
        requested = daemon.tick()
    (first,) = daemon.execute({"shard_indexes": {"00000"}})
    assert first.success, failures(first)
    assert "manifest" not in daemon.tick()
    for partition in ("00001", "00002"):
        daemon.execute({"shard_indexes": {partition}})
    assert "manifest" in daemon.tick()


@pytest.mark.slow
def test_a_failed_blocking_check_keeps_the_pointer(
    daemon: Daemon, config: WriteConfig, instance: dg.DagsterInstance, tmp_path: Path, source: Path
) -> None:
    daemon.tick()
    daemon.touch_source()
    daemon.settle()
    before = published(config)
    strict = Daemon(
        make_config(
            tmp_path,
            recall_gate={"k": 5, "min_recall": 1.0, "query_rows": 200},
            vector_spec={"dim": 64, "vector_col": "pixels", "metric": "cosine", "sharding": {"num_probes": 1}},
        ),
        instance,
    )
    strict.tick()
    pq.write_table(digits_table().slice(0, ROWS + 40), source)
    strict.touch_source()
    asked = strict.settle()
    assert any("manifest" in nouns for nouns in asked), asked
    assert not any("current_pointer" in nouns for nouns in asked), asked
    assert published(config) == before


def requested(defs: dg.Definitions, instance: dg.DagsterInstance, before: Any = None) -> tuple[set[str], Any]:
    """Nouns of the snapshot that one look at the conditions asks for, and the cursor after it."""
    found = dg.evaluate_automation_conditions(defs, instance=instance, cursor=before)
    keys = defs.resolve_asset_graph().materializable_asset_keys
    return {key.path[-1] for key in keys if found.get_requested_partitions(key)}, found.cursor


def test_a_missing_partition_of_the_source_keeps_no_rebuild_waiting(
    config: WriteConfig, instance: dg.DagsterInstance
) -> None:
    days = dg.StaticPartitionsDefinition(["monday", "tuesday", "wednesday"])
    names = dg.AssetKey(["lake", "names"])
    upstream = dg.Definitions(assets=[dg.AssetSpec(UPSTREAM, partitions_def=days), dg.AssetSpec(names)])
    defs = dg.Definitions.merge(
        build_snapshot_defs(config, automation={}, source_assets=[UPSTREAM, names]),
        upstream,
    )
    asked, cursor = requested(defs, instance)
    assert asked == set()

    # What has nothing at all is waited for.
    instance.report_runless_asset_event(dg.AssetMaterialization(UPSTREAM, partition="monday"))
    asked, cursor = requested(defs, instance, cursor)
    assert asked == set()
    instance.report_runless_asset_event(dg.AssetMaterialization(names))
    asked, cursor = requested(defs, instance, cursor)
    assert "source_vectors" in asked

    asked, cursor = requested(defs, instance, cursor)
    assert asked == set()
    instance.report_runless_asset_event(dg.AssetMaterialization(UPSTREAM, partition="monday"))
    asked, cursor = requested(defs, instance, cursor)
    assert "source_vectors" in asked


def test_conditions_are_off_unless_asked_for(config: WriteConfig) -> None:
    graph = build_snapshot_defs(config).resolve_asset_graph()
    assert all(graph.get(key).automation_condition is None for key in graph.get_all_asset_keys())
    made = build_snapshot_defs(config, automation={"default_status": "running"})
    sensor = made.resolve_sensor_def("tiny_automation_sensor")
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
