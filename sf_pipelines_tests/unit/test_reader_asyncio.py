"""Cancellation at every await, event loops that come and go, deadlines, one rate limiter for threads and tasks."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines.snapshot.errors import (
    DeadlineError,
    RateLimitError,
    ReaderClosedError,
    StoreUnavailableError,
)
from sf_pipelines.snapshot.reader.async_reader import AsyncReader, AsyncShardedVectorReader, AsyncUnifiedShardedReader
from sf_pipelines.snapshot.reader.calls import Call
from sf_pipelines.snapshot.reader.plan import ShardChoice
from sf_pipelines.snapshot.reader.rate_limit import RateLimiter
from sf_pipelines.snapshot.reader.reader import UnifiedShardedReader
from sf_pipelines.snapshot.reader.search import search_one
from sf_pipelines_tests.racing import (
    PATIENCE,
    QUERIES,
    ROWS,
    Checkouts,
    HeldScans,
    K,
    Servings,
    Turns,
    call_async,
    calls_on,
    check_idle,
    eventually,
    no_leaks,
    run_threads,
    serving_of,
    users_of,
)

FIRST = "/db=00000/"


async def opened(turns: Turns, tmp_path: Path, **options: Any) -> Any:
    kind = AsyncUnifiedShardedReader if turns.unified else AsyncShardedVectorReader
    return await kind.open(turns.root, cache_dir=tmp_path / "cache", **options)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a test in an event loop, for a limited time."""

    async def limited() -> None:
        async with asyncio.timeout(PATIENCE):
            await main

    asyncio.run(limited())


async def reached(event: threading.Event) -> None:
    """Waits for something that a thread does."""
    assert await asyncio.to_thread(event.wait, PATIENCE)


async def cancelled(task: "asyncio.Future[Any]") -> None:
    """Cancels a task and sees that it ends so, at once, whatever its threads do."""
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=5)
    assert done
    with pytest.raises(asyncio.CancelledError):
        task.result()


async def check_works(reader: AsyncReader, turns: Turns) -> None:
    """Checks that nothing is held and that the reader goes on."""
    await asyncio.to_thread(check_idle, serving_of(reader))
    assert await call_async(reader, turns) == {0}
    await asyncio.to_thread(check_idle, serving_of(reader))


# Cancellation.


@pytest.mark.parametrize("how", ["cancel", "asyncio.timeout", "gather"])
def test_given_up_while_a_shard_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    turns, checkouts = Turns(tmp_path / "root"), Checkouts(monkeypatch, hold=lambda prefix: FIRST in prefix)

    async def main() -> None:
        async with await opened(turns, tmp_path) as reader:
            handles = serving_of(reader).shards
            if how == "asyncio.timeout":
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await reader.search(QUERIES[0], K)
            else:
                tasks = [asyncio.create_task(reader.search(QUERIES[0], K)) for _ in range(3)]
                await reached(checkouts.reached)
                for task in tasks if how == "cancel" else [asyncio.ensure_future(asyncio.gather(*tasks))]:
                    await cancelled(task)
            await asyncio.to_thread(eventually, lambda: serving_of(reader).users == 0)
            assert len(handles._waiting) <= turns.shards
            checkouts.go.set()
            await check_works(reader, turns)
            assert checkouts.taken[next(key for key in checkouts.taken if FIRST in f"{key}/")] == 1

    with no_leaks(tmp_path / "cache"):
        run(main())


def test_given_up_just_when_a_shard_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, checkouts = Turns(tmp_path / "root"), Checkouts(monkeypatch, hold=lambda _: True)

    async def main() -> None:
        async with await opened(turns, tmp_path) as reader:
            task = asyncio.create_task(reader.search(QUERIES[0], K, shard_ids=[0]))
            await reached(checkouts.reached)
            checkouts.go.set()
            # The event loop stands still: the shard has come, and the task does not know.
            eventually(lambda: len(users_of(serving_of(reader))) == 2)
            assert serving_of(reader).users == 1
            await cancelled(task)
            await check_works(reader, turns)

    with no_leaks(tmp_path / "cache"):
        run(main())


@pytest.mark.parametrize("warm", [True, False])
def test_given_up_while_a_thread_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: bool) -> None:
    """A thread ends what it does; what it borrowed is given back then, and only then."""
    turns = Turns(tmp_path / "root")

    async def main() -> None:
        async with await opened(turns, tmp_path, preload=warm, max_concurrency=2) as reader:
            scans = HeldScans(monkeypatch)
            serving = serving_of(reader)
            # More than there are threads: some have not begun.
            tasks = [asyncio.create_task(reader.batch_search(QUERIES, K)) for _ in range(5)]
            await reached(scans.reached)
            for task in tasks:
                await cancelled(task)
            assert sum(users_of(serving)) > 0
            scans.go.set()
            await check_works(reader, turns)

    with no_leaks(tmp_path / "cache"):
        run(main())


