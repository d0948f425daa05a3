"""Clusters of two workers on this machine, one of a kind for all tests of a module."""

import importlib.util
import os
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

    local: dict[str, Any] = {"host": "127.0.0.1", "dashboard_address": None, "memory_limit": None}
    with LocalCluster(n_workers=WORKERS, threads_per_worker=1, **local) as cluster, Client(cluster) as client:
        yield lambda: DaskEngine(client)
