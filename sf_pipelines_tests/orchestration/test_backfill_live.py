"""A backfill with a run per shard, launched as the UI does and cut up by the daemon; then one shard alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines_tests.orchestration import deployment as live
from sf_pipelines_tests.orchestration.browser import Served, serve, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROWS = 400
NOUNS = (
    "source_vectors",
    "training_data",
    "centroids",
    "routed_vectors",
    "shard_indexes",
    "manifest",
    "current_pointer",
)
_BACKFILL = """mutation ($params: LaunchBackfillParams!) {launchPartitionBackfill(backfillParams: $params) {
  ... on LaunchBackfillSuccess {backfillId} ... on PythonError {message}}}"""
_STATUS = "query ($id: String!) {partitionBackfillOrError(backfillId: $id) {... on PartitionBackfill {status}}}"


def keys(*nouns: str) -> list[dict[str, Any]]:
    return [{"path": ["tiny", noun]} for noun in nouns]


def backfill(served: Served, shards: list[str], *nouns: str) -> str:
    """Launches one, and waits for it; its id."""
    params = {"assetSelection": keys(*nouns), "partitionNames": shards}
    made = served.query(_BACKFILL, params=params)["launchPartitionBackfill"]["backfillId"]

    def ended() -> bool:
        state = served.query(_STATUS, id=made)["partitionBackfillOrError"]["status"]
        assert state not in {"FAILED", "COMPLETED_FAILED", "CANCELED"}, f"{state}; see {served.project}/server.log"
        return state == "COMPLETED_SUCCESS"

    wait_for(ended, seconds=400, what=f"the backfill; see {served.project}/server.log")
    return made


def shards_of_runs(served: Served, made: str) -> Counter[str]:
    """How many runs of a backfill were for each shard."""
    tags = [{tag["key"]: tag["value"] for tag in run["tags"]} for run in served.runs()]
    ours = [found for found in tags if found.get("dagster/backfill") == made]
    return Counter(found.get("dagster/asset_partition_range_start", "") for found in ours)


def test_a_run_per_shard_then_one_shard_alone(tmp_path: Path) -> None:
    project = tmp_path / "project"
    live.make_project(project, live.snapshot_attributes("tiny", backfill="run_per_shard"))
    pq.write_table(digits_table().slice(0, ROWS), project / "source/one.parquet")
    published = live.Published(project / "snapshots/tiny")
    with serve(project) as served:
        everything = backfill(served, ["00000", "00001"], *NOUNS)

        found = shards_of_runs(served, everything)
        assert (found["00000"], found["00001"]) == (1, 1), found
        assert published.read() == (1, 1, ROWS)

        alone = backfill(served, ["00001"], "shard_indexes")
        assert shards_of_runs(served, alone) == {"00001": 1}
        assert published.read() == (1, 1, ROWS)
        rest = live.launch_assets(served, *keys("manifest", "current_pointer"))
        assert live.wait_for_end(served, rest) == "SUCCESS"
        assert published.read() == (2, 2, ROWS)
