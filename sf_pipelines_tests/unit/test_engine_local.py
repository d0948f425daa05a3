"""Processes of the local engine share the cores."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines import WriteConfig
from sf_pipelines.engines.local import LocalEngine
from sf_pipelines.snapshot.run.tasks import Task

_NAMES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "LANCE_CPU_THREADS")


class Telling(WriteConfig):
    """A configuration that makes its worker tell how many threads libraries have there.

    Attributes:
        told: file to tell it in.
    """

    told: Path

    def __setstate__(self, state: dict[Any, Any]) -> None:
        from threadpoolctl import threadpool_info

        super().__setstate__(state)
        threads = {name: os.environ.get(name) for name in _NAMES}
        pools = [pool["num_threads"] for pool in threadpool_info()]
        self.told.write_text(json.dumps({"threads": threads, "pools": pools}))


@pytest.fixture
def config(tmp_path: Path) -> Telling:
    return Telling(
        name="told",
        source=str(tmp_path / "none.parquet"),
        store=str(tmp_path / "store"),
        num_dbs=1,
        vector_spec={"dim": 4},  # pyright: ignore[reportArgumentType]
        told=tmp_path / "told.json",
    )


@pytest.mark.parametrize(("cores", "workers", "each"), [(2, 2, "1"), (8, 2, "4"), (2, 3, "1")])
def test_workers_have_threads_for_their_share_of_the_cores(
    config: Telling, monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, each: str
) -> None:
    for name in _NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    told = _told(config, workers)
    assert told["threads"] == dict.fromkeys(_NAMES, each)
    assert told["pools"]
    assert all(pool <= int(each) for pool in told["pools"])


def test_variables_that_are_set_stay(config: Telling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name in _NAMES:
        monkeypatch.setenv(name, "1")
    assert _told(config, workers=2) == {"threads": dict.fromkeys(_NAMES, "1"), "pools": [1]}


def _told(config: Telling, workers: int) -> dict[str, Any]:
    with LocalEngine(workers) as engine:
        outcome = engine.submit(config, Task(stage="build_shard", run_id="none", number=0)).result()
    # There is no such build; what was wanted came before.
    assert outcome.fault is not None
    return json.loads(config.told.read_text())
