"""Operations as jobs: what they do to the store, what they show, and what they refuse."""

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest
import yaml
from dagster._core.snap import JobSnap
from dagster._core.snap.snap_to_yaml import default_values_yaml_from_type_snap

from sf_pipelines import build_snapshot
from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines.orchestration.graph import OPERATED_TAG, OPERATION_TAG, SNAPSHOT_TAG
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines_tests.orchestration.conftest import ROWS, make_config
from sf_pipelines_tests.orchestration.test_component import ATTRIBUTES as PRODUCTS
from sf_pipelines_tests.orchestration.test_component import ROOT, load
from sf_pipelines_tests.orchestration.ticks import Sensor, run_request, schedule_tick

NOUNS = ("rollback", "release", "pin", "unpin", "cleanup", "diff", "verify")
POINTER = dg.AssetKey(["tiny", "current_pointer"])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A root with three snapshots, built once; tests work on copies."""
    root = tmp_path_factory.mktemp("operated")
    (root / "source").mkdir()
    config, runs = make_config(root), []
    for more in (0, 20, 40):
        pq.write_table(digits_table().slice(0, ROWS + more), root / "source" / "digits.parquet")
        runs.append(build_snapshot(config, cache_dir=root / "cache").run_id)
    return root, runs


@pytest.fixture
def config(built: tuple[Path, list[str]], tmp_path: Path) -> WriteConfig:
    shutil.copytree(built[0] / "snapshot", tmp_path / "snapshot")
    return make_config(tmp_path)


@pytest.fixture
def runs(built: tuple[Path, list[str]]) -> list[str]:
    return built[1]


def operate(
    config: WriteConfig, instance: dg.DagsterInstance, noun: str, **said: Any
) -> tuple[dg.ExecuteInProcessResult, dict[str, Any]]:
    """Launches an operation; what its output shows."""
    job = build_snapshot_defs(config).resolve_job_def(f"{noun}_tiny")
    result = job.execute_in_process(
        instance=instance, run_config={"ops": {f"tiny_{noun}": {"config": said}}}, raise_on_error=False
    )
    shown = [
        event.step_output_data.metadata for event in result.filter_events(lambda event: event.is_successful_output)
    ]
    return result, {name: value.value for name, value in shown[0].items()} if shown else {}


def refusal(result: dg.ExecuteInProcessResult) -> tuple[str, dict[str, Any]]:
    (event,) = result.get_step_failure_events()
    failure = event.step_failure_data.user_failure_data
    assert failure is not None
    return failure.description or "", {name: value.value for name, value in failure.metadata.items()}


def current(config: WriteConfig) -> dict[str, Any]:
    return json.loads(Path(config.store, "_CURRENT").read_bytes())


def files(config: WriteConfig) -> set[Path]:
    return {path for path in Path(config.store).rglob("*") if path.is_file()}


def test_rollback_moves_the_pointer_and_shows_on_its_asset(
    config: WriteConfig, runs: list[str], instance: dg.DagsterInstance
) -> None:
    sensor = Sensor(build_snapshot_defs(config, pointer_sensor={}), "tiny_pointer_sensor", instance)
    sensor.tick()

    result, shown = operate(config, instance, "rollback", back=1)

    assert result.success
    assert current(config)["run_id"] == shown["run_id"] == runs[1]
    assert (shown["previous_run_id"], shown["withdrawn"]) == (runs[2], [runs[2]])
    event = instance.get_latest_materialization_event(POINTER)
    assert event is not None
    assert event.asset_materialization is not None
    assert event.asset_materialization.metadata["run_id"].value == runs[1]
    assert event.asset_materialization.tags == {"dagster/data_version": current(config)["manifest_digest"]}
    (told,) = sensor.tick().events
    assert told.metadata["run_id"].value == runs[1]
    assert sensor.tick().events == []

    released, after = operate(config, instance, "release")
    assert released.success
    assert len(after["released"]) == 1
    assert operate(config, instance, "release")[1]["released"] == []
    forward, _ = operate(config, instance, "rollback", run_id=runs[2], deep=True)
    assert forward.success
    assert current(config)["run_id"] == runs[2]


@pytest.mark.parametrize(
    ("noun", "said", "told", "kind"),
    [
        ("rollback", {}, "say where to roll back to", "operation"),
        ("rollback", {"back": 1, "run_id": "x"}, "say where to roll back to", "operation"),
        ("rollback", {"back": -1}, "-1", "operation"),
        ("rollback", {"back": 9}, "9 were asked for", "operation.no_run"),
        ("rollback", {"run_id": "nobody"}, "nobody", "operation.no_run"),
        ("pin", {"run_id": "nobody", "reason": "audit"}, "nobody", "operation.no_run"),
        ("pin", {"run_id": "nobody", "reason": " "}, "reason must be", "operation"),
        ("unpin", {"run_id": "nobody"}, "is not pinned", "operation.no_run"),
        ("cleanup", {"keep": 0}, "keep must be", "operation"),
        ("cleanup", {"stale_after_days": 1e300}, "stale_after_days 1e+300 is no number of days", "operation"),
        ("diff", {"before": "nobody"}, "nobody", "operation.no_run"),
        ("verify", {"manifest": "manifests/none"}, "manifests/none", "store.missing"),
    ],
)
def test_what_is_refused_fails_with_the_typed_error(
    config: WriteConfig, instance: dg.DagsterInstance, noun: str, said: dict[str, Any], told: str, kind: str
) -> None:
    before = current(config), files(config)
    result, _ = operate(config, instance, noun, **said)
    assert not result.success
    description, metadata = refusal(result)
    assert told in description
    assert metadata == {"kind": kind, "retryable": False}
    assert (current(config), files(config)) == before


def test_a_damaged_target_is_refused_and_verify_fails(
    config: WriteConfig, runs: list[str], instance: dg.DagsterInstance
) -> None:
    assert operate(config, instance, "verify")[1]["faults"] == 0
    for run_id in runs[1:]:
        damaged = next(Path(config.store).glob(f"shards/run_id={run_id}/**/data/*.lance"))
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 255
        damaged.write_bytes(data)

    result, _ = operate(config, instance, "rollback", back=1)
    assert refusal(result)[1]["kind"] == "integrity.snapshot"
    assert current(config)["run_id"] == runs[2]
    assert instance.get_latest_materialization_event(POINTER) is None

    verified, _ = operate(config, instance, "verify")
    description, metadata = refusal(verified)
    assert "1 faults: shard" in description
    assert metadata["faults"] == 1
    (observed, *_) = instance.fetch_observations(POINTER, limit=1).records
    assert observed.asset_observation is not None
    assert observed.asset_observation.metadata["verified"].value is False


def test_cleanup_only_shows_until_it_is_told_otherwise(
    config: WriteConfig, runs: list[str], instance: dg.DagsterInstance
) -> None:
    before = files(config)
    _, shown = operate(config, instance, "cleanup", keep=1)
    assert shown["dry_run"] is True
    assert {record["rule"] for record in rows_of(shown["groups"])} >= {"snapshot"}
    assert shown["MiB"] > 0 == shown["freed_MiB"]
    assert files(config) == before
    assert operate(config, instance, "cleanup")[1]["dry_run"] is True

    operate(config, instance, "pin", run_id=runs[0], reason="audit")
    result, done = operate(config, instance, "cleanup", keep=1, dry_run=False)
    assert result.success
    assert done["freed_MiB"] == done["MiB"] < shown["MiB"]
    left = {path.parent.name.rpartition("run_id=")[2] for path in Path(config.store).glob("manifests/*/manifest")}
    assert left == {runs[0], runs[2]}
    operate(config, instance, "unpin", run_id=runs[0])
    operate(config, instance, "cleanup", keep=1, dry_run=False)
    assert len(list(Path(config.store).glob("manifests/*/manifest"))) == 1


def rows_of(value: Any) -> list[dict[str, Any]]:
    return [dict(record.data) for record in value.records]


def test_diff_shows_figures(config: WriteConfig, runs: list[str], instance: dg.DagsterInstance) -> None:
    _, shown = operate(config, instance, "diff")
    assert (shown["before"], shown["after"]) == (runs[1], runs[2])
    assert (shown["added"], shown["gone"], shown["kept"]) == (20, 0, ROWS + 20)
    assert 0 < shown["overlap_at_5"] <= 1
    quick, less = operate(config, instance, "diff", before=runs[0], ids=False, answers=False)
    assert quick.success
    assert less["before"] == runs[0]
    assert "added" not in less


def test_the_jobs_are_as_operators_need_them(config: WriteConfig) -> None:
    defs = build_snapshot_defs(config)
    defaults = {
        "rollback": {"run_id": "", "back": 0, "deep": False},
        "cleanup": {"keep": 3, "stale_after_days": 7.0, "dry_run": True},
        "diff": {"ids": True, "answers": True},
    }
    for noun in NOUNS:
        job = defs.resolve_job_def(f"{noun}_tiny")
        (op,) = job.all_node_defs
        assert isinstance(op, dg.OpDefinition)
        # A queue of builds must not hold a rollback up.
        assert SNAPSHOT_TAG not in job.tags
        assert {**job.tags} == op.tags == {OPERATION_TAG: noun, OPERATED_TAG: "tiny"}
        assert op.pool == ("tiny_shards" if noun in {"diff", "verify"} else None)
        assert (op.retry_policy is None) == (noun == "rollback")
        assert op.description
        fields: Any = getattr(op.config_schema.config_type, "fields", {})
        assert all(field.description for field in fields.values()), noun
        assert launchpad(job).get("ops", {}).get(f"tiny_{noun}", {}).get("config", {}) == defaults.get(noun, {})


def launchpad(job: dg.JobDefinition) -> dict[str, Any]:
    """What the launchpad is filled with when it is opened; it asks for the fields that must be given."""
    snapshot = JobSnap.from_job_def(job)
    key = snapshot.mode_def_snaps[0].root_config_key
    assert key is not None
    schema = snapshot.config_schema_snapshot
    return yaml.safe_load(default_values_yaml_from_type_snap(schema, schema.get_config_snap(key))) or {}


def test_jobs_can_be_left_out(config: WriteConfig) -> None:
    assert {job.name for job in build_snapshot_defs(config, operations=False).jobs or ()} == {
        "build_tiny",
        "build_now_tiny",
    }
    with pytest.raises(ConfigError, match="cleanup: needs the job cleanup_<name>"):
        build_snapshot_defs(config, operations=False, cleanup={"cron": "0 5 * * 0", "keep": 2})


def test_cleanup_by_the_clock(config: WriteConfig, instance: dg.DagsterInstance) -> None:
    defs = build_snapshot_defs(
        config, cleanup={"cron": "0 5 * * 0", "timezone": "Europe/Berlin", "keep": 1, "dry_run": False}
    )
    moment = datetime(2026, 11, 22, 4, 0, tzinfo=UTC)
    (request,) = schedule_tick(defs, "tiny_cleanup_schedule", instance, moment)
    assert request.run_key == "cleanup_tiny:2026-11-22T04:00:00Z"
    assert run_request(defs, "cleanup_tiny", request, instance).success
    assert len(list(Path(config.store).glob("manifests/*/manifest"))) == 1
    careful = build_snapshot_defs(config, cleanup={"cron": "0 5 * * 0", "keep": 1})
    (asked,) = schedule_tick(careful, "tiny_cleanup_schedule", instance, moment)
    assert asked.run_config["ops"]["tiny_cleanup"]["config"]["dry_run"] is True


@pytest.mark.slow
def test_the_jobs_run_from_the_command_line(config: WriteConfig, runs: list[str], tmp_path: Path) -> None:
    module = tmp_path / "operated.py"
    module.write_text(
        "from sf_pipelines import WriteConfig\nfrom sf_pipelines.orchestration import build_snapshot_defs\n"
        f"defs = build_snapshot_defs(WriteConfig(**{config.model_dump(mode='json', exclude_unset=True)!r}))\n"
    )
    for noun, said, code in (("rollback", {"back": 1}, 0), ("verify", {}, 0), ("rollback", {}, 1)):
        path = tmp_path / f"{noun}.yaml"
        path.write_text(yaml.safe_dump({"ops": {f"tiny_{noun}": {"config": said}}}))
        command = [sys.executable, "-m", "dagster", "job", "execute", "-f", str(module), "-j", f"{noun}_tiny", "-c"]
        done = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
    assert current(config)["run_id"] == runs[1]


def test_the_blocks_of_the_page_are_configurations_of_the_jobs() -> None:
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    blocks = [part.split("```", 1)[0] for part in text.split("```yaml\n")[1:]]
    _, defs = load(PRODUCTS)
    for block in blocks:
        job = block.splitlines()[0].removeprefix("# ")
        assert dg.validate_run_config(defs.resolve_job_def(job), yaml.safe_load(block))
    assert len(blocks) == 2
