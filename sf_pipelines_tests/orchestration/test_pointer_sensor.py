"""The pointer sensor on a real instance: every move is told once, whoever made it."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest

from sf_pipelines import build_snapshot
from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ManifestError, ObjectMissingError, SnapshotNotFoundError
from sf_pipelines_tests.orchestration.conftest import ROWS, run_job
from sf_pipelines_tests.orchestration.ticks import Sensor, snapshot_sensor

KEY = dg.AssetKey(["tiny", "published_snapshot"])


@pytest.fixture
def sensor(config: WriteConfig, instance: dg.DagsterInstance) -> Sensor:
    return snapshot_sensor(config, instance, "pointer")


def values(event: dg.AssetMaterialization) -> dict[str, Any]:
    return {name: value.value for name, value in event.metadata.items()}


def pointer(config: WriteConfig) -> Path:
    return Path(config.store, "_CURRENT")


def count(instance: dg.DagsterInstance) -> int:
    return len(instance.fetch_materializations(KEY, limit=100).records)


def test_a_move_is_told_with_its_figures(sensor: Sensor, config: WriteConfig, instance: dg.DagsterInstance) -> None:
    assert "yet" in sensor.tick().reason
    assert not Path(config.store).exists()
    assert run_job(config, instance).success

    (event,) = sensor.tick().events

    found, named = values(event), json.loads(pointer(config).read_bytes())
    assert found["run_id"] == named["run_id"]
    assert (found["seq"], found["dagster/row_count"], found["num_dbs"]) == (1, ROWS, 3)
    assert found["previous_run_id"] == "(none)"
    assert found["dagster/uri"] == named["manifest_ref"]
    assert 0.8 <= found["recall_lower_bound"] <= found["recall"] <= 1
    assert event.tags == {"dagster/data_version": named["manifest_digest"]}
    stored = instance.get_latest_materialization_event(KEY)
    assert stored is not None
    assert stored.asset_materialization == event
    judged = run_job(config, instance).get_asset_check_evaluations()
    recall = next(evaluation for evaluation in judged if evaluation.check_name == "recall")
    assert found["recall"] == pytest.approx(recall.metadata["recall"].value)


def test_the_build_itself_tells_of_its_move_while_the_sensor_is_off(
    config: WriteConfig, instance: dg.DagsterInstance
) -> None:
    defs = build_snapshot_defs(config, pointer_sensor={})
    for job in ("build_tiny", "build_now_tiny", "build_tiny"):
        assert defs.resolve_job_def(job).execute_in_process(instance=instance).success
        assert count(instance) == 1
    event = instance.get_latest_materialization_event(KEY)
    assert event is not None
    assert event.asset_materialization is not None
    named = json.loads(pointer(config).read_bytes())
    assert values(event.asset_materialization)["run_id"] == named["run_id"]
    # The figures come first, as the UI shows them.
    assert list(values(event.asset_materialization))[:4] == ["recall", "recall_lower_bound", "dagster/row_count", "MiB"]
    # Switched on later, it has nothing to add.
    assert "has not moved" in Sensor(defs, "tiny_pointer_sensor", instance).tick().reason
    assert count(instance) == 1


@pytest.mark.slow
def test_no_move_is_told_twice_whatever_becomes_of_the_cursor(
    sensor: Sensor, config: WriteConfig, instance: dg.DagsterInstance
) -> None:
    build_snapshot(config)
    assert len(sensor.tick().events) == 1
    assert "has not moved" in sensor.tick().reason
    # The daemon was killed after the event was written, and before the cursor was.
    sensor.cursor = None
    assert "has not moved" in sensor.tick().reason
    restarted = snapshot_sensor(config, instance, "pointer")
    assert "has not moved" in restarted.tick().reason
    # Nothing is new: the pointer does not move.
    build_snapshot(config)
    assert "has not moved" in sensor.tick().reason
    assert count(instance) == 1


@pytest.mark.slow
def test_moves_by_any_hand_are_told(
    sensor: Sensor, config: WriteConfig, instance: dg.DagsterInstance, source: Path
) -> None:
    build_snapshot(config)
    sensor.tick()
    first = pointer(config).read_bytes()
    pq.write_table(digits_table().slice(0, ROWS + 40), source)
    build_snapshot(config)
    (second,) = sensor.tick().events
    assert values(second)["dagster/row_count"] == ROWS + 40
    assert values(second)["previous_run_id"] == json.loads(first)["run_id"]

    # A stock tool goes back: five fields, no sequence number.
    old = json.loads(first)
    stock = {name: old[name] for name in ("manifest_ref", "manifest_content_type", "run_id", "format_version")}
    pointer(config).write_text(json.dumps(stock | {"updated_at": "2026-11-22T12:00:00.000000Z"}))
    (back,) = sensor.tick().events
    assert values(back)["run_id"] == old["run_id"]
    assert values(back)["previous_run_id"] == values(second)["run_id"]
    assert "seq" not in values(back)
    assert back.tags == {"dagster/data_version": old["manifest_digest"]}
    assert count(instance) == 3


@pytest.mark.slow
def test_moves_that_nobody_looked_at_are_counted(sensor: Sensor, config: WriteConfig, source: Path) -> None:
    build_snapshot(config)
    sensor.tick()
    for more in (10, 20, 30):
        pq.write_table(digits_table().slice(0, ROWS + more), source)
        build_snapshot(config)
    (event,) = sensor.tick().events
    assert (values(event)["seq"], values(event)["moves"], values(event)["dagster/row_count"]) == (4, 3, ROWS + 30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda path: path.write_text("{"), ManifestError),
        (lambda path: path.unlink(), SnapshotNotFoundError),
        (lambda path: next(path.parent.glob("manifests/*/manifest")).unlink(), ObjectMissingError),
    ],
)
def test_a_pointer_that_cannot_be_followed_is_an_error_and_told_when_it_can(
    sensor: Sensor, config: WriteConfig, source: Path, damage: Any, error: type[Exception]
) -> None:
    build_snapshot(config)
    sensor.tick()
    pq.write_table(digits_table().slice(0, ROWS + 40), source)
    (old,) = Path(config.store).glob("manifests/*")
    held = old.rename(Path(config.store, "held"))
    build_snapshot(config)
    good = pointer(config).read_bytes()
    manifest = next(Path(config.store).glob("manifests/*/manifest"))
    kept = manifest.read_bytes()
    damage(pointer(config))
    for _ in range(2):
        with pytest.raises(error):
            sensor.tick()
    pointer(config).write_bytes(good)
    manifest.write_bytes(kept)
    held.rename(old)
    assert len(sensor.tick().events) == 1


@pytest.mark.slow
def test_downstream_assets_can_hang_on_it(config: WriteConfig, instance: dg.DagsterInstance) -> None:
    @dg.asset(deps=[KEY], automation_condition=dg.AutomationCondition.eager())
    def search_service() -> None: ...

    ours = build_snapshot_defs(config, pointer_sensor={})
    defs = dg.Definitions.merge(ours, dg.Definitions(assets=[search_service]))
    sensor = Sensor(defs, "tiny_pointer_sensor", instance)
    before = dg.evaluate_automation_conditions(defs, instance=instance)
    build_snapshot(config)
    sensor.tick()
    after = dg.evaluate_automation_conditions(defs, instance=instance, cursor=before.cursor)
    assert (before.total_requested, after.total_requested) == (0, 1)
