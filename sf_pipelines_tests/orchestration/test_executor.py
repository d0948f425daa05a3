"""How the steps of a run are executed: in the run's process, or in processes of their own."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from sf_pipelines.components import VectorSnapshotComponent
from sf_pipelines.components.vector_snapshot import VectorSnapshotAttributes
from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines.snapshot.config import WriteConfig


def executors(defs: dg.Definitions) -> dict[str, str]:
    """Name of each job's executor."""
    return {job.name: job.executor_def.name for job in defs.get_repository_def().get_all_jobs()}


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({}, "in_process"),
        ({"executor": "in_process"}, "in_process"),
        ({"executor": "multiprocess"}, "multiprocess"),
        ({"executor": {"type": "multiprocess", "max_concurrent": 2}}, "multiprocess"),
        ({"executor": dg.executor(name="pods")(lambda _: None)}, "pods"),  # pyright: ignore[reportArgumentType]
        # Dagster's own default.
        ({"executor": "inherit"}, "multi_or_in_process_executor"),
    ],
)
def test_all_jobs_of_a_snapshot_have_the_executor(config: WriteConfig, said: dict[str, Any], name: str) -> None:
    found = executors(build_snapshot_defs(config, **said))
    assert {job: executor for job, executor in found.items() if job.endswith("_tiny")} == dict.fromkeys(
        [
            f"{noun}_tiny"
            for noun in ("build", "build_now", "rollback", "release", "pin", "unpin", "cleanup", "diff", "verify")
        ],
        name,
    )


def test_the_component_says_it_too(config: WriteConfig) -> None:
    fields: dict[str, Any] = config.model_dump(exclude={"vector_spec", "recall_gate", "s3"}) | {
        "vector_spec": {"dim": 64}
    }
    variants: list[tuple[dict[str, Any], str]] = [
        ({}, "in_process"),
        ({"executor": {"type": "multiprocess"}}, "multiprocess"),
    ]
    for said, name in variants:
        component = VectorSnapshotComponent(VectorSnapshotAttributes(**fields, **said))
        found = executors(component.build_defs(dg.ComponentTree.for_test().load_context))
        assert {executor for job, executor in found.items() if job.endswith("_tiny")} == {name}
        assert {"build_tiny", "build_now_tiny", "rollback_tiny", "cleanup_tiny", "verify_tiny"} <= set(found)


def test_another_default_of_the_deployment_is_for_those_that_ask_for_it(config: WriteConfig, tmp_path: Path) -> None:
    pods = dg.executor(name="pods")(lambda _: None)  # pyright: ignore[reportArgumentType]
    other = config.model_copy(update={"name": "other", "store": str(tmp_path / "other")})
    defs = dg.Definitions.merge(
        build_snapshot_defs(config),
        build_snapshot_defs(other, executor="inherit"),
        dg.Definitions(executor=pods),
    )
    found = executors(defs)
    assert (found["build_tiny"], found["verify_tiny"]) == ("in_process", "in_process")
    assert (found["build_other"], found["verify_other"], found["__ASSET_JOB"]) == ("pods", "pods", "pods")
