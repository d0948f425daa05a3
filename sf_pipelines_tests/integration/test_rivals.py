"""Two builds that want the pointer at the same time."""

import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines import S3Options, WriteConfig
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.errors import PublishConflictError
from sf_pipelines.snapshot.manifest.publish import history, read_pointer
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.builds import assembled
from sf_pipelines_tests.tables import small_config, write_source


def gated(config: WriteConfig, cache: Path) -> str:
    """Builds up to the gate; run id."""
    build, run_id = assembled(config, cache, force=True)
    with build:
        assert all(verdict.passed for verdict in stages.gate(build, run_id))
    return run_id


def promote(config: WriteConfig, run_id: str) -> tuple[str, Any, Any]:
    """("won", run, None) or ("lost", ours, theirs)."""
    try:
        with Build(config) as build:
            return ("won", stages.promote(build, run_id).run_id, None)
    except PublishConflictError as error:
        return ("lost", error.ours, error.theirs)


def check_one_winner(store: Store, outcomes: list[tuple[str, Any, Any]], runs: list[str]) -> None:
    pointer = read_pointer(store).pointer
    assert pointer is not None
    (winner,) = [run for word, run, _ in outcomes if word == "won"]
    (lost,) = [(ours, theirs) for word, ours, theirs in outcomes if word == "lost"]
    assert winner == pointer.run_id
    assert lost == (next(run for run in runs if run != winner), winner)
    # What lost was never current and is not listed.
    assert [entry.run_id for entry in history(store)] == [winner]


@pytest.fixture(params=["local", "s3"])
def rivals(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[WriteConfig], list[str]]:
    """Two gated runs of one store, from two sources."""
    place: dict[str, Any] = {}
    if request.param == "s3":
        options: S3Options = request.getfixturevalue("moto_options")
        place = {"store": f"s3://{request.getfixturevalue('bucket')}/small", "s3": options}
    configs: list[WriteConfig] = []
    for seed in range(2):
        write_source(tmp_path / f"{seed}.parquet", seed=seed)
        configs.append(small_config(tmp_path, source=str(tmp_path / f"{seed}.parquet"), **place))
    return configs, [gated(config, tmp_path / "cache") for config in configs]


def test_two_threads_promote_and_one_wins(rivals: tuple[list[WriteConfig], list[str]]) -> None:
    configs, runs = rivals
    barrier = threading.Barrier(2)

    def race(number: int) -> tuple[str, Any, Any]:
        barrier.wait()
        return promote(configs[number], runs[number])

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(race, range(2)))
    check_one_winner(Store.open(configs[0].store, configs[0].s3), outcomes, runs)


def test_two_processes_promote_and_one_wins(rivals: tuple[list[WriteConfig], list[str]]) -> None:
    configs, runs = rivals
    # LanceDB's threads do not survive a fork.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        outcomes = list(pool.map(promote, configs, runs))
    check_one_winner(Store.open(configs[0].store, configs[0].s3), outcomes, runs)
