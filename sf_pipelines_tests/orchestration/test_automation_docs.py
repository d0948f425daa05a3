"""Every block of docs/automation.md: YAML is loaded by Dagster's loader, Python is run."""

import re
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.instance.config import dagster_instance_config_schema

from sf_pipelines.components import VectorSnapshotComponent
from sf_pipelines_tests.orchestration.test_component import ATTRIBUTES, ROOT, load

TEXT = (ROOT / "docs/automation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
YAML = [block for kind, block in BLOCKS if kind == "yaml" and not block.startswith("# dagster.yaml")]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
INSTANCE = [block for kind, block in BLOCKS if kind == "yaml" and block.startswith("# dagster.yaml")]


def test_no_block_is_left_out() -> None:
    assert len(YAML) + len(PYTHON) + len(INSTANCE) == len(BLOCKS) == 17


@pytest.mark.parametrize("block", YAML)
def test_the_yaml_loads(block: str) -> None:
    fields: dict[str, Any] = yaml.safe_load(block)
    component, made = load(ATTRIBUTES | fields)
    given = component.options.model_dump(exclude_unset=True)
    assert all(given[name] is not None for name in fields)
    assert ("cleanup" in fields) == any(
        found.name.endswith("products_cleanup_schedule") for found in made.schedules or ()
    )
    assert fields.get("operations", True) == any(found.name.startswith("rollback_") for found in made.jobs or ())
    for sensor in ("source_sensor", "pointer_sensor"):
        assert (sensor in fields) == any(found.name == f"products_{sensor}" for found in made.sensors or ())


@pytest.mark.parametrize("block", PYTHON)
def test_the_python_runs(block: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(block, "docs/automation.md", "exec"), names)  # noqa: S102 - our own documentation
    if "defs" in names:
        assert {sensor.name for sensor in names["defs"].sensors} == {"products_pointer_sensor"}
        dg.Definitions.validate_loadable(names["defs"])
    if "TimedSnapshot" in names:
        assert issubclass(names["TimedSnapshot"], VectorSnapshotComponent)


def test_the_instance_setting_is_one_that_dagster_knows(tmp_path: Path) -> None:
    (block,) = INSTANCE
    (tmp_path / "dagster.yaml").write_text(block)
    found = yaml.safe_load(block)["compute_logs"]
    assert "compute_logs" in dagster_instance_config_schema()
    from dagster_aws.s3.compute_log_manager import S3ComputeLogManager

    assert found["class"] == S3ComputeLogManager.__name__
    assert found["module"] == S3ComputeLogManager.__module__
    known = S3ComputeLogManager.config_type()
    assert set(found["config"]) <= set(known)


def test_every_option_is_told() -> None:
    from sf_pipelines.orchestration import SnapshotOptions

    elsewhere = {"source_assets", "refresh_source"}
    missing = [name for name in SnapshotOptions.model_fields if f"{name}:" not in TEXT and name not in elsewhere]
    assert missing == []
