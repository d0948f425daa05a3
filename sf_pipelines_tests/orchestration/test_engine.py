"""A build that Dagster spreads over an engine: what of it is seen, and what is kept when a shard fails."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from sf_pipelines import ShardedVectorReader
from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines.orchestration.resources import EngineResource
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import RouteReceipt, ShardReceipt
from sf_pipelines_tests.engines.conftest import WORKERS, need
from sf_pipelines_tests.engines.damage import Damaged, damage
from sf_pipelines_tests.orchestration.conftest import ROWS, failures
from sf_pipelines_tests.orchestration.test_component import load

pytestmark = pytest.mark.slow

SHARDS = dg.AssetKey(["tiny", "shard_indexes"])
PARTITIONS = ("00000", "00001", "00002")
# The attributes of a defs.yaml.
YAML = """
name: tiny
source: {root}/source/*.parquet
store: {root}/snapshot
num_dbs: 3
payload_cols: [label]
vector_spec: {{dim: 64, vector_col: pixels, metric: cosine}}
recall_gate: {{k: 5, min_recall: 0.8, query_rows: 200}}
engine: {{type: dask, workers: 2}}
"""


@pytest.fixture(scope="module", autouse=True)
def _dask() -> None:
    need(importlib.util.find_spec("distributed") is not None, "distributed")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Address of a Dask scheduler with two workers."""
    from distributed import LocalCluster

    local: dict[str, Any] = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "memory_limit": None}
    # Typed as if its methods were all coroutines.
    made: Any = LocalCluster(n_workers=WORKERS, threads_per_worker=1, **local)
    with made as cluster:
        yield cluster.scheduler_address


def run(defs: dg.Definitions, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    """Everything in one run."""
    return defs.resolve_job_def("build_tiny").execute_in_process(instance=instance, raise_on_error=False)


def sealed(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> list[str]:
    """Lines of the run's log on shards that were built."""
    said = [entry.user_message for entry in instance.all_logs(result.run_id) if entry.dagster_event is None]
    return [line for line in said if " built and sealed in " in line]


def built(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> list[str]:
    """Shards that were built, by what the log calls them."""
    return sorted(line.partition(":")[0] for line in sealed(instance, result))


def build_steps(result: dg.ExecuteInProcessResult) -> set[str | None]:
    """Steps that built shards."""
    return {event.step_key for event in result.all_events if "build_shard" in (event.step_key or "")}


def test_an_engine_in_yaml(source: Path, tmp_path: Path, instance: dg.DagsterInstance) -> None:
    """All shards in one step, each of them seen."""
    _, defs = load(yaml.safe_load(YAML.format(root=tmp_path)))

    result = run(defs, instance)

    assert result.success, failures(result)
    assert build_steps(result) == {"tiny__shard_indexes.tiny_build_shard[shards]"}
    assert instance.get_materialized_partitions(SHARDS) == set(PARTITIONS)
    assert built(instance, result) == ["shard 0", "shard 1", "shard 2"]
    workers = {line.rpartition(", on worker ")[2] for line in sealed(instance, result)}
    assert 1 <= len(workers) <= WORKERS
    assert all(":" in worker for worker in workers)
    with ShardedVectorReader(tmp_path / "snapshot") as reader:
        assert reader.search(digits_table()["pixels"][3].as_py(), top_k=1).results[0].id == 3


def test_a_shard_that_fails_leaves_the_others(
    config: WriteConfig, scheduler: str, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named; the others are kept, green, and not built again when the run is repeated."""
    ours = build_snapshot_defs(config, engine="cluster")
    cluster = EngineResource(type="dask", address=scheduler)
    defs = dg.Definitions.merge(ours, dg.Definitions(resources={"cluster": cluster}))
    plain, damaged = stages.build_shards, []

    def of_damaged_rows(build: Build, run_id: str, shards: Sequence[int], **options: Any) -> list[ShardReceipt]:
        damaged.append((run_id, damage(build, build.ledger(run_id).need(RouteReceipt), db_id=0)))
        return plain(build, run_id, shards, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "build_shards", of_damaged_rows)
        failed = run(defs, instance)

    assert not failed.success
    ((step, why),) = failures(failed).items()
    assert step == "tiny__shard_indexes.tiny_build_shard[shards]"
    assert why.startswith("TasksFailedError: 1 of 3 tasks failed on engine dask: shard 0: IntegrityError: ")
    assert instance.get_materialized_partitions(SHARDS) == {"00001", "00002"}
    assert built(instance, failed) == ["shard 1", "shard 2"]
    ((run_id, rows),) = damaged
    kept = receipts(config, run_id)
    assert [receipt is not None for receipt in kept] == [False, True, True]
    with Build(config) as build:
        assert read_pointer(build.store).pointer is None

    repair(config, rows)
    again = run(defs, instance)

    assert again.success, failures(again)
    assert instance.get_materialized_partitions(SHARDS) == set(PARTITIONS)
    assert receipts(config, run_id)[1:] == kept[1:]
    assert built(instance, again) == ["shard 0"]
    attempts = sorted(path.parent.name for path in Path(config.store).glob("shards/*/*/attempt*"))
    assert attempts == ["db=00000", "db=00001", "db=00002"]
    with ShardedVectorReader(config.store) as reader:
        assert sum(shard.vector_count for shard in reader.shard_details()) == ROWS


def receipts(config: WriteConfig, run_id: str) -> list[ShardReceipt | None]:
    """Of the shards of a run."""
    with Build(config) as build:
        ledger = build.ledger(run_id)
        return [ledger.find(ShardReceipt, f"db={partition}") for partition in PARTITIONS]


def repair(config: WriteConfig, rows: Damaged) -> None:
    """Puts the right bytes back."""
    with Build(config) as build:
        build.store.put(rows.key, rows.before)
