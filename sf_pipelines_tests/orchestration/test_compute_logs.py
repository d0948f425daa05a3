"""The instance that docs/automation.md tells of: compute logs on S3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import yaml

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines_tests.orchestration.test_automation_docs import INSTANCE

pytestmark = [pytest.mark.slow]

JOB = """\
import dagster as dg


@dg.op
def speak():
    print("a line of the step")


@dg.job
def talk():
    speak()
"""


def test_the_output_of_steps_is_kept_on_s3(bucket: str, moto_options: S3Options, tmp_path: Path) -> None:
    settings = yaml.safe_load(INSTANCE[0].replace("my-dagster-logs", bucket))
    settings["compute_logs"]["config"]["endpoint_url"] = moto_options.endpoint_url
    settings["telemetry"] = {"enabled": False}
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text(json.dumps(settings))
    (tmp_path / "talk.py").write_text(JOB)
    own = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, "-m", "dagster", "job", "execute", "-f", "talk.py", "-j", "talk"]

    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | own | {"DAGSTER_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    client = boto3.client(
        "s3",
        endpoint_url=moto_options.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",  # noqa: S106 - of the test server
    )
    keys = [found["Key"] for found in client.list_objects_v2(Bucket=bucket).get("Contents", [])]
    (out,) = [key for key in keys if key.endswith(".out")]
    assert out.startswith("compute/storage/")
    assert client.get_object(Bucket=bucket, Key=out)["Body"].read() == b"a line of the step\n"
    client.close()
