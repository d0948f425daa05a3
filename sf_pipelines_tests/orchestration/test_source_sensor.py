"""The source sensor on a real instance: local files, real builds."""

import os
import time
from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq
import pytest

from sf_pipelines import ShardedVectorReader
from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines.orchestration import SnapshotOptions, build_snapshot_defs, source_sensor
from sf_pipelines.orchestration.graph import SNAPSHOT_TAG
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import IndexBuildError, SfPipelinesError, StoreError, StoreUnavailableError
from sf_pipelines_tests.orchestration.conftest import ROWS, failures, run_job
from sf_pipelines_tests.orchestration.ticks import Sensor, Tick, run_request, snapshot_sensor


@pytest.fixture
def sensor(config: WriteConfig, instance: dg.DagsterInstance) -> Sensor:
    return snapshot_sensor(config, instance, "source", settle_seconds=0)


def only(tick: Tick) -> dg.RunRequest:
    assert len(tick.requests) == 1, tick.reason
    return tick.requests[0]


def why(tick: Tick) -> str:
    assert not tick.requests
    return tick.reason


def rows_served(config: WriteConfig) -> int:
    with ShardedVectorReader(config.store) as reader:
        return sum(shard.vector_count for shard in reader.shard_details())


def test_new_files_become_a_new_snapshot(sensor: Sensor, config: WriteConfig, source: Path) -> None:
    request = only(sensor.tick())
    assert request.tags[SNAPSHOT_TAG] == "tiny"
    assert request.tags["sf_pipelines/source_files"] == "1"
    built = sensor.run(request)
    assert built.success, failures(built)
    assert "Nothing has changed" in why(sensor.tick())

    for number in range(2):
        rows = digits_table().slice(ROWS + 30 * number, 30)
        pq.write_table(rows, source.with_name(f"more-{number}.parquet"))
    again = only(sensor.tick())
    assert again.tags["sf_pipelines/source_files"] == "3"
    assert sensor.run(again).success
    assert rows_served(config) == ROWS + 60
    assert "Nothing has changed" in why(sensor.tick())


@pytest.mark.slow
def test_what_is_published_already_is_not_built_again(
    sensor: Sensor, config: WriteConfig, instance: dg.DagsterInstance, source: Path
) -> None:
    assert run_job(config, instance).success

    assert "exactly these 1 file" in why(sensor.tick())
    assert "Nothing has changed" in why(sensor.tick())
    pq.write_table(digits_table().slice(0, ROWS - 1), source)
    only(sensor.tick())


@pytest.mark.slow
def test_the_first_look_builds_what_differs_from_the_published_source(
    sensor: Sensor, config: WriteConfig, instance: dg.DagsterInstance, source: Path
) -> None:
    assert run_job(config, instance).success
    pq.write_table(digits_table().slice(0, 30), source.with_name("late.parquet"))
    only(sensor.tick())


