"""How the independent pieces of a build are spread: tasks, what an engine must do, and the driver above all engines.

A task carries names and no data: whoever performs it reads its input from the object store, writes its part there
under a fresh name, and commits a receipt by conditional create. So it does not matter where a task runs, how often, or
that a copy of it wakes up when everybody has forgotten it: one receipt wins, and nothing else is ever looked at.
"""

import heapq
import os
import random
import re
import resource
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal, Self

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import SfPipelinesError, TaskCrashedError, TasksFailedError, error_of_kind
from sf_pipelines.snapshot.model import Model
from sf_pipelines.snapshot.run.build import Build, Stopwatch
from sf_pipelines.snapshot.run.receipts import RangeReceipt, Receipt, ScanReceipt, ShardReceipt

# How often a task is tried whose failure may pass: a store that does not answer, a worker that is lost.
TRIES = 4
# Seconds before the second try; doubled for each one after it.
_BACKOFF = 0.5
_MOST_BACKOFF = 30.0
# Tasks handed to an engine for each that it runs at a time: none waits for the driver, few have to be called back.
_AHEAD = 2
_POLL_SECONDS = 5.0
_JITTER = random.SystemRandom()


class Task(Model):
    """One piece of a build that needs none of the others.

    Attributes:
        stage: ``route_range`` or ``build_shard``.
        run_id: the build.
        number: of the input range or of the shard.
        rebuild: of a shard: make it again although it is sealed.
    """

    stage: Literal["route_range", "build_shard"]
    run_id: str
    number: int
    rebuild: bool = False

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{'range' if self.stage == 'route_range' else 'shard'} {self.number}"


class Fault(Model):
    """A typed error on its way between processes.

    Attributes:
        kind: the error's ``kind``.
        message: what it said.
    """

    kind: str
    message: str


class Outcome(Model):
    """What became of a task.

    Attributes:
        receipt: of the work; None where it failed.
        fault: why it failed.
        seconds: how long it took, without waiting and without shipping.
        peak_bytes: most memory that the worker's process has ever used.
        worker: ``host:pid`` of the process.
    """

    receipt: RangeReceipt | ShardReceipt | None = None
    fault: Fault | None = None
    seconds: float
    peak_bytes: int
    worker: str


