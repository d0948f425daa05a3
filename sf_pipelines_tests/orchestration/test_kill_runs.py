"""SIGKILL for a run's process in every stage, then *Re-execute from failure*: published once, nothing lost."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sf_pipelines import ShardedVectorReader
from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines.snapshot.operations.verify import verify_snapshot
from sf_pipelines_tests.orchestration import deployment as live
from sf_pipelines_tests.orchestration.browser import Served, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# What is being written when the process dies, by the asset that is at work.
MOMENTS = {
    "source_vectors": ("receipts/scan/", "before"),
    "training_data": ("receipts/sample/", "before"),
    "centroids": ("centroids.npy", "after"),
    "routed_vectors": ("routed/range-", "after"),
    "shard_indexes": ("/db=00001/attempt", "after"),
    "manifest": ("/manifest-", "after"),
    "checks": ("/verdicts/", "after"),
    "current_pointer before it moves": ("_CURRENT", "before"),
    "current_pointer after it moved": ("_CURRENT", "after"),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    project = tmp_path_factory.mktemp("killed") / "project"
    live.make_project(project, live.snapshot_attributes("tiny"), pausing=True)
    with serve(project) as running:
        yield running


@pytest.mark.parametrize("stage", MOMENTS)
def test_a_run_killed_in_a_stage_is_reexecuted_from_failure(served: Served, stage: str) -> None:
    project = served.project
    for name in ("pause", "paused"):
        (project / name).unlink(missing_ok=True)
    published = live.Published(project / "snapshots/tiny")
    before, _, _ = published.read()
    # Another source each time.
    table = digits_table().slice(before, 300 + 10 * before)
    pq.write_table(table, project / "source/one.parquet")
    live.pause_at(project, *MOMENTS[stage])
    paused = live.wait_for_pause(served, live.launch_job(served, "tiny"))
    assert paused.pid == live.worker(served, paused.run_id)

    live.kill(paused.pid)

    assert live.wait_for_end(served, paused.run_id) == "FAILURE"
    (project / "paused").unlink()
    again = live.reexecute(served, paused.run_id)
    assert live.wait_for_end(served, again) == "SUCCESS", f"see {project}/server.log"
    assert published.read() == (before + 1, before + 1, table.num_rows)
    assert published.builds() == before + 1, "the build that was killed has been finished, and no other was begun"
    assert_found(project / "snapshots/tiny", table)


def assert_found(root: Path, table: pa.Table) -> None:
    """Every object is whole, and rows of all parts of the source are found."""
    assert verify_snapshot(root).passed
    sample = table.take([0, table.num_rows // 2, table.num_rows - 1])
    queries = np.stack(sample.column("pixels").to_numpy()).astype(np.float32)
    with ShardedVectorReader(root) as reader:
        found = [answer.results[0].id for answer in reader.batch_search(queries, top_k=1)]
    assert found == sample.column("id").to_pylist()