def test_deleted_rewritten_and_late_files_are_noticed(sensor: Sensor, source: Path) -> None:
    only(sensor.tick())
    late = source.with_name("late.parquet")
    pq.write_table(digits_table().slice(ROWS, 20), late)
    os.utime(late, (0, 0))
    only(sensor.tick())
    before = late.stat()
    data = late.read_bytes()
    late.write_bytes(data[:-1] + data[-1:])
    os.utime(late, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    only(sensor.tick())
    late.unlink()
    only(sensor.tick())
    keys = {key.split(":")[1] for key in sensor.run_keys}
    assert keys == {"1", "2", "3", "4"}


@pytest.mark.slow
def test_a_failed_run_is_not_repeated_but_a_changed_source_is_built(
    sensor: Sensor, config: WriteConfig, source: Path
) -> None:
    good = source.read_bytes()
    source.write_bytes(b"PAR1 but damaged")
    failed = sensor.run(only(sensor.tick()))
    assert not failed.success
    for _ in range(3):
        assert "Nothing has changed" in why(sensor.tick())
    source.write_bytes(good)
    repaired = sensor.run(only(sensor.tick()))
    assert repaired.success, failures(repaired)
    assert rows_served(config) == ROWS


@pytest.mark.parametrize(
    ("error", "runs"), [pytest.param(StoreUnavailableError, 3, marks=pytest.mark.slow), (IndexBuildError, 1)]
)
def test_only_what_may_pass_is_asked_for_again_and_not_for_ever(
    sensor: Sensor, monkeypatch: pytest.MonkeyPatch, error: type[SfPipelinesError], runs: int
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error("today it does not work")

    monkeypatch.setattr(stages, "scan", failing)
    for _ in range(runs):
        assert not sensor.run(only(sensor.tick())).success
    for _ in range(2):
        assert "Nothing has changed" in why(sensor.tick())


def test_a_run_that_goes_on_is_waited_for(sensor: Sensor, instance: dg.DagsterInstance, source: Path) -> None:
    only(sensor.tick())
    job = sensor.defs.resolve_job_def("build_tiny")
    run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    pq.write_table(digits_table().slice(0, 30), source.with_name("more.parquet"))
    assert "a build is running" in why(sensor.tick())
    assert "a build is running" in why(sensor.tick())
    instance.report_run_canceled(run)
    only(sensor.tick())


def test_a_run_that_died_with_its_machine_is_not_waited_for(
    sensor: Sensor, instance: dg.DagsterInstance, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(sensor.tick())
    job = sensor.defs.resolve_job_def("build_tiny")
    run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    instance.report_engine_event("the last that was heard of it", run)
    pq.write_table(digits_table().slice(0, 30), source.with_name("more.parquet"))
    now = time.time()
    monkeypatch.setattr(source_sensor.time, "time", lambda: now + 0.9 * source_sensor.SILENCE.total_seconds())
    assert "a build is running" in why(sensor.tick())
    monkeypatch.setattr(source_sensor.time, "time", lambda: now + 1.1 * source_sensor.SILENCE.total_seconds())
    only(sensor.tick())


def test_a_run_that_waits_in_the_queue_is_waited_for(
    sensor: Sensor, instance: dg.DagsterInstance, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(sensor.tick())
    job = sensor.defs.resolve_job_def("build_tiny")
    instance.create_run_for_job(job, status=dg.DagsterRunStatus.NOT_STARTED)
    pq.write_table(digits_table().slice(0, 30), source.with_name("more.parquet"))
    now = time.time()
    monkeypatch.setattr(source_sensor.time, "time", lambda: now + 3 * source_sensor.SILENCE.total_seconds())
    assert "a build is running" in why(sensor.tick())


def test_a_backfill_that_goes_on_is_waited_for(sensor: Sensor, instance: dg.DagsterInstance) -> None:
    def start(*keys: list[str]) -> dg.DagsterRun:
        selected = frozenset(dg.AssetKey(key) for key in keys)
        run = dg.DagsterRun("__ASSET_JOB", status=dg.DagsterRunStatus.STARTED, asset_selection=selected)
        return instance.add_run(run)

    start(["tiny2", "manifest"], ["lake", "tiny"])
    ours = start(["tiny", "shard_indexes"])
    assert "a build is running" in why(sensor.tick())
    instance.report_run_canceled(ours)
    only(sensor.tick())


@pytest.mark.slow
def test_a_run_does_not_write_the_source_that_launched_it(
    config: WriteConfig, instance: dg.DagsterInstance, source: Path
) -> None:
    @dg.asset(key=["lake", "digits"], backfill_policy=dg.BackfillPolicy.single_run())
    def always_written() -> None:
        pq.write_table(digits_table().slice(0, ROWS + 1), source)

    options = {"source_sensor": {"settle_seconds": 0}, "source_assets": ["lake/digits"], "refresh_source": True}
    ours = build_snapshot_defs(config, SnapshotOptions(**options))
    defs = dg.Definitions.merge(ours, dg.Definitions(assets=[always_written]))
    sensor = Sensor(defs, "tiny_source_sensor", instance)
    built = sensor.run(only(sensor.tick()))
    assert built.success, failures(built)
    assert rows_served(config) == ROWS
    assert "Nothing has changed" in why(sensor.tick())
    assert run_request(defs, "build_tiny", dg.RunRequest(), instance).success
    assert rows_served(config) == ROWS + 1
    assert sensor.run(only(sensor.tick())).success
    assert "Nothing has changed" in why(sensor.tick())


def test_files_settle_before_they_are_built(config: WriteConfig, instance: dg.DagsterInstance, source: Path) -> None:
    sensor = snapshot_sensor(config, instance, "source", settle_seconds=0.3)
    assert "starts when it has stayed the same" in why(sensor.tick())
    pq.write_table(digits_table().slice(0, 30), source.with_name("more.parquet"))
    assert "2 files now" in why(sensor.tick())
    time.sleep(0.35)
    only(sensor.tick())


def test_an_unreadable_source_is_an_error_and_keeps_the_cursor(
    sensor: Sensor, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(sensor.tick())
    before = sensor.cursor

    def refused(*_: object) -> object:
        raise StoreError("the disk is on fire")

    with monkeypatch.context() as broken:
        broken.setattr("sf_pipelines.orchestration.source_sensor.find_files", refused)
        with pytest.raises(StoreError, match="on fire"):
            sensor.tick()
    assert sensor.cursor == before
    assert "Nothing has changed" in why(sensor.tick())


def test_a_source_without_files_is_no_reason_to_build(sensor: Sensor, source: Path) -> None:
    good = source.read_bytes()
    source.unlink()
    assert "matches no file" in why(sensor.tick())
    source.write_bytes(good)
    only(sensor.tick())
    cursor = sensor.cursor
    source.unlink()
    assert "what is published stays" in why(sensor.tick())
    assert sensor.cursor == cursor


def test_a_look_leaves_nothing_behind(sensor: Sensor, config: WriteConfig) -> None:
    only(sensor.tick())
    assert not Path(config.store).exists()
