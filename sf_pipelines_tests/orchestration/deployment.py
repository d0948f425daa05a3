"""A deployment of a few small snapshots: its project, and what a user asks of its running Dagster."""

import os
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sf_pipelines import ShardedVectorReader
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.manifest.publish import history, read_pointer
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.orchestration.browser import Served, copy_project, wait_for

REPOSITORY = {"repositoryLocationName": "sf_pipelines", "repositoryName": "__repository__"}
RUNNING = {"default_status": "running"}
PATIENCE = 180.0
_LAUNCHED = "{... on LaunchRunSuccess {run {runId}} ... on PythonError {message}}"
_LAUNCH = "mutation ($params: ExecutionParams!) {launchRun(executionParams: $params) " + _LAUNCHED + "}"
_REEXECUTE = (
    "mutation ($params: ReexecutionParams!) {launchRunReexecution(reexecutionParams: $params) " + _LAUNCHED + "}"
)
_EVENTS = """query ($id: ID!) {runOrError(runId: $id) {... on Run {
  eventConnection {events {... on MessageEvent {message}}}}}}"""


def snapshot_attributes(name: str, **changes: Any) -> dict[str, Any]:
    """The YAML of a snapshot of two shards from ``source/`` to ``snapshots/<name>``, both in the project."""
    return {
        "name": name,
        "source": "source/*.parquet",
        "store": f"snapshots/{name}",
        "num_dbs": 2,
        "vector_spec": {"dim": 64, "vector_col": "pixels"},
        "recall_gate": {"k": 5, "min_recall": 0.8, "query_rows": 200},
        **changes,
    }


def make_project(root: Path, *snapshots: dict[str, Any], step_processes: bool = False, pausing: bool = False) -> None:
    """A copy of the project with other snapshots in place of the demos.

    Args:
        root: a folder that does not exist.
        *snapshots: attributes of each.
        step_processes: one a step; else a run is one process.
        pausing: runs can be stopped (see ``pausing``).
    """
    copy_project(root)
    for folder in (root / "sf_pipelines/defs").iterdir():
        if (folder / "defs.yaml").exists():
            shutil.rmtree(folder)
    kind = "sf_pipelines.components.VectorSnapshotComponent"
    if pausing:
        shutil.copy(Path(__file__).with_name("pausing.py"), root)
        kind = "pausing.PausingSnapshot"
    (root / "source").mkdir()
    executor = {"executor": "multiprocess"} if step_processes else {}
    for attributes in snapshots:
        folder = root / "sf_pipelines/defs" / attributes["name"]
        folder.mkdir()
        (folder / "defs.yaml").write_text(yaml.safe_dump({"type": kind, "attributes": attributes | executor}))


@dataclass(frozen=True)
class Paused:
    """A run that waits in the middle of a write.

    Attributes:
        run_id: of the run.
        pid: of the process that writes.
    """

    run_id: str
    pid: int


class Published:
    """What a store serves.

    Attributes:
        store: root of the snapshot.
    """

    def __init__(self, root: str | Path, s3: S3Options | None = None) -> None:
        if isinstance(root, Path):
            root.mkdir(parents=True, exist_ok=True)
        self.store, self.s3 = Store.open(root, s3), s3

    def read(self) -> tuple[int, int, int]:
        """Sequence number of the pointer, manifests of the history, and rows that a reader counts."""
        seq, manifests = read_pointer(self.store).seq or 0, len(history(self.store))
        if not seq:
            return 0, manifests, 0
        with ShardedVectorReader(self.store.url, s3=self.s3) as reader:
            return seq, manifests, sum(shard.vector_count for shard in reader.shard_details())

    def builds(self) -> int:
        """How many builds were begun, whether they were published or not."""
        return sum(name.startswith("run_id=") for name in self.store.folders("staging"))


def launch_job(served: Served, name: str) -> str:
    """Starts ``build_<name>`` as its page does; the id of the run."""
    selector = REPOSITORY | {"jobName": f"build_{name}"}
    return served.query(_LAUNCH, params={"selector": selector})["launchRun"]["run"]["runId"]


def launch_assets(served: Served, *keys: dict[str, Any]) -> str:
    """*Materialize selected*, without partitions; the id of the run."""
    selector = REPOSITORY | {"jobName": "__ASSET_JOB", "assetSelection": list(keys)}
    return served.query(_LAUNCH, params={"selector": selector})["launchRun"]["run"]["runId"]


def reexecute(served: Served, run_id: str) -> str:
    """*Re-execute from failure*; the id of the new run."""
    params = {"parentRunId": run_id, "strategy": "FROM_FAILURE"}
    return served.query(_REEXECUTE, params=params)["launchRunReexecution"]["run"]["runId"]


def status(served: Served, run_id: str) -> str:
    """Of a run."""
    return served.query("query ($id: ID!) {runOrError(runId: $id) {... on Run {status}}}", id=run_id)["runOrError"][
        "status"
    ]


def wait_for_end(served: Served, run_id: str) -> str:
    """How a run ended."""
    ended = {"SUCCESS", "FAILURE", "CANCELED"}
    what = f"the run {run_id} to end; see {served.project}/server.log"
    wait_for(lambda: status(served, run_id) in ended, seconds=PATIENCE, what=what)
    return status(served, run_id)


def worker(served: Served, run_id: str) -> int:
    """Id of the process that executes a run."""
    events = served.query(_EVENTS, id=run_id)["runOrError"]["eventConnection"]["events"]
    found = [match for event in events if (match := re.search(r"\(pid: (\d+)\)", event["message"]))]
    return int(found[0][1])


def pause_at(project: Path, needle: str, when: str) -> None:
    """The next write to such a name waits."""
    (project / "pause").write_text(f"{needle} {when}")


def wait_for_pause(served: Served, run_id: str) -> Paused:
    """Waits until the run waits."""
    paused = served.project / "paused"
    wait_for(
        lambda: paused.exists() or status(served, run_id) in {"SUCCESS", "FAILURE"}, seconds=PATIENCE, what="the pause"
    )
    assert paused.exists(), f"the run {run_id} ended without such a write"
    return Paused(run_id, int(paused.read_text()))


def go_on(project: Path) -> None:
    """Ends the pause."""
    (project / "paused").unlink()


def kill(pid: int) -> None:
    """Ends a process of the deployment at once."""
    os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether a process goes on (one that has ended and is not yet reaped does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_death(pid: int) -> None:
    """Waits until a process has ended."""
    deadline = time.monotonic() + PATIENCE
    while is_alive(pid):
        assert time.monotonic() < deadline, f"the process {pid} goes on"
        time.sleep(0.1)
