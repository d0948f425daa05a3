"""A copy of the project served by Dagster, and a browser that looks at it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webdriver import WebDriver

from sf_pipelines_tests.conftest import free_port

ROOT = Path(__file__).parents[2]
SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1600,1100",
)


@dataclass(frozen=True)
class Served:
    """A running Dagster.

    Attributes:
        url: of its webserver.
        project: folder of the copied project, also its DAGSTER_HOME.
    """

    url: str
    project: Path

    def query(self, text: str, **variables: Any) -> dict[str, Any]:
        """Answer of a GraphQL query."""
        request = urllib.request.Request(  # noqa: S310 - always http, on this machine
            f"{self.url}/graphql",
            json.dumps({"query": text, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return json.load(answer)["data"]

    def published(self) -> str | None:
        """The run that the demo's pointer names."""
        path = self.project / "data/digits/snapshot/_CURRENT"
        return json.loads(path.read_bytes())["run_id"] if path.exists() else None

    def runs(self) -> list[dict[str, Any]]:
        """All runs, newest first."""
        found = self.query("{runsOrError {... on Runs {results {runId status jobName tags {key value}}}}}")
        return found["runsOrError"]["results"]


def copy_project(target: Path) -> None:
    """What Dagster needs of the project, without data and runs."""
    shutil.copytree(ROOT / "sf_pipelines", target / "sf_pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "workspace.yaml", "dagster.yaml"):
        shutil.copy(ROOT / name, target / name)


@contextmanager
def serve(project: Path) -> Iterator[Served]:
    """Runs ``dagster dev`` as ``make ui`` does, until the block ends."""
    port = free_port()
    command = [sys.executable, "-m", "dagster", "dev", "--workspace", "workspace.yaml", "--host", "127.0.0.1"]
    # The copy comes first on the path, so that its data lie in it too.
    env = os.environ | {"DAGSTER_HOME": str(project), "PYTHONPATH": str(project)}
    with (project / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)], cwd=project, env=env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            served = Served(f"http://127.0.0.1:{port}", project)
            wait_for(lambda: _answers(served), seconds=120, what=f"Dagster to start; see {project}/server.log")
            yield served
        finally:
            _stop(server)


def _answers(served: Served) -> bool:
    try:
        found = served.query("{workspaceOrError {... on Workspace {locationEntries {loadStatus}}}}")
    except OSError:
        return False
    entries = found["workspaceOrError"]["locationEntries"]
    return bool(entries) and all(entry["loadStatus"] == "LOADED" for entry in entries)


def _stop(server: subprocess.Popen[bytes]) -> None:
    # The group is the server's own: it holds its webserver, daemon, code server and runs, and nothing else.
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def browser() -> Iterator[WebDriver]:
    """A fresh headless chromium; without one the test is skipped, in continuous integration it fails."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if programs[0] is None or programs[1] is None:
        message = "chromium and chromedriver are needed: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with tempfile.TemporaryDirectory(prefix="sf_pipelines-browser-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = programs[0]
        for switch in (*SWITCHES, f"--user-data-dir={profile}"):
            options.add_argument(switch)
        driver = webdriver.Chrome(options=options, service=Service(programs[1]))
        try:
            yield driver
        finally:
            driver.quit()


def wait_for(done: Callable[[], object], *, seconds: float, what: str) -> None:
    """Waits until a condition holds.

    Raises:
        TimeoutError: it did not.
    """
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.5)