def test_a_call_that_is_given_up_in_a_thread_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else may know of it: what it holds does not wait for the garbage collector."""
    turns = Turns(tmp_path / "root")

    async def main() -> None:
        async with await opened(turns, tmp_path) as reader:
            # These are scanned first; then the call would ask for the third.
            await reader.search(QUERIES[0], K, shard_ids=[1, 2])
            scans, core = HeldScans(monkeypatch), reader._core
            call = Call("search")
            steps: Any = search_one(core, call, QUERIES[0], K, ShardChoice(), include_vectors=False)
            task = asyncio.create_task(core.run_async(call, steps))
            await reached(scans.reached)
            await cancelled(task)
            assert serving_of(reader).users == 1
            scans.go.set()
            await asyncio.to_thread(eventually, lambda: inspect.getgeneratorstate(steps) == inspect.GEN_CLOSED)
            await check_works(reader, turns)

    with no_leaks(tmp_path / "cache"):
        run(main())


def test_given_up_while_waiting_for_tokens(tmp_path: Path) -> None:
    turns, limiter = Turns(tmp_path / "root"), RateLimiter(0.01, burst=10)

    async def main() -> None:
        async with await opened(turns, tmp_path, rate_limiter=limiter) as reader:
            many = asyncio.create_task(reader.batch_search(list(QUERIES) * 4, K))
            await asyncio.to_thread(eventually, lambda: bool(limiter._waiting))
            assert serving_of(reader).users == 0
            await cancelled(many)
            # The tokens are there again for others: 8 of 10.
            await check_works(reader, turns)
            assert await reader.search(QUERIES[0], K, timeout=1)

    with no_leaks(tmp_path / "cache"):
        run(main())


@pytest.mark.slow
def test_given_up_at_any_step(tmp_path: Path) -> None:
    """However many turns of the event loop a call was let to go."""
    turns = Turns(tmp_path / "root", unified=True)

    async def main() -> None:
        async with await opened(turns, tmp_path, max_cached_shards=1, rate_limiter=RateLimiter(1e6)) as reader:
            ended = 0
            for steps in range(60):
                tasks = [
                    asyncio.create_task(reader.batch_search(QUERIES, K)),
                    asyncio.create_task(reader.multi_get(range(ROWS))),
                ]
                for _ in range(steps):
                    await asyncio.sleep(0.0005 if steps % 2 else 0)
                for task in tasks:
                    task.cancel()
                done, pending = await asyncio.wait(tasks, timeout=5)
                assert not pending
                ended += sum(not task.cancelled() for task in done)
            assert 0 < ended < 120
            await check_works(reader, turns)

    with no_leaks(tmp_path / "cache"):
        run(main())


@pytest.mark.slow
def test_given_up_while_it_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, checkouts = Turns(tmp_path / "root"), Checkouts(monkeypatch, hold=lambda _: True)
    servings = Servings(monkeypatch)

    async def main() -> None:
        opening = asyncio.create_task(opened(turns, tmp_path, preload=True))
        await reached(checkouts.reached)
        await cancelled(opening)
        checkouts.go.set()

    with no_leaks(tmp_path / "cache"):
        run(main())
    assert len(servings.made) == 1
    servings.check_closed()


def test_a_refresh_that_was_given_up_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, servings = Turns(tmp_path / "root", 2), Servings(monkeypatch)
    checkouts = Checkouts(monkeypatch, hold=lambda prefix: turns.manifests[1].run_id in prefix)

    async def main() -> None:
        async with await opened(turns, tmp_path, preload=True) as reader:
            turns.move(1)
            refreshing = asyncio.create_task(reader.refresh())
            await reached(checkouts.reached)
            await cancelled(refreshing)
            assert await call_async(reader, turns) == {0}
            checkouts.go.set()
            await asyncio.to_thread(eventually, lambda: len(servings.made) == 2)
            while await call_async(reader, turns) != {1}:
                pass
            await asyncio.to_thread(servings.check_closed, 1)

    with no_leaks(tmp_path / "cache"):
        run(main())
    servings.check_closed()


# Deadlines, closing, failures.


def test_a_late_shard_is_an_error_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, checkouts = Turns(tmp_path / "root"), Checkouts(monkeypatch, hold=lambda prefix: FIRST in prefix)

    async def main() -> None:
        async with await opened(turns, tmp_path) as reader:
            with pytest.raises(DeadlineError, match=r"shard 0 had not answered after 0\.1 s"):
                await reader.search(QUERIES[0], K, timeout=0.1)
            part = await reader.search(QUERIES[0], K, shard_ids=[1, 2])
            answer = await reader.search(QUERIES[0], K, timeout=0.2, partial=True)
            assert (answer.results, answer.missing_shards) == (part.results, [0])
            checkouts.go.set()
            await check_works(reader, turns)

    with no_leaks(tmp_path / "cache"):
        run(main())


def test_the_first_failure_ends_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, checkouts = Turns(tmp_path / "root"), Checkouts(monkeypatch)

    async def main() -> None:
        async with await opened(turns, tmp_path) as reader:
            checkouts.error = StoreUnavailableError("the store is away")
            with pytest.raises(StoreUnavailableError, match="is away"):
                await reader.batch_search(QUERIES, K)
            answer = await reader.search(QUERIES[0], K, partial=True)
            assert (answer.results, answer.missing_shards) == ([], answer.shard_ids)
            assert {type(error) for error in answer.errors.values()} == {StoreUnavailableError}
            checkouts.error = None
            await check_works(reader, turns)

    with no_leaks(tmp_path / "cache"):
        run(main())


def test_closed_during_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(tmp_path / "root")

    async def main() -> None:
        reader = await opened(turns, tmp_path)
        scans = HeldScans(monkeypatch)
        searching = asyncio.create_task(reader.batch_search(QUERIES, K))
        await reached(scans.reached)
        await asyncio.gather(reader.close(), reader.close())
        await reader.close()
        with pytest.raises(ReaderClosedError, match="was closed"):
            await reader.search(QUERIES[0], K)
        with pytest.raises(ReaderClosedError, match="was closed"):
            await reader.refresh()
        scans.go.set()
        assert turns.check(await searching) == 0
        await asyncio.to_thread(check_idle, serving_of(reader))

    with no_leaks(tmp_path / "cache"):
        run(main())


# Event loops.


def test_one_reader_in_several_event_loops(tmp_path: Path) -> None:
    turns = Turns(tmp_path / "root", unified=True)
    readers: list[Any] = []

    async def first() -> None:
        readers.append(await opened(turns, tmp_path, max_cached_shards=1, rate_limiter=RateLimiter(1e6)))
        await check_works(readers[0], turns)

    async def again() -> None:
        for _ in range(3):
            assert await call_async(readers[0], turns) == {0}

    async def last() -> None:
        await check_works(readers[0], turns)
        await readers[0].close()

    with no_leaks(tmp_path / "cache"):
        run(first())
        # One after the other, and two at once.
        run(again())
        run_threads([lambda: run(again())] * 2)
        run(last())


def test_an_event_loop_that_ends_during_a_search_takes_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, checkouts = Turns(tmp_path / "root"), Checkouts(monkeypatch, hold=lambda _: True)
    readers: list[Any] = []
    searching: list[asyncio.Task[Any]] = []

    async def leave() -> None:
        readers.append(await opened(turns, tmp_path))
        searching.append(asyncio.create_task(readers[0].search(QUERIES[0], K)))
        await reached(checkouts.reached)

    async def last() -> None:
        await check_works(readers[0], turns)
        await readers[0].close()

    with no_leaks(tmp_path / "cache"):
        run(leave())
        assert searching[0].cancelled()
        checkouts.go.set()
        run(last())


# One rate limiter for a blocking and an async reader.


def test_all_that_is_throttled_is_answered(tmp_path: Path) -> None:
    turns, limiter = Turns(tmp_path / "root", unified=True), RateLimiter(300, burst=5)
    # Keys of one request are more than the bucket holds.
    assert limiter.burst < ROWS

    async def ask() -> None:
        async with await opened(turns, tmp_path, rate_limiter=limiter) as reader:
            for _ in range(2):
                assert await asyncio.gather(*(call_async(reader, turns) for _ in range(3))) == [{0}] * 3

    def work(reader: UnifiedShardedReader) -> list[Callable[[], Any]]:
        return [lambda call=call: [call() for _ in range(2)] for call in calls_on(reader, turns)]

    with no_leaks(tmp_path / "cache"):
        with UnifiedShardedReader(turns.root, cache_dir=tmp_path / "cache", rate_limiter=limiter) as reader:
            results = run_threads([*work(reader), lambda: run(ask())])
        assert results[:-1] == [[0, 0]] * 4
    # Nobody is left in the queue.
    assert limiter.reserve(1) < 0.1


def test_who_cannot_wait_is_told_at_once_on_both_faces(tmp_path: Path) -> None:
    turns, limiter = Turns(tmp_path / "root", unified=True), RateLimiter(1e-6, burst=1)

    async def main() -> None:
        async with await opened(turns, tmp_path, rate_limiter=limiter) as reader:
            await reader.get(1)
            for call in (reader.get(1, timeout=5), reader.multi_get([1, 2], timeout=5)):
                with pytest.raises(RateLimitError, match="longer than the timeout"):
                    await call
            with pytest.raises(RateLimitError, match="longer than the timeout"):
                await reader.search(QUERIES[0], K, timeout=5, partial=True)
            assert not any(users_of(serving_of(reader)))

    with no_leaks(tmp_path / "cache"), ThreadPoolExecutor(1) as pool:
        pool.submit(run, main()).result(PATIENCE)
        with (
            UnifiedShardedReader(turns.root, cache_dir=tmp_path / "cache", rate_limiter=limiter) as reader,
            pytest.raises(RateLimitError, match="longer than the timeout"),
        ):
            reader.get(1, timeout=5)
