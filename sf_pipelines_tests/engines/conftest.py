"""Clusters of two workers on this machine, one of a kind for all tests of a file: a worker that has
misbehaved in one goes with it."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines.snapshot.run.tasks import Engine
from sf_pipelines_tests.conftest import free_port

Opener = Callable[[], Engine]
WORKERS = 2


def need(condition: bool, what: str) -> None:
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
    need(importlib.util.find_spec("distributed") is not None, "distributed")
    from distributed import Client, LocalCluster

    from sf_pipelines.engines.dask import DaskEngine

    local: dict[str, Any] = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "memory_limit": None}
    with LocalCluster(n_workers=WORKERS, threads_per_worker=1, **local) as cluster, Client(cluster) as client:
        yield lambda: DaskEngine(client)


@pytest.fixture(scope="module")
def ray_engine() -> Iterator[Opener]:
    """A Ray of two cores."""
    need(importlib.util.find_spec("ray") is not None, "ray")
    from sf_pipelines.engines.ray import RayEngine

    with RayEngine.open(None, WORKERS):
        yield RayEngine


@pytest.fixture(scope="module")
def spark_engine() -> Iterator[Opener]:
    """A Spark of two cores."""
    need(importlib.util.find_spec("pyspark") is not None, "pyspark")
    need(shutil.which("java") is not None, "java, which Spark needs,")
    from pyspark.sql import SparkSession

    from sf_pipelines.engines.spark import SparkEngine

    builder: Any = SparkSession.builder
    fields = {"spark.driver.host": "127.0.0.1", "spark.ui.enabled": "false"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        session = builder.master(f"local[{WORKERS}]").config(map=fields).getOrCreate()
        yield lambda: SparkEngine(session)
        session.stop()


def _wait_for(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Returns when a server listens."""
    until = time.monotonic() + 180
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if server.poll() is not None or time.monotonic() > until:
                pytest.fail(f"Spark Connect does not listen on port {port}: {log.read_text()[-3000:]}")
            time.sleep(0.2)
        else:
            return


@pytest.fixture(scope="module")
def connect_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Spark Connect server of two cores, in a process of its own."""
    need(importlib.util.find_spec("pyspark") is not None, "pyspark")
    need(importlib.util.find_spec("grpc_status") is not None, "pyspark[connect]")
    need(shutil.which("java") is not None, "java, which Spark needs,")
    import pyspark

    port = free_port()
    options = {
        "spark.connect.grpc.binding.address": "127.0.0.1",
        "spark.connect.grpc.binding.port": port,
        "spark.driver.host": "127.0.0.1",
        "spark.ui.enabled": "false",
    }
    command = [f"{Path(pyspark.__file__).parent}/bin/spark-submit", "--master", f"local[{WORKERS}]"]
    command += ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer"]
    command += [word for name, value in options.items() for word in ("--conf", f"{name}={value}")]
    env = os.environ | {"PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(Path(__file__).parents[2])}
    log = tmp_path_factory.mktemp("connect") / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "spark-internal"], env=env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_for(server, port, log)
        yield f"sc://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


@pytest.fixture(scope="module")
def connect_engine(connect_address: str) -> Iterator[Opener]:
    """A session on the Spark Connect server."""
    from sf_pipelines.engines.spark import SparkEngine

    with SparkEngine.open(connect_address, None) as engine:
        yield lambda: SparkEngine(engine.session)
