"""Calls of readers: written once as steps, run by threads or by asyncio.

A call is a generator. It does what needs no waiting itself and yields what does: tokens of the rate limiter, or a
``FanOut`` over shards that are not in memory. Both faces wait in their own way and send the answer back.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Executor, Future
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

from sf_pipelines.snapshot.errors import (
    DeadlineError,
    IntegrityError,
    QueryError,
    ReaderClosedError,
    SfPipelinesError,
    StoreError,
)
from sf_pipelines.snapshot.reader.metrics import Operation
from sf_pipelines.snapshot.reader.shards import OpenShard, OpenShards

# A shard's own failures. Others are of the call or of the reader, and every shard would have them.
_OF_A_SHARD = (StoreError, IntegrityError, DeadlineError)

AnswerT = TypeVar("AnswerT")
ResultT = TypeVar("ResultT")
# Work on one shard, done by any thread.
Job = Callable[[OpenShard], AnswerT]


class Call:
    """One call of a reader: its deadline, and the shards that it goes without.

    Args:
        operation: as metrics name it; None is not measured.
        timeout: seconds until the answer must be there; None waits as long as it takes.
        partial: leave out shards that fail, and note their errors in ``missing``.
    """

    def __init__(self, operation: Operation | None, timeout: float | None = None, partial: bool = False) -> None:
        if timeout is not None:
            if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
                raise QueryError(f"timeout must be a number of seconds above 0, or None (got {timeout!r})")
            # Locks can wait 292 years; nobody will ask for the rest.
            timeout = min(float(timeout), threading.TIMEOUT_MAX)
        self.operation: Operation | None = operation
        self.timeout = timeout
        self.partial = partial
        self.missing: dict[int, SfPipelinesError] = {}
        self._started = time.perf_counter()

    @property
    def left(self) -> float | None:
        """Seconds that are left, at least 0; None where there is no end."""
        if self.timeout is None:
            return None
        return max(0.0, self.timeout - (time.perf_counter() - self._started))

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the call began."""
        return (time.perf_counter() - self._started) * 1000

    def go_without(self, shard: int, error: BaseException) -> None:
        """Notes a shard that failed; raises the error where the call cannot go without it."""
        if not isinstance(error, SfPipelinesError) or not self.goes_without(error):
            raise error
        self.missing[shard] = error

    def goes_without(self, error: BaseException) -> bool:
        """Whether the call goes on without a shard that failed so."""
        return self.partial and isinstance(error, _OF_A_SHARD)

    def late(self, shard: int) -> DeadlineError:
        """The error of a shard that did not answer in time."""
        return DeadlineError(
            f"shard {shard} had not answered after {self.timeout} s; allow more time, take partial answers, or open "
            "shards before they are asked (preload)"
        )


class FanOut:
    """Jobs on shards, side by side.

    Shards are opened without holding a thread of the pool: a store that hangs holds up those who want its shards, and
    nobody else. When it has ended, shards that are opened later are given back at once, and what a thread is doing
    already it finishes.

    Attributes:
        done: ends when all jobs have, or one failed that the call cannot go without.
        outcomes: answer or error of each shard.
    """

    def __init__(self, shards: OpenShards, jobs: Mapping[int, Job[Any]], call: Call) -> None:
        self.done: Future[None] = Future()
        self.done.set_running_or_notify_cancel()
        self.outcomes: dict[int, Any] = {}
        self._shards = shards
        self._jobs = jobs
        self._call = call
        # Of the caller: traces go on in other threads.
        self._context = copy_context()
        self._lock = threading.Lock()
        self._ended = False
        self._waiting = deque(jobs.items())

    def start(self, threads: Executor, concurrency: int) -> None:
        """Starts so many jobs; each that ends starts another."""
        self._threads = threads
        for _ in range(concurrency):
            self._start_next()

    def stop(self) -> None:
        """Ends it. What has not answered is late."""
        with self._lock:
            self._ended = True
        for db_id in self._jobs:
            if db_id not in self.outcomes:
                self.outcomes[db_id] = self._call.late(db_id)

    def _start_next(self) -> None:
        with self._lock:
            if self._ended or not self._waiting:
                return
            db_id, job = self._waiting.popleft()
        self._shards.acquire(db_id).add_done_callback(partial(self._on_opened, db_id, job))

    def _on_opened(self, db_id: int, job: Job[Any], opening: Future[OpenShard]) -> None:
        if error := opening.exception():
            self._settle(db_id, error)
            return
        shard = opening.result()
        try:
            self._threads.submit(self._context.copy().run, self._work, job, shard)
        except RuntimeError:
            self._shards.give_back(shard)
            self._settle(db_id, ReaderClosedError("the reader was closed during a call; open another one"))

    def _work(self, job: Job[Any], shard: OpenShard) -> None:
        if self._ended:
            self._shards.give_back(shard)
            return
        try:
            outcome = self._shards.using(shard, job)
        except BaseException as error:  # noqa: BLE001 - raised where the call is
            outcome = error
        self._settle(shard.entry.db_id, outcome)

    def _settle(self, db_id: int, outcome: Any) -> None:
        with self._lock:
            if self._ended:
                return
            self.outcomes[db_id] = outcome
            failed = isinstance(outcome, BaseException) and not self._call.goes_without(outcome)
            over = self._ended = failed or len(self.outcomes) == len(self._jobs)
        if over:
            self.done.set_result(None)
        else:
            self._start_next()


Steps = Generator[int | FanOut, Any, ResultT]


def each_shard(
    shards: OpenShards,
    jobs: Mapping[int, Job[AnswerT]],
    call: Call,
    is_quick: Callable[[OpenShard], bool] | None = None,
    *,
    answered: bool = False,
) -> Steps[dict[int, AnswerT]]:
    """Runs jobs of different shards; those of shards that are quick right here, the others side by side.

    What takes microseconds, as a look-up in an open file, costs more to hand to a thread.

    Args:
        shards: of the snapshot.
        jobs: by shard.
        call: that they are of.
        is_quick: whether the job of an open shard is; None where none is.
        answered: the shards have answered in time: in a partial answer they may be asked again after the deadline.
    """
    found: dict[int, AnswerT] = {}
    slow: dict[int, Job[AnswerT]] = {}
    at_any_time = answered and call.partial

    def run(db_id: int, opened: OpenShard) -> None:
        try:
            found[db_id] = shards.using(opened, jobs[db_id])
        except SfPipelinesError as error:
            call.go_without(db_id, error)

    for db_id, job in jobs.items():
        late = call.left == 0
        if late and not at_any_time:
            call.go_without(db_id, call.late(db_id))
        elif (late or is_quick) and (opened := shards.take_open(db_id, None if late else is_quick)):
            run(db_id, opened)
        else:
            slow[db_id] = job
    if not slow:
        return found
    outcomes: dict[int, Any] = yield FanOut(shards, slow, call)
    for db_id, outcome in outcomes.items():
        is_late = at_any_time and isinstance(outcome, DeadlineError)
        if is_late and (opened := shards.take_open(db_id)):
            run(db_id, opened)
        elif isinstance(outcome, BaseException):
            call.go_without(db_id, outcome)
        else:
            found[db_id] = outcome
    return found
