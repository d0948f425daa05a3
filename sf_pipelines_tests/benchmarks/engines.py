"""Build of 200,000 x 128, CLUSTER, 16 shards, on each engine with one worker and with two, beside ``local``.

Every case is a process with a cluster of its own, and every build has its own store on local disk. Routing and shard
builds are spread over the workers; all else is done by the driver, whatever the engine. Then four times as many rows,
on the engine that adds least and on the one that adds most: is twice as fast what two workers come to?
"""

import dataclasses
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sf_pipelines.snapshot.run.tasks import Engine
from sf_pipelines_tests.benchmarks import child

if TYPE_CHECKING:
    from concurrent.futures import Future

    from sf_pipelines.snapshot.config import WriteConfig
    from sf_pipelines.snapshot.run.tasks import Outcome, Task

ROWS, MANY_ROWS, DIM, SHARDS = 200_000, 800_000, 128, 16
ENGINES, WORKERS = ("local", "dask", "ray", "spark"), (1, 2)
# Each figure is of the build with the shortest spread part: a machine that others use only ever makes it longer, and
# in the first one a worker that has not routed before loads its libraries.
REPEATS = 2
# LANCE_IO_THREADS stays: with one, LanceDB 0.40 waits for ever when it makes an index.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "LANCE_CPU_THREADS")


