"""Closing at any moment, deadlines, what a call costs, events: the blocking readers."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.config import KeyEncoding
from sf_pipelines.snapshot.errors import (
    DeadlineError,
    IntegrityError,
    QueryError,
    RateLimitError,
    ReaderClosedError,
    StoreUnavailableError,
)
from sf_pipelines.snapshot.index.sqlite_vec import SqliteVecShard
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.reader import core, shards
from sf_pipelines.snapshot.reader.rate_limit import RateLimiter
from sf_pipelines.snapshot.reader.reader import ShardedVectorReader, UnifiedShardedReader
from sf_pipelines.snapshot.routing.hash import HashRouting
from sf_pipelines_tests.metering import FakeProvider
from sf_pipelines_tests.racing import (
    PATIENCE,
    QUERIES,
    ROWS,
    Checkouts,
    HeldScans,
    K,
    Servings,
    Turns,
    calls_on,
    check_idle,
    eventually,
    no_leaks,
    open_files,
    run_threads,
    serving_of,
    users_of,
)
from sf_pipelines_tests.snapshots import publish_by_hand

FIRST = "/db=00000/"


def opened(turns: Turns, tmp_path: Path, **options: Any) -> Any:
    kind = UnifiedShardedReader if turns.unified else ShardedVectorReader
    return kind(turns.root, cache_dir=tmp_path / "cache", **options)


# Closing.


@pytest.mark.parametrize("preload", [True, False])
def test_a_search_that_is_under_way_ends_well_after_the_reader_was_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preload: bool
) -> None:
    turns, checkouts = Turns(tmp_path / "root"), Checkouts(monkeypatch)
    with no_leaks(tmp_path / "cache"):
        reader = opened(turns, tmp_path)
        if preload:
            reader.batch_search(QUERIES, K)
        scans = HeldScans(monkeypatch)

        def close() -> None:
            assert scans.reached.wait(PATIENCE)
            # Twice, and by several at once.
            run_threads([reader.close] * 3)
            reader.close()
            assert open_files(tmp_path / "cache") > 0
            with pytest.raises(ReaderClosedError, match="was closed"):
                reader.search(QUERIES[0], K)
            scans.go.set()

        seen, _ = run_threads([calls_on(reader, turns)[0], close])
        assert seen == 0
        # Nothing was closed that was needed once more.
        assert sorted(checkouts.taken.values()) == [1] * turns.shards
        assert reader.health().status == "unhealthy"
        check_idle(serving_of(reader))
        assert serving_of(reader).shards.open_shards == []


def test_a_reader_that_is_closed_while_it_opens_a_shard_still_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, checkouts = Turns(tmp_path / "root"), Checkouts(monkeypatch, hold=lambda _: True)
    with no_leaks(tmp_path / "cache"):
        reader = opened(turns, tmp_path)

        def close() -> None:
            assert checkouts.reached.wait(PATIENCE)
            reader.close()
            checkouts.go.set()

        seen, _ = run_threads([calls_on(reader, turns)[0], close])
        assert seen == 0


def test_a_shard_that_comes_after_everybody_has_gone_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, checkouts = Turns(tmp_path / "root"), Checkouts(monkeypatch, hold=lambda _: True)
    with no_leaks(tmp_path / "cache"):
        reader = opened(turns, tmp_path)
        with pytest.raises(DeadlineError, match=r"shard 0 had not answered after 0\.05 s"):
            reader.search(QUERIES[0], K, shard_ids=[0], timeout=0.05)
        serving = serving_of(reader)
        assert (serving.users, list(serving.shards._waiting)) == (0, [0])
        reader.close()
        checkouts.go.set()
        check_idle(serving)
        eventually(lambda: serving.shards.open_shards == [])


def test_a_refresh_of_a_closed_reader_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, servings = Turns(tmp_path / "root", 2), Servings(monkeypatch)
    checkouts = Checkouts(monkeypatch, hold=lambda prefix: turns.manifests[1].run_id in prefix)
    with no_leaks(tmp_path / "cache"):
        reader = opened(turns, tmp_path, preload=True)
        turns.move(1)

        def refresh() -> None:
            with pytest.raises(ReaderClosedError, match="while it was refreshed"):
                reader.refresh()

        def close() -> None:
            assert checkouts.reached.wait(PATIENCE)
            reader.close()
            checkouts.go.set()

        run_threads([refresh, close])
        servings.check_closed()
        assert len(servings.made) == 2


def test_a_reader_that_is_forgotten_leaves_nothing_behind(tmp_path: Path) -> None:
    turns = Turns(tmp_path / "root")
    with no_leaks(tmp_path / "cache"):
        reader = opened(turns, tmp_path, refresh_interval=3600)
        reader.search(QUERIES[0], K)
        reader._core.itself = reader._core  # found by the garbage collector, in whatever thread that runs
        del reader


@pytest.mark.parametrize("error", [StoreUnavailableError("the store is away"), RuntimeError("a fault of ours")])
def test_a_refresh_in_the_background_that_fails_is_logged_and_the_next_one_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    turns, load = Turns(tmp_path / "root", 2), core.load_pointed
    errors = [error]

    def fails_once(*arguments: Any) -> Any:
        if errors:
            raise errors.pop()
        return load(*arguments)

    monkeypatch.setattr(core, "load_pointed", fails_once)
    with no_leaks(tmp_path / "cache"), opened(turns, tmp_path, refresh_interval=0.005) as reader:
        turns.move(1)
        eventually(lambda: reader.snapshot_info().run_id == turns.manifests[1].run_id)
    (record,) = caplog.records
    assert "is still served" in record.getMessage()
    assert str(error) in caplog.text
    assert str(turns.root) in record.getMessage()


def test_a_reader_is_forgotten_while_its_refreshes_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(tmp_path / "root")
    failed: list[None] = []

    def fails(*arguments: Any) -> Any:
        failed.append(None)
        raise StoreUnavailableError(f"the store of {arguments[0].url} is away")

    with no_leaks(tmp_path / "cache"):
        reader = opened(turns, tmp_path, refresh_interval=0.01)
        monkeypatch.setattr(core, "read_current", fails)
        eventually(lambda: len(failed) > 1)
        del reader


def test_every_call_on_a_closed_reader_says_so(tmp_path: Path) -> None:
    turns = Turns(tmp_path / "root", unified=True)
    reader = opened(turns, tmp_path, rate_limiter=RateLimiter(1000))
    reader.close()
    calls: list[Callable[[], Any]] = [
        *calls_on(reader, turns),
        reader.refresh,
        reader.snapshot_info,
        reader.shard_details,
        lambda: reader.route_key(1),
        lambda: reader.vector_meta,
        lambda: reader.explain(QUERIES[0]),
        lambda: reader.search_arrays(QUERIES, K),
    ]
    for call in calls:
        with pytest.raises(ReaderClosedError, match="was closed"):
            call()


# Deadlines.


@pytest.mark.parametrize("warm", [True, False])
def test_what_came_in_time_is_answered_when_a_shard_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    turns = Turns(tmp_path / "root")
    checkouts = Checkouts(monkeypatch, hold=lambda prefix: FIRST in prefix)
    with no_leaks(tmp_path / "cache"), opened(turns, tmp_path) as reader:
        if warm:
            reader.search(QUERIES[0], K, shard_ids=[1, 2])
        part = reader.search(QUERIES[0], K, shard_ids=[1, 2])
        answer = reader.search(QUERIES[0], K, timeout=0.2, partial=True)
        assert answer.results == part.results
        assert answer.missing_shards == [0]
        assert isinstance(answer.errors[0], DeadlineError)
        assert answer.shortfall is None or "shards 0 did not answer" in answer.shortfall
        checkouts.go.set()
        check_idle(serving_of(reader))
        assert calls_on(reader, turns)[0]() == 0


def test_late_shards_in_memory_are_given_back(tmp_path: Path) -> None:
    turns = Turns(tmp_path / "root")
    with opened(turns, tmp_path, preload=True) as reader:
        with pytest.raises(DeadlineError):
            reader.search(QUERIES[0], K, timeout=1e-9)
        answer = reader.search(QUERIES[0], K, timeout=1e-9, partial=True)
        assert (answer.results, sorted(answer.missing_shards)) == ([], [0, 1, 2])
        assert not any(users_of(serving_of(reader)))


@pytest.mark.parametrize("timeout", [float("inf"), 1e300])
def test_a_timeout_may_be_as_long_as_one_likes(tmp_path: Path, timeout: float) -> None:
    turns = Turns(tmp_path / "root")
    with no_leaks(tmp_path / "cache"), opened(turns, tmp_path, refresh_interval=timeout) as reader:
        turns.check([reader.search(QUERIES[0], K, timeout=timeout)], QUERIES[:1])


# Rate limiting.


def test_a_wrong_call_costs_no_tokens(tmp_path: Path) -> None:
    turns, limiter = Turns(tmp_path / "root", unified=True), RateLimiter(1e-9, burst=6)
    with opened(turns, tmp_path, rate_limiter=limiter) as reader:
        wrong: list[Callable[[], Any]] = [
            lambda: reader.search([1.0], K),
            lambda: reader.search(QUERIES[0], 0),
            lambda: reader.search(QUERIES[0], K, num_probes=1),
            lambda: reader.search(QUERIES[0], K, shard_ids=[99]),
            lambda: reader.search(QUERIES[0], K, routing_context={"a": 1}),
            lambda: reader.search(QUERIES[0], K, timeout=0),
            lambda: reader.get("text"),
            lambda: reader.get(1, routing_context={"a": 1}),
            lambda: reader.multi_get([1, "text"]),
            lambda: reader.multi_get("text"),
        ]
        for call in wrong:
            with pytest.raises(QueryError):
                call()
        # Right calls cost one for each query and key; nothing costs nothing.
        reader.search(QUERIES[0], K)
        reader.get(1)
        reader.batch_search(QUERIES[:2], K)
        reader.multi_get([1, 2])
        assert (reader.batch_search([], K), reader.multi_get([])) == ([], {})
        for call in (lambda: reader.get(1, timeout=1), lambda: reader.search(QUERIES[0], K, timeout=1)):
            with pytest.raises(RateLimitError, match="longer than the timeout"):
                call()


# Metrics.


def test_each_call_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, provider = Turns(tmp_path / "root", unified=True), FakeProvider()
    checkouts, kind = Checkouts(monkeypatch), {"kind": "unified"}
    ok = {**kind, "status": "ok"}
    with opened(turns, tmp_path, meter_provider=provider) as reader:
        for call in calls_on(reader, turns):
            call()
        assert provider.named("opened") == [(1, kind)]
        assert provider.named("search.calls") == [(1, ok)] * 2
        assert all(latency > 0 and labels == ok for latency, labels in provider.named("search.latency"))
        assert provider.named("search.queries") == [(3, kind), (1, kind)]
        assert provider.named("search.shards") == [(3, kind)] * 2
        assert provider.named("search.results") == [(3 * K, kind), (K, kind)]
        assert provider.named("multi_get.keys") == provider.named("multi_get.results") == [(24, kind)]
        assert provider.named("get.calls") == provider.named("multi_get.calls") == [(1, ok)]
        assert provider.named("get.results") == [(1, kind)]
        assert sum(calls for calls, _ in provider.named("shard_search.calls")) == 6
        assert provider.named("shard.opened") == [(1, kind)] * 3
        reader.refresh()
        assert provider.named("refresh.calls") == [(1, {**kind, "status": "unchanged"})]
        provider.clear()
        with pytest.raises(QueryError):
            reader.search(QUERIES[0], 0)
        assert provider.named("search.calls") == [(1, {**kind, "status": "error"})]
        assert provider.named("search.errors") == [(1, {**kind, "error": "reader.query"})]
        reader.close()
    assert provider.named("shard.closed") == [(1, kind)] * 3
    assert provider.named("closed") == [(1, kind)]
    assert not {"run_id", "shard"} & {label for _, _, labels in provider.points for label in labels}
    checkouts.error = StoreUnavailableError("the store is away")
    provider.clear()
    with opened(turns, tmp_path, meter_provider=provider) as reader:
        with pytest.raises(StoreUnavailableError):
            reader.get(1)
        answer = reader.search(QUERIES[0], K, partial=True)
        assert answer.missing_shards == [0, 1, 2]
        assert provider.named("get.errors") == [(1, {**kind, "error": "store.unavailable"})]
        assert provider.named("search.calls") == [(1, {**kind, "status": "partial"})]


# Between the check of a call and its run.


@pytest.mark.parametrize("encoding", ["u32be", "utf8"])
def test_a_call_that_waited_for_tokens_is_about_the_snapshot_that_is_served_then(
    tmp_path: Path, encoding: KeyEncoding
) -> None:
    """It was checked against the one before; keys are stored in another way now, in other shards."""
    turns = Turns(tmp_path / "root", 2, unified=True)
    keys = list(range(ROWS)) if encoding == "u32be" else [f"k{at}" for at in range(ROWS)]
    wide = np.concatenate([turns.vectors[0], turns.vectors[0]], axis=1)
    with opened(turns, tmp_path, rate_limiter=(limiter := RateLimiter(50, burst=1))) as reader:

        def refresh() -> None:
            eventually(lambda: len(limiter._waiting) == 2)
            publish_by_hand(
                turns.store,
                keys,
                wide,
                routing=HashRouting(7),
                values=[b"new"] * ROWS,
                key_encoding=encoding,
                metric=DistanceMetric.L2,
                backend="sqlite-vec",
                ours=True,
            )
            assert reader.refresh()

        def look_up() -> Any:
            try:
                return reader.multi_get(range(ROWS))
            except QueryError as error:
                return error

        def search() -> None:
            with pytest.raises(QueryError, match="must have 8 numbers"):
                reader.batch_search(np.tile(QUERIES, (8, 1)), K)

        limiter._edge += 1.0  # the bucket is empty, and full enough only after the refresh
        found, *_ = run_threads([look_up, search, refresh])
        if encoding == "u32be":
            assert found == dict.fromkeys(range(ROWS), b"new")
        else:
            assert isinstance(found, QueryError)


# What goes wrong on the way.


class Interrupted(Future[Any]):
    """Ctrl-C while somebody waits for it."""

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            raise KeyboardInterrupt
        return super().result(timeout)


@pytest.mark.slow
def test_an_interrupt_while_shards_are_loaded_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(tmp_path / "root")
    with no_leaks(tmp_path / "cache"):
        monkeypatch.setattr(shards, "Future", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened(turns, tmp_path, preload=True)


def test_a_shard_that_cannot_be_opened_takes_no_memory_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(tmp_path / "root")

    def broken(*_: Any, **__: Any) -> Any:
        raise IntegrityError("broken")

    with opened(turns, tmp_path) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(SqliteVecShard, "open", broken)
            with pytest.raises(IntegrityError, match=r"shard 0 .* cannot be read: broken"):
                reader.search(QUERIES[0], K, shard_ids=[0])
        assert serving_of(reader).shards.memory_bytes == 0
        assert calls_on(reader, turns)[0]() == 0
