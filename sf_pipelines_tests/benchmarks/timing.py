"""Times calls that several callers make at once: threads, or tasks of one event loop.

On a busy machine a call may take ten times as long: callers begin no more calls when their time is up.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Face = Literal["threads", "tasks"]
# Of one measurement.
SECONDS = 0.5
FACES: dict[Face, str] = {"threads": "blocking, threads", "tasks": "asyncio, tasks"}


@dataclass
class Times:
    """Times of calls of one kind; those of several rounds add up.

    Attributes:
        each: milliseconds of each call.
        seconds: from the first call to the end of the last one, over all rounds.
    """

    each: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: "Times") -> None:
        """Joins another round."""
        self.each += other.each
        self.seconds += other.seconds

    def percentile(self, share: float) -> float:
        """Milliseconds."""
        return float(np.percentile(self.each, share))

    def per_second(self, size: int = 1) -> float:
        """Calls a second of all callers together, times the size of a call."""
        return len(self.each) * size / self.seconds


def by_threads(ask: Callable[[int], object], calls: int, callers: int) -> Times:
    """``ask(n)`` for each n below ``calls``, shared out among threads; with one caller by this thread."""

    def work(first: int) -> list[float]:
        each: list[float] = []
        for n in range(first, calls, callers):
            if each and time.perf_counter() > end:
                break
            started = time.perf_counter()
            ask(n)
            each.append(1000 * (time.perf_counter() - started))
        return each

    started = time.perf_counter()
    end = started + SECONDS
    if callers == 1:
        return Times(work(0), time.perf_counter() - started)
    with ThreadPoolExecutor(callers) as threads:
        # Threads are started before the clock.
        list(threads.map(time.sleep, [0.01] * callers))
        started = time.perf_counter()
        end = started + SECONDS
        each = [taken for part in threads.map(work, range(callers)) for taken in part]
        return Times(each, time.perf_counter() - started)


async def by_tasks(ask: Callable[[int], Awaitable[Any]], calls: int, callers: int) -> Times:
    """The same by tasks of this event loop."""

    async def work(first: int) -> list[float]:
        each: list[float] = []
        for n in range(first, calls, callers):
            if each and time.perf_counter() > end:
                break
            started = time.perf_counter()
            await ask(n)
            each.append(1000 * (time.perf_counter() - started))
        return each

    started = time.perf_counter()
    end = started + SECONDS
    parts = await asyncio.gather(*(work(first) for first in range(callers)))
    return Times([taken for part in parts for taken in part], time.perf_counter() - started)


def run(face: Face, loop: asyncio.Runner, ask: Callable[[int], Any], calls: int, callers: int) -> Times:
    """The same by either; tasks run in ``loop``."""
    return by_threads(ask, calls, callers) if face == "threads" else loop.run(by_tasks(ask, calls, callers))
