"""Golden snapshots on an S3 server, where their manifests say they are, and copied to a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.reader.reader import open_reader
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.conftest import make_bucket
from sf_pipelines_tests.golden.snapshots import UNIFIED, VECTOR, fill

Open = Callable[[str], Any]


@pytest.fixture(scope="session")
def golden_bucket(moto_options: S3Options) -> str:
    """The bucket that the golden manifests name."""
    make_bucket(moto_options, "golden")
    for name in (*VECTOR, *UNIFIED):
        fill(Store.open(f"s3://golden/{name}", moto_options), name)
    return "golden"


@pytest.fixture(params=["s3", "disk"])
def opened(request: pytest.FixtureRequest, golden_bucket: str, moto_options: S3Options, tmp_path: Path) -> Open:
    """Opens a snapshot by name, at either place."""

    def open_one(name: str) -> Any:
        root: str | Path = f"s3://{golden_bucket}/{name}"
        if request.param == "disk":
            root = tmp_path / "copied here" / name
            fill(Store.open(root, create=True), name)
        reader = open_reader(root, s3=moto_options if request.param == "s3" else None, cache_dir=tmp_path / "cache")
        request.addfinalizer(reader.close)
        return reader

    return open_one
