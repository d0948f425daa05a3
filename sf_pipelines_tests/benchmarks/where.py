"""Where the time of a search goes: timers around the functions that do its parts, in one run."""

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from sf_pipelines import AsyncShardedVectorReader, ShardedVectorReader
from sf_pipelines.snapshot.index.scan import MemoryScan
from sf_pipelines.snapshot.reader import search
from sf_pipelines.snapshot.reader.merge import Candidates

_REPEATS, _BATCH = 300, 256
# What each part is and where it is done. None of them calls another one. Merging scores the candidates exactly.
_PARTS: tuple[tuple[str, Any, str], ...] = (
    ("check", search, "as_queries"),
    ("plan", search, "plan_for"),
    ("scan", MemoryScan, "near"),
    ("merge", Candidates, "merge"),
    ("payloads", search._Searcher, "_with_payloads"),
)


def report(
    out: Console,
    reader: ShardedVectorReader,
    tasks: AsyncShardedVectorReader,
    loop: asyncio.Runner,
    queries: NDArray[np.float32],
    probes: int,
) -> None:
    """Prints the mean time of each part at a number of probes; the rest is everything else, waits for threads too."""
    batch = queries[:_BATCH]

    async def by_tasks(n: int) -> None:
        for at in range(n):
            await tasks.search(queries[at % len(queries)], num_probes=probes)

    def by_thread(n: int) -> None:
        for at in range(n):
            reader.search(queries[at % len(queries)], num_probes=probes)

    def in_batches(n: int) -> None:
        for _ in range(n):
            reader.batch_search(batch, num_probes=probes)

    ways: dict[str, tuple[Callable[[int], object], int]] = {
        "search, blocking": (by_thread, _REPEATS),
        "search, asyncio": (lambda n: loop.run(by_tasks(n)), _REPEATS),
        f"batch_search of {_BATCH}, blocking": (in_batches, _REPEATS // 20),
    }
    names = [name for name, _, _ in _PARTS]
    table = Table(f"{probes} probes, mean ms", "all", *names, "the rest", title="where it goes", title_justify="left")
    for name, (run, repeats) in ways.items():
        run(3)
        with _timed() as spent:
            started = time.perf_counter()
            run(repeats)
            total = time.perf_counter() - started
        parts = [spent[part] for part in names]
        each = [1000 * taken / repeats for taken in (total, *parts, total - sum(parts))]
        table.add_row(name, f"{each[0]:.3f}", *(f"{taken:.3f} ({100 * taken / each[0]:.0f} %)" for taken in each[1:]))
    out.print(table)


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Seconds that are spent in each part as long as the block lasts."""
    spent = {name: 0.0 for name, _, _ in _PARTS}
    with ExitStack() as patches:
        for name, owner, function in _PARTS:
            wrapped = _wrap(getattr(owner, function), name, spent)
            patches.enter_context(mock.patch.object(owner, function, wrapped))
        yield spent


def _wrap(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def call(*args: Any, **more: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **more)
        finally:
            spent[name] += time.perf_counter() - started

    def steps(*args: Any, **more: Any) -> Any:
        started = time.perf_counter()
        try:
            return (yield from function(*args, **more))
        finally:
            spent[name] += time.perf_counter() - started

    return steps if inspect.isgeneratorfunction(function) else call