class Engine(ABC):
    """Runs tasks somewhere; a context manager that closes itself.

    The contract, which ``sf_pipelines.snapshot.testing.engine`` checks: the future of a task gives what ``run_task``
    returns; a worker that dies makes it raise ``WorkerLostError``, unless the engine itself has run the task again;
    after ``stop`` no task runs any more.

    Attributes:
        name: as in the configuration.
        remote: whether tasks run in other processes.
        slots: tasks at a time.
    """

    name: str
    remote: bool
    slots: int

    @abstractmethod
    def submit(self, config: WriteConfig, task: Task) -> "Future[Outcome]":
        """Runs ``run_task(config, task)`` as soon as there is room."""

    @abstractmethod
    def stop(self) -> None:
        """Gives up all tasks that are not done, and returns when none of them runs any more."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what the engine has opened."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def peak_bytes() -> int:
    """Most memory that this process has ever used; Linux counts it in KiB.

    ``ru_maxrss`` is taken only where the system tells nothing better: a process inherits it from the one that started
    it, so that the workers of a large driver would seem to be as large.
    """
    status = Path("/proc/self/status")
    own = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.exists() else None
    return 1024 * (int(own[1]) if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def worker_name() -> str:
    """``host:pid`` of this process."""
    return f"{socket.gethostname()}:{os.getpid()}"


class InProcess(Engine):
    """Threads of this process: index libraries let go of the interpreter while they work."""

    name = "in_process"
    remote = False

    def __init__(self, slots: int, work: Callable[[Task], RangeReceipt | ShardReceipt]) -> None:
        self.slots = slots
        self._do = work
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="sf-pipelines-build")

    def submit(self, config: WriteConfig, task: Task) -> "Future[Outcome]":
        """Performs the task with the driver's own build, whose progress is seen; errors are raised as they are."""
        del config
        return self._pool.submit(self._perform, task)

    def _perform(self, task: Task) -> Outcome:
        watch = Stopwatch()
        receipt = self._do(task)
        return Outcome(receipt=receipt, seconds=watch.seconds, peak_bytes=peak_bytes(), worker=worker_name())

    def stop(self) -> None:
        """Nothing new is begun; waits for what runs."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        self.stop()


OnDone = Callable[[Task, Outcome], None]


class _Driver:
    """Keeps an engine busy with tasks until all are done, or one has failed for good."""

    def __init__(self, build: Build, scanned: ScanReceipt, engine: Engine, tasks: Sequence[Task]) -> None:
        self._build = build
        self._scanned = scanned
        self._engine = engine
        self._fresh = list(reversed(tasks))
        # When each is due by ``time.monotonic``, its number, itself, and how often it was tried.
        self._retries: list[tuple[float, int, Task, int]] = []
        self._running: dict[Future[Outcome], tuple[Task, int]] = {}
        self.outcomes: dict[Task, Outcome] = {}
        self.failures: dict[Task, Exception] = {}

    def run(self, on_done: OnDone | None, *, keep_going: bool) -> None:
        """Returns when there is nothing left to do."""
        try:
            while (self._fresh or self._retries or self._running) and (keep_going or not self.failures):
                self._fill()
                done, _ = wait(self._running, timeout=self._patience(), return_when=FIRST_COMPLETED)
                self._build.renew(self._scanned)
                for future in done:
                    self._settle(future, on_done)
        finally:
            if self._running:
                self._engine.stop()

    def _fill(self) -> None:
        now = time.monotonic()
        while len(self._running) < _AHEAD * self._engine.slots:
            if self._retries and self._retries[0][0] <= now:
                _, _, task, tries = heapq.heappop(self._retries)
            elif self._fresh:
                task, tries = self._fresh.pop(), 0
            else:
                return
            self._running[self._engine.submit(self._build.config, task)] = (task, tries)

    def _patience(self) -> float:
        """Seconds until a task is due again, or the lease is to be renewed."""
        if not self._retries:
            return _POLL_SECONDS
        patience = max(0.0, min(_POLL_SECONDS, self._retries[0][0] - time.monotonic()))
        if not self._running:
            time.sleep(patience)
        return patience

    def _settle(self, future: "Future[Outcome]", on_done: OnDone | None) -> None:
        task, tries = self._running.pop(future)
        error: BaseException | None
        try:
            error = future.exception()
        except CancelledError as cancelled:
            error = cancelled
        outcome = None if error else future.result()
        if outcome is not None and outcome.fault is not None:
            error = error_of_kind(outcome.fault.kind, outcome.fault.message)
            error.add_note(f"{task.label}, on worker {outcome.worker}")
        if error is None and outcome is not None:
            self.outcomes[task] = outcome
            if on_done is not None:
                on_done(task, outcome)
            return
        if not isinstance(error, Exception):
            # The engine was interrupted, not the task.
            raise error or RuntimeError(f"{self._engine.name} gave neither an outcome nor an error for {task.label}")
        retryable = isinstance(error, SfPipelinesError) and error.retryable
        if retryable and tries + 1 < TRIES:
            delay = min(_MOST_BACKOFF, _BACKOFF * 2**tries) * _JITTER.uniform(0.5, 1.5)
            heapq.heappush(self._retries, (time.monotonic() + delay, task.number, task, tries + 1))
            return
        self.failures[task] = error


def spread(
    build: Build,
    scanned: ScanReceipt,
    engine: Engine,
    tasks: Sequence[Task],
    *,
    keep_going: bool = False,
    on_done: OnDone | None = None,
) -> list[Receipt]:
    """Has an engine do all tasks; tries again what may pass, with backoff."""
    driver = _Driver(build, scanned, engine, tasks)
    driver.run(on_done, keep_going=keep_going)
    if driver.failures:
        raise _failed(engine, driver.failures, len(tasks), keep_going=keep_going)
    receipts: list[Receipt] = []
    for task in tasks:
        receipt = driver.outcomes[task].receipt
        if receipt is None:
            raise TaskCrashedError(f"{engine.name} says that {task.label} is done, but gives no receipt of it")
        receipts.append(receipt)
    return receipts


def _failed(engine: Engine, failures: dict[Task, Exception], tasks: int, *, keep_going: bool) -> Exception:
    first = next(iter(failures.values()))
    if not engine.remote and (not keep_going or len(failures) == 1 or not isinstance(first, SfPipelinesError)):
        # Of two that fail at the same time the second one changes nothing of what is caught.
        for task, error in list(failures.items())[1:]:
            first.add_note(f"{task.label} failed as well: {type(error).__name__}: {error}")
        return first
    causes = {task.label: error for task, error in sorted(failures.items(), key=lambda item: item[0].number)}
    shown = "; ".join(f"{label}: {type(error).__name__}: {error}" for label, error in causes.items())
    failed = TasksFailedError(f"{len(causes)} of {tasks} tasks failed on engine {engine.name}: {shown}", causes)
    failed.__cause__ = first
    return failed