class Watched(Engine):
    """An engine that keeps what became of every task.

    Args:
        engine: does the work.
    """

    remote = True

    def __init__(self, engine: "Engine") -> None:
        self.name = engine.name
        self.slots = engine.slots
        self.futures: list[Future[Outcome]] = []
        self._engine = engine

    def submit(self, config: "WriteConfig", task: "Task") -> "Future[Outcome]":
        """As the engine does."""
        future = self._engine.submit(config, task)
        self.futures.append(future)
        return future

    def stop(self) -> None:
        """As the engine does."""
        self._engine.stop()

    def close(self) -> None:
        """As the engine does."""
        self._engine.close()


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        engine: its type.
        workers: tasks at a time.
        threads: of the libraries in each process; None is the engine's choice, or theirs.
    """

    engine: str
    workers: int
    threads: int | None


CASES = [Case(engine, workers, 1) for workers in WORKERS for engine in ENGINES]
# What the engine's own choice does.
CASES += [Case("local", workers, None) for workers in WORKERS]
FEW_CASES = [Case(engine, workers, 1) for workers in WORKERS for engine in ("local", "spark")]


def work(source: str, folder: str, engine: str, workers: int, threads: int | None) -> dict[str, Any]:
    """Builds on one cluster, after a small one in which every worker starts.

    Args:
        source: Parquet file.
        folder: for the stores and the cache.
        engine: its type.
        workers: tasks at a time.
        threads: of the libraries in this process and in the workers, which inherit it; None is the engine's choice.
    """
    if threads is not None:
        # Before the libraries are loaded, which look at it once.
        os.environ.update(dict.fromkeys(THREADS, str(threads)))
    from sf_pipelines import WriteConfig, build_snapshot
    from sf_pipelines.engines import open_engine
    from sf_pipelines.snapshot.errors import MissingExtraError
    from sf_pipelines_tests.tables import small_config, write_source

    root = Path(folder)
    write_source(root / "source.parquet")
    small = small_config(root, num_dbs=4 * workers, recall_gate={"min_recall": 0.5})
    large = [
        WriteConfig(
            name="bench",
            source=source,
            store=str(root / f"bench-{number}"),
            num_dbs=SHARDS,
            payload_cols=("title",),
            vector_spec={"dim": DIM},  # pyright: ignore[reportArgumentType]
            recall_gate={"min_recall": 0.9},  # pyright: ignore[reportArgumentType]
        )
        for number in range(REPEATS)
    ]
    began = time.perf_counter()
    try:
        opened = open_engine({"type": engine, "workers": workers})
    except MissingExtraError as error:
        return {"skipped": str(error)}
    opening = time.perf_counter() - began
    with Watched(opened) as watched:
        first = build_snapshot(small, engine=watched, cache_dir=root / "cache").durations
        builds: list[dict[str, Any]] = []
        for config in large:
            watched.futures.clear()
            began = time.perf_counter()
            durations = build_snapshot(config, engine=watched, cache_dir=root / "cache").durations
            whole = time.perf_counter() - began
            builds.append(
                {
                    "route": durations["route"],
                    "shards": durations["shards"],
                    "spread": durations["route"] + durations["shards"],
                    "whole": whole,
                    **_outcomes(watched),
                }
            )
    best = min(builds, key=lambda build: build["spread"])
    return {"opening": opening, "first": first["route"] + first["shards"], **best}


def _outcomes(watched: Watched) -> dict[str, Any]:
    # The future of a task whose worker was lost has none; another try has.
    done = [future.result() for future in watched.futures if future.exception() is None]
    peaks: dict[str, int] = defaultdict(int)
    for outcome in done:
        peaks[outcome.worker] = max(peaks[outcome.worker], outcome.peak_bytes)
    busy = sum(outcome.seconds for outcome in done)
    return {"tasks": len(done), "busy": busy, "peaks": sorted(peak / 2**20 for peak in peaks.values())}


def main() -> None:
    """Prints the figures."""
    for rows, cases in ((ROWS, CASES), (MANY_ROWS, FEW_CASES)):
        load = os.getloadavg()[0]
        with child.folder() as name:
            source = str(name / "source.parquet")
            child.run("sf_pipelines_tests.benchmarks.data", path=source, rows=rows, dim=DIM)
            figures = {case: _run(source, case) for case in cases}
        _print(Console(width=130), rows, figures, load)


def _run(source: str, case: Case) -> dict[str, Any]:
    with child.folder() as name:
        return child.run(
            "sf_pipelines_tests.benchmarks.engines", source=source, folder=str(name), **dataclasses.asdict(case)
        )


def _print(out: Console, rows: int, measured: dict[Case, dict[str, Any]], load: float) -> None:
    cores = len(os.sched_getaffinity(0))
    out.rule(f"engines: {rows:,} x {DIM}, cosine, CLUSTER, {SHARDS} shards, LanceDB, local disk, {cores} cores")
    table = Table(
        "engine", "workers", "open", "first", "route", "shards", "spread", "x local", "1 : 2", "tasks'", "over"
    )
    for title in ("over %", "MB a worker", "whole"):
        table.add_column(title)
    for case, figures in measured.items():
        if "skipped" in figures:
            out.print(f"{case.engine}, {case.workers} workers: skipped: {figures['skipped']}")
        else:
            table.add_row(*_row(case, figures, measured))
    out.print(table)
    out.print(
        f"Seconds, of the build with the shortest spread part, of {REPEATS} on one cluster; load of the machine before "
        f"the first: {load:.1f}.\n"
        "open: until the engine is there. first: spread part of a build of 600 rows after that, in which workers start "
        "and load most of their libraries.\n"
        "spread: wall time of routing and shard builds. x local: against local with as many workers. 1 : 2: one "
        "worker's against two workers'.\n"
        "tasks': sum of what the tasks themselves took. over: spread x workers less that, and its share of spread x "
        "workers: shipping, the driver's own work, and workers without a task at the end of a stage.\n"
        "whole: with scan, sample, train, assemble, gate and promote, which the driver does.\n"
        f"Each process has {', '.join(THREADS)} = 1, so that a worker is about one core, and two do not fight for two; "
        "own threads: what the engine chooses for each process."
    )


def _row(case: Case, figures: dict[str, Any], measured: dict[Case, dict[str, Any]]) -> list[str]:
    local = measured[dataclasses.replace(case, engine="local", threads=1)]
    alone = measured[dataclasses.replace(case, workers=1)]
    capacity = figures["spread"] * case.workers
    over = capacity - figures["busy"]
    return [
        case.engine if case.threads else f"{case.engine}, own threads",
        str(case.workers),
        *(f"{figures[name]:.2f}" for name in ("opening", "first", "route", "shards", "spread")),
        f"{figures['spread'] / local['spread']:.2f}",
        f"{alone['spread'] / figures['spread']:.2f}",
        f"{figures['busy']:.2f}",
        f"{over:.2f}",
        f"{100 * over / capacity:.0f}",
        " ".join(f"{peak:.0f}" for peak in figures["peaks"]),
        f"{figures['whole']:.2f}",
    ]
