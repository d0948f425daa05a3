"""The schedule: which moments, one run a moment, all shards in it."""

from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import dagster as dg
import pytest

from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines_tests.orchestration.conftest import failures
from sf_pipelines_tests.orchestration.ticks import run_request, schedule_tick

NIGHTLY = {"cron": "30 2 * * *", "timezone": "Europe/Berlin"}


@pytest.mark.slow
def test_a_moment_is_one_run_of_everything(config: WriteConfig, instance: dg.DagsterInstance) -> None:
    defs = build_snapshot_defs(config, schedule=NIGHTLY)
    moment = datetime(2026, 11, 22, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))

    (request,) = schedule_tick(defs, "tiny_schedule", instance, moment)
    (again,) = schedule_tick(defs, "tiny_schedule", instance, moment.astimezone(UTC))

    assert request.run_key == again.run_key == "tiny:2026-11-22T01:30:00Z"
    result = run_request(defs, "build_tiny", request, instance)
    assert result.success, failures(result)
    assert instance.get_materialized_partitions(dg.AssetKey(["tiny", "shard_indexes"])) == {"00000", "00001", "00002"}
    schedule = defs.resolve_schedule_def("tiny_schedule")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("30 2 * * *", "Europe/Berlin")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED


def test_the_hour_that_comes_twice_is_two_moments(config: WriteConfig, instance: dg.DagsterInstance) -> None:
    defs = build_snapshot_defs(config, schedule=NIGHTLY)
    zone = ZoneInfo("Europe/Berlin")
    keys = {
        schedule_tick(defs, "tiny_schedule", instance, datetime(2026, 10, 25, 2, 30, tzinfo=zone, fold=fold))[0].run_key
        for fold in (0, 1)
    }
    assert keys == {"tiny:2026-10-25T00:30:00Z", "tiny:2026-10-25T01:30:00Z"}


@pytest.mark.slow
def test_a_forced_schedule_publishes_although_nothing_is_new(config: WriteConfig, instance: dg.DagsterInstance) -> None:
    published = []
    for force in (False, False, True):
        defs = build_snapshot_defs(config, schedule=NIGHTLY | {"force": force}, key_prefix="search/prod-1")
        (request,) = schedule_tick(
            defs, "search__prod_1__tiny_schedule", instance, datetime(2026, 11, 22, 1, 30, tzinfo=UTC)
        )
        result = run_request(defs, "build_search__prod_1__tiny", request, instance)
        assert result.success, failures(result)
        event = instance.get_latest_materialization_event(dg.AssetKey(["search", "prod-1", "tiny", "current_pointer"]))
        assert event is not None
        assert event.asset_materialization is not None
        published.append(event.asset_materialization.metadata["published"].value)
    assert published == [True, False, True]


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ({"cron": "never"}, "schedule.cron: is no cron expression"),
        ({"cron": "61 * * * *"}, "schedule.cron"),
        ({"cron": "0 3 * * *", "timezone": "Mars/Olympus"}, "schedule.timezone: is no time zone"),
        ({"cron": "0 3 * * *", "timezone": "/etc/passwd"}, "schedule.timezone: is no time zone"),
        ({"cron": "0 3 * * *", "default_status": "on"}, "schedule.default_status"),
        ({"timezone": "UTC"}, "schedule.cron"),
    ],
)
def test_a_wrong_schedule_is_named(config: WriteConfig, schedule: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_snapshot_defs(config, schedule=schedule)
