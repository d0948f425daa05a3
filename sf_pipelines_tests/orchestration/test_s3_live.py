"""Source and store on an S3 server: Dagster's command line, and its daemon with schedule and sensors on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.orchestration import deployment as live
from sf_pipelines_tests.orchestration.browser import serve, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROWS = 400
# Dagster refuses a range for an asset that is only observed.
SELECTED = "key:tiny/* and not key:tiny/published_snapshot"


class Lake:
    """A bucket with source and store.

    Attributes:
        url: of the bucket.
        options: its credentials.
        published: the snapshot.
    """

    def __init__(self, bucket: str, options: S3Options) -> None:
        self.url, self.options = f"s3://{bucket}", options
        self.published = live.Published(f"{self.url}/serving/tiny", options)

    def put(self, name: str, table: pa.Table) -> None:
        """An object of the source."""
        sink = BytesIO()
        pq.write_table(table, sink)
        Store.open(f"{self.url}/lake", self.options).put(name, sink.getvalue())


@pytest.fixture
def lake(bucket: str, moto_options: S3Options, monkeypatch: pytest.MonkeyPatch) -> Lake:
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LAKE_KEY", "test")
    monkeypatch.setenv("LAKE_SECRET", "hush-hush")
    return Lake(bucket, moto_options)


@pytest.fixture
def project(lake: Lake, tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "project"
    attributes = live.snapshot_attributes(
        "tiny",
        source=f"{lake.url}/lake/*.parquet",
        store=f"{lake.url}/serving/tiny",
        s3_resource={
            "endpoint_url": lake.options.endpoint_url,
            "region_name": "us-east-1",
            "aws_access_key_id": {"env": "LAKE_KEY"},
            "aws_secret_access_key": {"env": "LAKE_SECRET"},
        },
        schedule={"cron": "* * * * *"} | live.RUNNING,
        source_sensor={"interval_seconds": 1, "settle_seconds": 1} | live.RUNNING,
        pointer_sensor={"interval_seconds": 1} | live.RUNNING,
    )
    live.make_project(root, attributes)
    yield root
    text = "".join(path.read_text(errors="replace") for path in root.rglob("*") if path.suffix in {".log", ".err"})
    assert "hush-hush" not in text


def dagster(project: Path, *words: str) -> None:
    """A command of Dagster's own, in the project."""
    env = os.environ | {"DAGSTER_HOME": str(project), "PYTHONPATH": str(project)}
    command = [sys.executable, "-m", "dagster", *words]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_command_line_builds_from_s3_to_s3(lake: Lake, project: Path) -> None:
    where = ("-m", "sf_pipelines.definitions", "-a", "defs")
    lake.put("one.parquet", digits_table().slice(0, ROWS))

    dagster(project, "job", "execute", *where, "-j", "build_tiny")

    assert lake.published.read() == (1, 1, ROWS)
    lake.put("two.parquet", digits_table().slice(ROWS, 100))
    dagster(project, "asset", "materialize", *where, "--select", SELECTED, "--partition-range", "00000...00001")
    assert lake.published.read() == (2, 2, ROWS + 100)


def test_the_daemon_builds_what_arrives_on_s3(lake: Lake, project: Path) -> None:
    lake.put("one.parquet", digits_table().slice(0, ROWS))
    with serve(project) as served:
        log = f"see {project}/server.log"
        wait_for(
            lambda: lake.published.read() == (1, 1, ROWS), seconds=live.PATIENCE, what=f"the first snapshot; {log}"
        )

        lake.put("two.parquet", digits_table().slice(ROWS, 100))
        wait_for(
            lambda: lake.published.read()[2] == ROWS + 100, seconds=live.PATIENCE, what=f"the second snapshot; {log}"
        )

        def by_schedule() -> list[str]:
            tags = [{tag["key"]: tag["value"] for tag in run["tags"]} | run for run in served.runs()]
            return [run["status"] for run in tags if run.get("dagster/schedule_name") == "tiny_schedule"]

        # What the schedule asked for beside the sensor builds the same or finds it done.
        wait_for(lambda: "SUCCESS" in by_schedule(), seconds=live.PATIENCE, what=f"a run of the schedule; {log}")
        # Only those that are there now: the schedule asks for another one every minute.
        there = {run["runId"] for run in served.runs()}
        wait_for(
            lambda: {run["status"] for run in served.runs() if run["runId"] in there} <= {"SUCCESS", "FAILURE"},
            seconds=live.PATIENCE,
            what=f"all runs; {log}",
        )
    assert lake.published.read() == (2, 2, ROWS + 100)
