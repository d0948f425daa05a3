"""Refresh against search, and many callers on cold shards: every answer is whole and right, nothing is left over."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines.snapshot.errors import StoreUnavailableError
from sf_pipelines.snapshot.index.sqlite_vec import SqliteVecShard
from sf_pipelines.snapshot.reader.async_reader import AsyncShardedVectorReader, AsyncUnifiedShardedReader
from sf_pipelines.snapshot.reader.reader import ShardedVectorReader, UnifiedShardedReader
from sf_pipelines_tests.racing import (
    DIM,
    PATIENCE,
    QUERIES,
    Checkouts,
    K,
    Servings,
    Turns,
    call_async,
    calls_on,
    check_idle,
    eventually,
    no_leaks,
    open_files,
    run_threads,
    serving_of,
)

TURNS = 3
SHARDS = 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unified", "backend", "refreshes"),
    [(False, "lancedb", 6), (False, "sqlite-vec", 70), (True, "lancedb", 4), (True, "sqlite-vec", 70)],
)
def test_threads_see_one_snapshot_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unified: bool, backend: str, refreshes: int
) -> None:
    turns, servings = Turns(tmp_path / "root", TURNS, unified=unified, backend=backend), Servings(monkeypatch)
    kind = UnifiedShardedReader if unified else ShardedVectorReader
    stop, answered = threading.Event(), []

    def ask(call: Callable[[], int]) -> set[int]:
        seen = {call()}
        # The pause leaves the processor to the refresh.
        while not stop.wait(0.001):
            seen.add(call())
            answered.append(call)
        return seen

    def move() -> int:
        try:
            swaps = 0
            for turn in range(refreshes):
                turns.move((turn + 1) % TURNS)
                swaps += bool(reader.refresh())
                before = len(answered)
                eventually(lambda before=before: len(answered) > before)
            return swaps
        finally:
            stop.set()

    with no_leaks(tmp_path / "cache"):
        with kind(turns.root, cache_dir=tmp_path / "cache") as reader:
            asked = [lambda call=call: ask(call) for call in calls_on(reader, turns)]
            *seen, swaps = run_threads([*asked, move])
            assert swaps == refreshes
            assert len(set().union(*seen)) > 1
            servings.check_closed(but=1)
            assert open_files(tmp_path / "cache") > 0
        servings.check_closed()
    assert len(servings.made) == refreshes + 1


@pytest.mark.slow
@pytest.mark.parametrize("unified", [False, True])
def test_tasks_see_one_snapshot_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unified: bool) -> None:
    turns, servings = Turns(tmp_path / "root", TURNS, unified=unified), Servings(monkeypatch)
    kind = AsyncUnifiedShardedReader if unified else AsyncShardedVectorReader
    refreshes = 60

    async def main() -> None:
        async with await kind.open(turns.root, cache_dir=tmp_path / "cache") as reader:
            stop = asyncio.Event()

            async def ask() -> set[int]:
                seen = await call_async(reader, turns)
                while not stop.is_set():
                    seen |= await call_async(reader, turns)
                return seen

            async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
                asking = [group.create_task(ask()) for _ in range(3)]
                for turn in range(refreshes):
                    turns.move((turn + 1) % TURNS)
                    assert await reader.refresh()
                stop.set()
            assert len(set().union(*(task.result() for task in asking))) > 1
            servings.check_closed(but=1)
        servings.check_closed()

    with no_leaks(tmp_path / "cache"):
        asyncio.run(main())
    assert len(servings.made) == refreshes + 1


@pytest.mark.slow
@pytest.mark.parametrize("face", ["blocking", "asyncio"])
def test_a_refresh_in_the_background_is_one_snapshot_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, face: str
) -> None:
    turns, servings = Turns(tmp_path / "root", TURNS), Servings(monkeypatch)
    options: Any = {"cache_dir": tmp_path / "cache", "refresh_interval": 0.001}

    def follow(search: Callable[[], int]) -> None:
        for turn in range(12):
            turns.move(turn % TURNS)
            eventually(lambda turn=turn: search() == turn % TURNS)

    async def main() -> None:
        async with await AsyncShardedVectorReader.open(turns.root, **options) as reader:
            for turn in range(12):
                turns.move(turn % TURNS)
                async with asyncio.timeout(PATIENCE):
                    while await call_async(reader, turns) != {turn % TURNS}:
                        pass

    with no_leaks(tmp_path / "cache"):
        if face == "asyncio":
            asyncio.run(main())
        else:
            with ShardedVectorReader(turns.root, **options) as reader:
                follow(calls_on(reader, turns)[0])
    assert len(servings.made) >= 12
    servings.check_closed()


# Cold shards.


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{"max_cached_shards": 2}, {"memory_budget": 400}, {"memory_budget": 0}])
@pytest.mark.parametrize("unified", [False, True])
def test_few_shards_stay_open_and_all_answer(tmp_path: Path, limits: dict[str, int], unified: bool) -> None:
    turns = Turns(tmp_path / "root", unified=unified, shards=SHARDS)
    kind = UnifiedShardedReader if unified else ShardedVectorReader
    slow_kind = AsyncUnifiedShardedReader if unified else AsyncShardedVectorReader
    options: Any = {"cache_dir": tmp_path / "cache", **limits}

    async def main() -> None:
        async with await slow_kind.open(turns.root, **options) as reader:
            async with asyncio.timeout(PATIENCE):
                for _ in range(3):
                    seen = await asyncio.gather(*(call_async(reader, turns) for _ in range(4)))
                    assert seen == [{0}] * 4
            check_few(reader)

    def check_few(reader: Any) -> None:
        serving = serving_of(reader)
        check_idle(serving)
        open_shards, memory = serving.shards.open_shards, serving.shards.memory_bytes
        assert len(open_shards) <= limits.get("max_cached_shards", SHARDS)
        assert memory <= limits.get("memory_budget", memory)
        # Keys take no memory that counts, and not every call wants vectors.
        assert unified or len(open_shards) < SHARDS

    with no_leaks(tmp_path / "cache"):
        with kind(turns.root, **options) as reader:
            calls = calls_on(reader, turns)
            run_threads([lambda call=call: [call() for _ in range(6)] for call in (calls * 2)])
            check_few(reader)
        asyncio.run(main())


def test_shards_whose_vectors_do_not_fit_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, loaded, opener = Turns(tmp_path / "root", shards=SHARDS), [], SqliteVecShard.open

    def watched(*arguments: Any, in_memory: bool, **more: Any) -> Any:
        loaded.append(in_memory)
        return opener(*arguments, in_memory=in_memory, **more)

    monkeypatch.setattr(SqliteVecShard, "open", watched)
    largest = max(shard.row_count for shard in turns.manifests[0].shards) * DIM * 4
    with ShardedVectorReader(
        turns.root, cache_dir=tmp_path / "cache", memory_budget=largest, max_concurrency=1
    ) as reader:
        assert calls_on(reader, turns)[0]() == 0
    assert set(loaded) == {True, False}


def test_a_cold_shard_is_opened_once_for_all_who_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(tmp_path / "root", shards=SHARDS)
    checkouts = Checkouts(monkeypatch, hold=lambda _: True)
    with ShardedVectorReader(turns.root, cache_dir=tmp_path / "cache") as reader:
        handles, callers = serving_of(reader).shards, 8

        def release() -> None:
            # All have asked for all that are being opened.
            eventually(lambda: sorted(map(len, handles._waiting.values())) == [callers] * SHARDS)
            checkouts.go.set()

        call = calls_on(reader, turns)[0]
        *seen, _ = run_threads([call] * callers + [release])
        assert seen == [0] * callers
        assert sorted(checkouts.taken.values()) == [1] * SHARDS
        assert handles._waiting == {}


def test_a_failure_is_told_to_all_who_wait_and_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(tmp_path / "root")
    checkouts = Checkouts(monkeypatch, hold=lambda _: True)
    with ShardedVectorReader(turns.root, cache_dir=tmp_path / "cache") as reader:
        handles = serving_of(reader).shards

        def fail() -> None:
            eventually(lambda: [len(waiting) for waiting in handles._waiting.values()] == [4] * turns.shards)
            checkouts.error = StoreUnavailableError("the store is away")
            checkouts.go.set()

        def search() -> None:
            with pytest.raises(StoreUnavailableError, match="is away"):
                reader.batch_search(QUERIES, K)

        run_threads([search] * 4 + [fail])
        check_idle(serving_of(reader))
        assert handles.open_shards == []
        checkouts.error = None
        assert turns.check(reader.batch_search(QUERIES, K)) == 0
        assert sorted(checkouts.taken.values()) == [2] * turns.shards
