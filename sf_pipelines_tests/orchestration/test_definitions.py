"""The definitions of the deployment, compared with what they were: two snapshots of different kinds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import dagster as dg

from sf_pipelines.definitions import defs
from sf_pipelines_tests.orchestration.described import describe

GOLDEN = Path(__file__).with_name("definitions.json")


def test_the_definitions_are_what_they_were() -> None:
    """A change that is wanted: run this test with UPDATE_DEFINITIONS=1 and look at the difference."""
    found = json.dumps(describe(defs().get_repository_def()), indent=1, sort_keys=True) + "\n"
    if os.environ.get("UPDATE_DEFINITIONS"):
        GOLDEN.write_text(found, encoding="utf-8")
    assert json.loads(GOLDEN.read_text(encoding="utf-8")) == json.loads(found)


def test_nothing_is_on_by_default() -> None:
    repository = defs().get_repository_def()
    assert {schedule.default_status.value for schedule in repository.schedule_defs} == {"STOPPED"}
    assert {sensor.default_status.value for sensor in repository.sensor_defs} == {"STOPPED"}


def test_snapshots_share_nothing_but_their_source() -> None:
    found = describe(defs().get_repository_def())
    owned = {
        name: {key for key in found["assets"] if key.startswith(f"{name}/") and key != "digits/table"}
        for name in ("digits", "digits_kv")
    }
    for name, other in (("digits", "digits_kv"), ("digits_kv", "digits")):
        needed = {parent for key in owned[name] for parent in found["assets"][key]["after"]}
        assert not needed & owned[other]
        assert not set(found["jobs"][f"build_{name}"]["assets"]) & owned[other]
    assert found["jobs"]["build_digits"]["pools"] != found["jobs"]["build_digits_kv"]["pools"]


def test_code_references_lead_to_the_yaml_and_to_the_stage_and_stay_out_of_the_golden_file() -> None:
    graph = defs().get_repository_def().asset_graph
    places = graph.get(dg.AssetKey(["digits", "manifest"])).metadata["dagster/code_references"].value.code_references
    assert [Path(place.file_path).name for place in places] == ["assemble.py", "defs.yaml"]
    assert all(place.line_number for place in places)
    assert not any(str(Path(place.file_path).parent) in GOLDEN.read_text(encoding="utf-8") for place in places)


_LOAD = """
import warnings, dagster as dg
warnings.simplefilter("always")
from sf_pipelines import WriteConfig
from sf_pipelines.definitions import defs
from sf_pipelines.orchestration import build_snapshot_defs
config = WriteConfig(name="x", source="a.parquet", store="b", num_dbs=2, vector_spec={"dim": 4})
fields = dict(pointer_sensor={}, source_sensor={}, schedule={"cron": "0 3 * * *"}, freshness={"fail_hours": 3})
own = build_snapshot_defs(config, **fields)
for definitions in (defs(), own):
    repository = definitions.get_repository_def()
    repository.get_all_jobs()
    repository._repository_data.get_asset_checks_defs_by_key()
"""


def test_loading_the_definitions_warns_of_nothing_in_beta() -> None:
    done = subprocess.run([sys.executable, "-c", _LOAD], capture_output=True, text=True, check=True)
    assert "BetaWarning" not in done.stderr, done.stderr[:2000]
    assert "PreviewWarning" not in done.stderr, done.stderr[:2000]
