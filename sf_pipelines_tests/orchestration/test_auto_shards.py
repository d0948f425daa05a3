"""``num_dbs: auto`` in Dagster: the partitions are those of the shards that a build has chosen."""

from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest

from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.run import sizing
from sf_pipelines_tests.orchestration.conftest import ROWS, failures, launch, make_config
from sf_pipelines_tests.orchestration.test_conditions import Daemon, published

SHARDS = dg.AssetKey(["tiny", "shard_indexes"])


@pytest.fixture
def config(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteConfig:
    """A shard is full with 100 rows, so the usual source makes four."""
    del source
    monkeypatch.setattr(sizing, "ROWS", 100)
    return make_config(tmp_path, num_dbs="auto")


def run(config: WriteConfig, instance: dg.DagsterInstance, job: str = "build_tiny") -> dg.ExecuteInProcessResult:
    found = build_snapshot_defs(config).resolve_job_def(job)
    result = found.execute_in_process(instance=instance, raise_on_error=False)
    assert result.success, failures(result)
    return result


def keys(*numbers: int) -> list[str]:
    return [f"{number:05d}" for number in numbers]


def told(instance: dg.DagsterInstance, noun: str) -> Any:
    event = instance.get_latest_materialization_event(dg.AssetKey(["tiny", noun]))
    assert event is not None
    assert event.asset_materialization is not None
    return event.asset_materialization.metadata


@pytest.mark.slow
@pytest.mark.parametrize("job", ["build_tiny", "build_now_tiny"])
def test_partitions_follow_the_shards(
    config: WriteConfig, instance: dg.DagsterInstance, tmp_path: Path, source: Path, job: str
) -> None:
    run(config, instance, job)
    assert instance.get_dynamic_partitions("tiny_shards") == keys(0, 1, 2, 3)
    assert instance.get_materialized_partitions(SHARDS) == set(keys(0, 1, 2, 3))
    assert told(instance, "source_vectors")["num_dbs"].value == 4
    assert "4 for 400 rows x 64" in str(told(instance, "source_vectors")["sizing"].value)

    pq.write_table(digits_table().slice(0, 3 * ROWS), source)
    run(config, instance, job)
    assert instance.get_dynamic_partitions("tiny_shards") == keys(*range(16))
    assert told(instance, "current_pointer")["dagster/row_count"].value == 3 * ROWS

    pq.write_table(digits_table().slice(0, ROWS), source)
    run(config, instance, job)
    assert instance.get_dynamic_partitions("tiny_shards") == keys(0, 1, 2, 3)
    assert told(instance, "manifest")["dagster/row_count"].value == ROWS


def test_one_shard_again(config: WriteConfig, instance: dg.DagsterInstance) -> None:
    run(config, instance)
    assert instance.get_materialized_partitions(SHARDS) == set(keys(0, 1, 2, 3))
    assert instance.get_dynamic_partitions("tiny_shards") == keys(0, 1, 2, 3)
    first = published(config)
    result = launch(config, instance, "shard_indexes", partition="00002")
    assert result.success, failures(result)
    rest = launch(config, instance, "manifest", "current_pointer")
    assert rest.success, failures(rest)
    assert published(config) != first


def test_two_snapshots_have_their_own(config: WriteConfig, instance: dg.DagsterInstance, tmp_path: Path) -> None:
    run(config, instance)
    other = make_config(tmp_path, num_dbs="auto", store=str(tmp_path / "other"))
    defs = build_snapshot_defs(other, key_prefix="search")
    job = defs.resolve_job_def("build_search__tiny")
    assert job.execute_in_process(instance=instance).success
    assert instance.get_dynamic_partitions("search__tiny_shards") == instance.get_dynamic_partitions("tiny_shards")


@pytest.mark.slow
def test_conditions_ask_for_shards_that_a_build_has_chosen(
    config: WriteConfig, instance: dg.DagsterInstance, source: Path
) -> None:
    daemon = Daemon(config, instance)
    daemon.tick()
    daemon.touch_source()
    asked = daemon.settle()
    first = published(config)
    assert first is not None, asked
    assert instance.get_materialized_partitions(SHARDS) == set(keys(0, 1, 2, 3))
    pq.write_table(digits_table().slice(0, 3 * ROWS), source)
    daemon.touch_source()
    asked = daemon.settle()
    assert published(config) != first, asked
    assert sum("manifest" in nouns for nouns in asked) == 1
    assert instance.get_materialized_partitions(SHARDS) == set(keys(*range(16)))
