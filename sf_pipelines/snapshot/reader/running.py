"""Runs the calls of readers: by the caller's thread, or by a task of asyncio. Both share two pools of threads."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sf_pipelines.snapshot.errors import ReaderClosedError, SfPipelinesError
from sf_pipelines.snapshot.reader.calls import Call, FanOut, Job, Outcomes, Request, Steps, Terms, Tokens, attempt
from sf_pipelines.snapshot.reader.handles import Handle
from sf_pipelines.snapshot.reader.rate_limit import RateLimiter

_OPENERS = 4

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class _Done(Generic[ResultT]):
    """The end of a call."""

    result: ResultT


@dataclass(frozen=True)
class _Turn:
    """A job whose shard is being opened (no handle yet), or searched."""

    job: Job[Any]
    handle: Handle | None


class Runner:
    """Threads and limits of one reader.

    Shards are opened by threads of their own and calls wait for that without holding a thread of the pool: a store that
    hangs holds up those who want its shards, and nobody else.

    Args:
        concurrency: shards that a call works on at the same time, and threads that do so for all calls.
        limiter: of the rate of queries and keys.
    """

    def __init__(self, concurrency: int, limiter: RateLimiter | None) -> None:
        self.limiter = limiter
        self._concurrency = concurrency
        self.threads = ThreadPoolExecutor(concurrency, thread_name_prefix="sf-pipelines-search")
        # They wait for the store more than they work; with many, some that hang leave others.
        self.openers = ThreadPoolExecutor(_OPENERS * concurrency, thread_name_prefix="sf-pipelines-open")

    def shut_down(self) -> None:
        """Lets the threads end when they have done what they were given."""
        self.threads.shutdown(wait=False)
        self.openers.shutdown(wait=False)

    # By threads.

    def run(self, call: Call[ResultT]) -> ResultT:
        """Runs a call on this thread; it may have others do parts of it."""
        with closing(call.steps):
            state = _advance(call.steps, None)
            while not isinstance(state, _Done):
                state = _advance(call.steps, self._answer(state, call.terms))
            return state.result

    def _answer(self, request: Request, terms: Terms) -> Any:
        if isinstance(request, Tokens):
            return self._limited(request).acquire(request.count, timeout=terms.left)
        return self._gather(request, terms)

    def _gather(self, request: FanOut, terms: Terms) -> Outcomes:
        waiting = deque(request.jobs)
        running: dict[Future[Any], _Turn] = {}
        outcomes: Outcomes = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._concurrency:
                    job = waiting.popleft()
                    running[request.handles.acquire(job.shard)] = _Turn(job, None)
                done, _ = wait(running, terms.left, FIRST_COMPLETED)
                if not done:
                    late = [turn.job for turn in running.values()] + list(waiting)
                    return outcomes | {job.shard: terms.late(job.shard) for job in late}
                for future in done:
                    self._take_turn(request, running.pop(future), future, running, outcomes)
                failed = [found for found in outcomes.values() if isinstance(found, SfPipelinesError)]
                if not all(map(terms.does_without, failed)):
                    return outcomes
            return outcomes
        finally:
            for future, turn in running.items():
                _abandon(request, future, turn)

    def _take_turn(
        self,
        request: FanOut,
        turn: _Turn,
        future: Future[Any],
        running: dict[Future[Any], _Turn],
        outcomes: Outcomes,
    ) -> None:
        found = attempt(future.result)
        if turn.handle is not None or isinstance(found, SfPipelinesError):
            outcomes[turn.job.shard] = found
        else:
            running[self._start(request, found, turn.job)] = _Turn(turn.job, found)

    # By asyncio.

    async def run_async(self, call: Call[ResultT]) -> ResultT:
        """Runs a call without blocking the event loop; cancelling the task lets go of everything it holds."""
        reply: Any = None
        while True:
            state = await self._advance_async(call.steps, reply)
            if isinstance(state, _Done):
                return state.result
            try:
                reply = await self._answer_async(state, call.terms)
            except BaseException:
                call.steps.close()
                raise

    async def _advance_async(self, steps: Steps[ResultT], reply: Any) -> Request | _Done[ResultT]:
        """One part of a call, on a thread: it plans, scans what is in memory and merges."""
        try:
            future = self._submit(_advance, steps, reply)
        except ReaderClosedError:
            steps.close()
            raise
        try:
            return await asyncio.wrap_future(future)
        except BaseException:
            future.cancel()
            # The thread may be in the middle of it. Whatever it holds is let go as soon as it stops.
            future.add_done_callback(lambda _: steps.close())
            raise

    async def _answer_async(self, request: Request, terms: Terms) -> Any:
        if isinstance(request, Tokens):
            return await self._limited(request).acquire_async(request.count, timeout=terms.left)
        return await self._gather_async(request, terms)

    async def _gather_async(self, request: FanOut, terms: Terms) -> Outcomes:
        outcomes: Outcomes = {}
        deadline = asyncio.timeout(terms.left)
        try:
            async with deadline:
                await self._all_async(request, terms, outcomes)
        except ExceptionGroup as faults:
            # Not of the tree: plainly, as the blocking readers raise it.
            raise faults.exceptions[0] from None
        except TimeoutError:
            if not deadline.expired():
                raise
            late = [job.shard for job in request.jobs if job.shard not in outcomes]
            outcomes |= {shard: terms.late(shard) for shard in late}
        return outcomes

    async def _all_async(self, request: FanOut, terms: Terms, outcomes: Outcomes) -> None:
        bound = asyncio.Semaphore(self._concurrency)

        async def one(job: Job[Any]) -> None:
            async with bound:
                try:
                    outcomes[job.shard] = await self._work_async(request, job)
                except SfPipelinesError as error:
                    outcomes[job.shard] = error
                    if not terms.does_without(error):
                        # The group cancels the others.
                        raise

        try:
            async with asyncio.TaskGroup() as group:
                for job in request.jobs:
                    group.create_task(one(job))
        except* SfPipelinesError:
            # Each is among the outcomes, by shard.
            pass

    async def _work_async(self, request: FanOut, job: Job[Any]) -> Any:
        opening = request.handles.acquire(job.shard)
        try:
            handle = await asyncio.wrap_future(opening)
        except BaseException:
            request.handles.abandon(opening)
            raise
        work = self._start(request, handle, job)
        try:
            return await asyncio.wrap_future(work)
        except BaseException:
            _abandon(request, work, _Turn(job, handle))
            raise

    # Both.

    def _limited(self, request: Tokens) -> RateLimiter:
        if self.limiter is None:
            raise AssertionError(f"{request} was asked for, and there is no rate limiter")
        return self.limiter

    def _start(self, request: FanOut, handle: Handle, job: Job[Any]) -> Future[Any]:
        """Work on an opened shard, which is given back afterwards."""
        with ExitStack() as on_failure:
            on_failure.callback(request.handles.give_back, handle)
            work = self._submit(request.handles.using, handle, job.run)
            on_failure.pop_all()
        return work

    def _submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Has a thread do something, with the caller's context variables (of tracing, for one)."""
        try:
            return self.threads.submit(copy_context().run, work, *arguments)
        except RuntimeError as error:
            raise ReaderClosedError("the reader was closed during a call; open another one") from error


def _advance(steps: Steps[ResultT], reply: Any) -> Request | _Done[ResultT]:
    """Goes on with a call until it needs an answer or ends."""
    try:
        return steps.send(reply)
    except StopIteration as end:
        return _Done(end.value)


def _abandon(request: FanOut, future: Future[Any], turn: _Turn) -> None:
    """Lets go of a job that nobody waits for any more; what a thread is doing already, it finishes."""
    if turn.handle is None:
        request.handles.abandon(future)
    elif future.cancel():
        request.handles.give_back(turn.handle)
