"""The daemon is killed, and the whole machine, while a run is open; started again, nothing is lost or made twice."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines_tests.orchestration import deployment as live
from sf_pipelines_tests.orchestration.browser import Served, serve, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROWS = 400


def processes(project: Path, part: str = "") -> list[int]:
    """Processes of a deployment, by their folder and command."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            ours = (entry / "cwd").readlink() == project and part.encode() in (entry / "cmdline").read_bytes()
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        if ours:
            found.append(int(entry.name))
    return found


def run_keys(served: Served) -> Counter[str]:
    """How many runs there are of each request."""
    tags = (tag for run in served.runs() for tag in run["tags"])
    return Counter(tag["value"] for tag in tags if tag["key"] == "dagster/run_key")


def open_run(served: Served) -> str:
    """The run that a sensor asked for and that now waits in the middle of a write."""
    wait_for((served.project / "paused").exists, seconds=live.PATIENCE, what=f"a run; {served.project}/server.log")
    return next(run["runId"] for run in served.runs() if run["status"] == "STARTED")


def test_a_daemon_and_a_machine_that_are_killed(tmp_path: Path) -> None:
    project = tmp_path / "project"
    live.make_project(
        project,
        live.snapshot_attributes(
            "tiny",
            schedule={"cron": "* * * * *"} | live.RUNNING,
            source_sensor={"interval_seconds": 1, "settle_seconds": 0} | live.RUNNING,
        ),
        pausing=True,
    )
    state = live.Published(project / "snapshots/tiny")
    live.pause_at(project, "routed/range-", "after")
    pq.write_table(digits_table().slice(0, ROWS), project / "source/one.parquet")
    with serve(project) as served:
        run = open_run(served)
        (daemon,) = processes(project, "dagster._daemon")
        live.kill(daemon)
        # Without its daemon `dagster dev` ends; the run goes on by itself.
        wait_for(lambda: not processes(project, "dagster\0dev"), seconds=60, what="dagster dev to end")
        with serve(project) as restarted:
            live.go_on(project)
            assert live.wait_for_end(restarted, run) == "SUCCESS"
            # A minute passes, so that the schedule has asked, too.
            wait_for(lambda: len(restarted.runs()) >= 2, seconds=90, what="a run of the schedule")
            # Only those that are there now: it asks for another one every minute.
            there = {one["runId"] for one in restarted.runs()}
            wait_for(
                lambda: {one["status"] for one in restarted.runs() if one["runId"] in there} == {"SUCCESS"},
                seconds=live.PATIENCE,
                what="all runs to end",
            )
            assert set(run_keys(restarted).values()) == {1}
            assert state.read() == (1, 1, ROWS)

            live.pause_at(project, "/db=00001/attempt", "after")
            pq.write_table(digits_table().slice(0, ROWS + 100), project / "source/one.parquet")
            died = open_run(restarted)
            for pid in processes(project):
                live.kill(pid)
    (project / "paused").unlink()
    with serve(project) as served:
        # Nobody tells Dagster that the run is gone; the next minute of the schedule goes on with the same build.
        wait_for(lambda: state.read() == (2, 2, ROWS + 100), seconds=150, what=f"the snapshot; {project}/server.log")
        assert live.status(served, died) == "STARTED"
        assert set(run_keys(served).values()) == {1}
    assert state.builds() == 2, "the build that was killed has been finished"
