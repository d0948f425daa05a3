"""Sensors and schedule in a running Dagster with its daemon, over a restart of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from sf_pipelines import build_snapshot
from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines_tests.orchestration.browser import Served, copy_project, serve, wait_for
from sf_pipelines_tests.orchestration.conftest import ROWS, make_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EVENTS = """{assetOrError(assetKey: {path: ["tiny", "published_snapshot"]}) {... on Asset {
  assetMaterializations(limit: 50) {metadataEntries {
    label ... on TextMetadataEntry {text} ... on IntMetadataEntry {intValue}}}
}}}"""
TICKS = """{sensorOrError(sensorSelector: {repositoryLocationName: "sf_pipelines", repositoryName: "__repository__",
  sensorName: "%s"}) {... on Sensor {sensorState {ticks(limit: 20) {status skipReason error {message}}}}}}"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with one snapshot in place of the demos; sensors on from the start."""
    root = tmp_path / "project"
    copy_project(root)
    for name in ("digits", "digits_kv"):
        shutil.rmtree(root / "sf_pipelines/defs" / name)
    (root / "source").mkdir()
    folder = root / "sf_pipelines/defs/tiny"
    folder.mkdir()
    running = {"default_status": "running"}
    attributes = {
        "name": "tiny",
        "source": "source/*.parquet",
        "store": "snapshot",
        "num_dbs": 2,
        "vector_spec": {"dim": 64, "vector_col": "pixels"},
        "recall_gate": {"k": 5, "min_recall": 0.8, "query_rows": 200},
        "source_sensor": {"interval_seconds": 1, "settle_seconds": 1} | running,
        "pointer_sensor": {"interval_seconds": 1} | running,
    }
    component = {"type": "sf_pipelines.components.VectorSnapshotComponent", "attributes": attributes}
    (folder / "defs.yaml").write_text(yaml.safe_dump(component))
    return root


def moves(served: Served) -> list[dict[str, Any]]:
    """What was told of the pointer, oldest first."""
    found = served.query(EVENTS)["assetOrError"].get("assetMaterializations") or []
    return [
        {entry["label"]: entry.get("text", entry.get("intValue")) for entry in event["metadataEntries"]}
        for event in reversed(found)
    ]


def soon(done: Callable[[], object], served: Served, what: str) -> None:
    wait_for(done, seconds=400, what=f"{what}; see {served.project}/server.log")


def test_files_become_snapshots_and_moves_become_events(project: Path) -> None:
    source = project / "source"
    table = digits_table()
    with serve(project) as served:
        pq.write_table(table.slice(0, ROWS), source / "one.parquet")
        soon(lambda: len(moves(served)) == 1, served, "the first snapshot and its event")
        assert moves(served)[0]["dagster/row_count"] == ROWS
        # The build tells the move itself, before its run ends.
        soon(lambda: [run["status"] for run in served.runs()] == ["SUCCESS"], served, "the run to end well")

        (source / "bad.parquet").write_bytes(b"PAR1 but damaged")
        soon(lambda: len(served.runs()) == 2 and served.runs()[0]["status"] == "FAILURE", served, "the failed run")
        assert len(moves(served)) == 1
    # While nobody looks: the source is repaired, and another hand publishes.
    (source / "bad.parquet").unlink()
    pq.write_table(table.slice(ROWS, 100), source / "two.parquet")
    config = make_config(
        project,
        store=str(project / "snapshot"),
        num_dbs=2,
        payload_cols=[],
        vector_spec={"dim": 64, "vector_col": "pixels"},
    )
    by_hand = build_snapshot(config, force=True, cache_dir=project / "cache")
    with serve(project) as served:
        soon(lambda: len(moves(served)) == 2, served, "the event of the other hand")
        assert moves(served)[1]["run_id"] == by_hand.run_id
        soon(lambda: len(served.runs()) == 3, served, "the run of the changed source")
        soon(lambda: served.runs()[0]["status"] == "SUCCESS", served, "that run to end well")
        soon(lambda: len(ticks(served, "tiny_pointer_sensor")) >= 3, served, "more ticks")
        told = [move["run_id"] for move in moves(served)]
        assert len(told) == len(set(told)) == 2, "nothing was told twice"
        assert json.loads((project / "snapshot/_CURRENT").read_bytes())["run_id"] == told[-1]
        reasons = {tick["skipReason"] or "" for tick in ticks(served, "tiny_source_sensor")}
        assert any("Nothing has changed" in reason for reason in reasons), reasons


def ticks(served: Served, sensor: str) -> list[dict[str, Any]]:
    return served.query(TICKS % sensor)["sensorOrError"]["sensorState"]["ticks"]
