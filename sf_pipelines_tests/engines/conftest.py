"""Clusters of two workers on this machine, one of a kind for all tests of a module."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sf_pipelines.snapshot.engine import Engine

Opener = Callable[[], Engine]
WORKERS = 2


def _need(condition: bool, what: str) -> None:
    """Skips where a part is not installed; in CI all of them must be."""
    if not condition:
        say = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        say(f"{what} is not installed")


@pytest.fixture(scope="module")
def local_engine() -> Opener:
    """Processes."""
    from sf_pipelines.engines.local import LocalEngine

    return lambda: LocalEngine(WORKERS)


@pytest.fixture(scope="module")
def dask_engine() -> Iterator[Opener]:
    """A scheduler and two workers."""
    _need(importlib.util.find_spec("distributed") is not None, "distributed")
    from distributed import Client, LocalCluster

    from sf_pipelines.engines.dask import DaskEngine

    local: dict[str, Any] = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "memory_limit": None}
    with LocalCluster(n_workers=WORKERS, threads_per_worker=1, **local) as cluster, Client(cluster) as client:
        yield lambda: DaskEngine(client)


@pytest.fixture(scope="module")
def ray_engine() -> Iterator[Opener]:
    """A Ray of two cores."""
    _need(importlib.util.find_spec("ray") is not None, "ray")
    from sf_pipelines.engines.ray import RayEngine

    with RayEngine.open(None, WORKERS):
        yield RayEngine


@pytest.fixture(scope="module")
def spark_engine() -> Iterator[Opener]:
    """A Spark of two cores."""
    _need(importlib.util.find_spec("pyspark") is not None, "pyspark")
    _need(shutil.which("java") is not None, "java, which Spark needs,")
    from pyspark.sql import SparkSession

    from sf_pipelines.engines.spark import SparkEngine

    builder: Any = SparkSession.builder
    fields = {"spark.driver.host": "127.0.0.1", "spark.ui.enabled": "false"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        session = builder.master(f"local[{WORKERS}]").config(map=fields).getOrCreate()
        yield lambda: SparkEngine(session)
        session.stop()
