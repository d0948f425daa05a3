"""The rate limiter: its bound over any window, its order, and that nobody waits for ever."""

import asyncio
import heapq
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sf_pipelines.snapshot.errors import ConfigError, RateLimitError, ReaderError
from sf_pipelines.snapshot.reader import rate_limit
from sf_pipelines.snapshot.reader.rate_limit import RateLimiter, _Ticket
from sf_pipelines_tests.metering import FakeProvider

RATES = st.sampled_from([0.5, 1.0, 3.0, 10.0, 1e4])
BURSTS = st.one_of(st.none(), st.sampled_from([0.3, 1.0, 7.0, 20.0]))
SIZES = st.one_of(st.integers(1, 40), st.floats(0.01, 40))
GAPS = st.one_of(st.just(0.0), st.floats(0, 5))


class Clock:
    """Time that passes only in sleeps."""

    def __init__(self, now: float = 1e6) -> None:
        self.now = now
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)


def limiter_at(clock: Clock, rate: float, burst: float | None = None, **more: Any) -> RateLimiter:
    class Limiter(RateLimiter):
        _clock = clock
        _sleep = clock.sleep
        _sleep_async = clock.sleep_async

    return Limiter(rate, burst=burst, **more)


def parts(due: float, tokens: float, limiter: RateLimiter) -> list[tuple[float, float]]:
    """When which part of a request goes through: bucketfuls, and what is left over."""
    out, left = [], tokens
    while left > 0:
        part = min(left, limiter.burst)
        left -= part
        out.append((due - left / limiter.rate, part))
    return out


def assert_bounded(grants: list[tuple[float, float]], limiter: RateLimiter) -> None:
    """No window from one grant to another holds more than the bucket and what it makes meanwhile."""
    grants = sorted(grants)
    for first, (begin, _) in enumerate(grants):
        total = 0.0
        for end, tokens in grants[first:]:
            total += tokens
            assert total <= limiter.burst + limiter.rate * (end - begin + 1e-5) + 1e-6


class TestArithmetic:
    @settings(deadline=None, max_examples=80)
    @given(rate=RATES, burst=BURSTS, asked=st.lists(st.tuples(GAPS, SIZES), min_size=1, max_size=25))
    def test_waits_are_those_of_a_bucket_with_a_level(
        self, rate: float, burst: float | None, asked: list[tuple[float, float]]
    ) -> None:
        clock = Clock()
        limiter = limiter_at(clock, rate, burst)
        level, grants, last = limiter.burst, [], 0.0
        for gap, tokens in asked:
            clock.now += gap
            level = min(limiter.burst, level + gap * rate) - tokens
            wait = limiter.reserve(tokens)
            assert wait == pytest.approx(max(0.0, -level / rate), abs=1e-5)
            assert clock.now + wait >= last - 1e-6, "the order of asking is the order of serving"
            last = clock.now + wait
            grants += parts(last, tokens, limiter)
        assert_bounded(grants, limiter)

    @settings(deadline=None, max_examples=120)
    @given(data=st.data(), rate=RATES, burst=BURSTS)
    def test_bound_holds_when_callers_give_up(self, data: st.DataObject, rate: float, burst: float | None) -> None:
        clock = Clock()
        limiter = limiter_at(clock, rate, burst)
        held: list[tuple[_Ticket, float]] = []
        used: list[tuple[_Ticket, float]] = []
        for _ in range(data.draw(st.integers(1, 30), label="steps")):
            clock.now += data.draw(GAPS, label="gap") * data.draw(st.sampled_from([1.0, 1 / rate]), label="scale")
            what = data.draw(st.sampled_from(["ask", "ask", "give up", "use"]), label="what")
            if what == "ask" or not held:
                tokens = data.draw(SIZES, label="tokens")
                ticket, _ = limiter._enter(tokens, math.inf)
                assert ticket is not None
                held.append((ticket, tokens))
                continue
            which = data.draw(st.integers(0, len(held) - 1), label="which")
            before = [ticket.due for ticket, _ in held]
            if what == "give up":
                limiter._leave(held[which][0])
                assert all(ticket.due <= due for (ticket, _), due in zip(held, before, strict=True))
                held.pop(which)
            elif held[which][0].due <= clock.now:
                used.append(held.pop(which))
        assert_bounded([part for ticket, n in used + held for part in parts(ticket.due, n, limiter)], limiter)
        # The queue ends after what is asked for in it, and whatever happened the bucket is full at last.
        assert all(ticket.due - clock.now <= sum(n for _, n in held) / rate + 1e-5 for ticket, _ in held)
        clock.now = max([clock.now, *(ticket.due for ticket, _ in held)]) + limiter.burst / rate
        assert limiter.try_acquire(limiter.burst)
        assert not limiter.try_acquire(limiter.burst)

    def test_moves_up_when_one_before_gives_up(self) -> None:
        clock = Clock(0.0)
        limiter = limiter_at(clock, 1.0, 1.0)
        tickets = [limiter._enter(n, math.inf)[0] for n in (1, 5, 2, 3)]
        first, long, short, last = tickets
        assert first is not None
        assert long is not None
        assert short is not None
        assert last is not None
        assert [ticket.due for ticket in (first, long, short, last)] == [0, 5, 7, 10]
        clock.now = 4.0
        limiter._leave(long)
        # Of the four tokens that the long one had been served a bucketful comes back.
        assert (short.due, last.due) == (5.0, 8.0)

    def test_of_a_large_request_served_but_unused_a_bucketful_comes_back(self) -> None:
        clock = Clock(0.0)
        limiter = limiter_at(clock, 1.0, 1.0)
        large, small, last = (limiter._enter(n, math.inf)[0] for n in (5, 1, 3))
        assert large is not None
        assert small is not None
        assert last is not None
        clock.now = large.due
        limiter._leave(large)
        assert (large.due, small.due, last.due) == (4.0, 4.0, 7.0)

    def test_those_before_one_that_gives_up_stay(self) -> None:
        limiter = limiter_at(Clock(0.0), 1.0, 1.0)
        before, between, behind = (limiter._enter(n, math.inf)[0] for n in (3, 2, 1))
        assert before is not None
        assert between is not None
        assert behind is not None
        limiter._leave(between)
        assert (before.due, behind.due) == (2.0, 3.0)

    def test_unused_tokens_come_back_once(self) -> None:
        clock = Clock(0.0)
        limiter = limiter_at(clock, 1.0, 4.0)
        ticket, _ = limiter._enter(4, 0)
        assert ticket is not None
        clock.now = 1.0
        limiter._leave(ticket)
        assert limiter.try_acquire(4)
        assert not limiter.try_acquire(0.5)

    def test_full_bucket_is_not_refused_for_rounding(self) -> None:
        for now in (0.1, 1e3 / 3, 1e7 + 0.1):
            assert limiter_at(Clock(now), 3.0, 10.0).try_acquire(10)


class TestAcquire:
    @pytest.mark.parametrize(
        ("rate", "requests", "seconds"),
        [(10, [11], 0.1), (0.5, [1], 0.0), (0.5, [1, 1], 2.0), (10, [20] * 5, 9.0), (5, [6], 0.2), (1, [100], 99.0)],
    )
    @pytest.mark.parametrize("how", ["thread", "task"])
    def test_more_than_the_bucket_is_served(self, rate: float, requests: list[int], seconds: float, how: str) -> None:
        clock = Clock(50.0)
        limiter = limiter_at(clock, rate)
        for tokens in requests:
            if how == "thread":
                limiter.acquire(tokens)
            else:
                asyncio.run(limiter.acquire_async(tokens))
        assert clock.now - 50 == pytest.approx(seconds, abs=1e-5)
        assert all(0 < seconds <= 0.05 for seconds in clock.sleeps)

    def test_timeout_takes_nothing(self) -> None:
        clock = Clock()
        limiter = limiter_at(clock, 2.0, 4.0)
        with pytest.raises(RateLimitError, match=r"5 tokens would take 0\.500 s .* timeout of 0\.4 s") as caught:
            limiter.acquire(5, timeout=0.4)
        with pytest.raises(RateLimitError):
            asyncio.run(limiter.acquire_async(5, timeout=0))
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, ReaderError)
        assert (caught.value.kind, caught.value.retryable) == ("reader.rate_limit", True)
        assert not clock.sleeps
        limiter.acquire(4, timeout=0)
        limiter.acquire(1, timeout=0.5)
        assert sum(clock.sleeps) == pytest.approx(0.5)

    def test_interrupt_gives_back(self) -> None:
        class Interrupting(Clock):
            def sleep(self, seconds: float) -> None:  # noqa: ARG002
                raise KeyboardInterrupt

        limiter = limiter_at(Interrupting(), 1.0)
        limiter.acquire(1)
        with pytest.raises(KeyboardInterrupt):
            limiter.acquire(50)
        assert limiter.reserve(1) == pytest.approx(1.0)

    def test_try_acquire(self) -> None:
        clock = Clock()
        limiter = limiter_at(clock, 2.0)
        assert [limiter.try_acquire(), limiter.try_acquire(), limiter.try_acquire()] == [True, True, False]
        clock.now += 0.5
        assert not limiter.try_acquire(2)
        assert limiter.try_acquire()
        limiter.reserve(1)
        assert not limiter.try_acquire(0.1), "nobody passes those who wait"

    def test_metrics(self) -> None:
        provider, clock = FakeProvider(), Clock()
        limiter = limiter_at(clock, 2.0, meter_provider=provider)
        limiter.acquire(2)
        assert not provider.points
        limiter.acquire(1)
        with pytest.raises(RateLimitError):
            limiter.acquire(3, timeout=1)
        assert not limiter.try_acquire(1)
        assert provider.named("rate_limiter.throttled") == [(1, {})]
        assert provider.named("rate_limiter.wait") == [(pytest.approx(500), {})]
        assert provider.named("rate_limiter.denied") == [(1, {})] * 2


class TestArguments:
    @pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, True, "5", None])
    def test_amounts(self, bad: Any) -> None:
        limiter = RateLimiter(1)
        calls: list[Callable[[], object]] = [
            lambda: RateLimiter(bad),
            lambda: limiter.acquire(bad),
            lambda: limiter.reserve(bad),
            lambda: limiter.try_acquire(bad),
            lambda: asyncio.run(limiter.acquire_async(bad)),
        ]
        if bad is not None:
            calls.append(lambda: RateLimiter(1, burst=bad))
        for call in calls:
            with pytest.raises(ConfigError, match="finite number above 0"):
                call()
        assert limiter.try_acquire(1), "a refused call takes nothing"

    @pytest.mark.parametrize("bad", [-0.1, math.nan, True, "5"])
    def test_timeout(self, bad: Any) -> None:
        with pytest.raises(ConfigError, match="timeout"):
            RateLimiter(1).acquire(1, bad)

    def test_never(self) -> None:
        with pytest.raises(ConfigError, match="never be served"):
            RateLimiter(1e-308).acquire(1e10)


class VirtualTime(Clock):
    """Time of an event loop that jumps to the next sleeper when all tasks wait."""

    def __init__(self) -> None:
        super().__init__()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    async def sleep_async(self, seconds: float) -> None:
        waking: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleepers, (self.now + seconds, self._count, waking))
        await waking

    async def run(self) -> None:
        while True:
            for _ in range(5):
                await asyncio.sleep(0)
            if not self._sleepers:
                return
            when, _, waking = heapq.heappop(self._sleepers)
            if not waking.done():
                self.now = max(self.now, when)
                waking.set_result(None)


class TestTogether:
    @settings(deadline=None, max_examples=40)
    @given(
        rate=st.sampled_from([1.0, 5.0, 20.0]),
        burst=BURSTS,
        asked=st.lists(st.tuples(st.floats(0, 3), st.integers(1, 12), GAPS | st.none()), min_size=1, max_size=8),
    )
    @example(rate=1.0, burst=None, asked=[(0.0, 2, 0.0), (0.0, 1, 0.0)])
    def test_tasks_are_served_or_cancelled(
        self, rate: float, burst: float | None, asked: list[tuple[float, int, float | None]]
    ) -> None:
        clock = VirtualTime()
        limiter = limiter_at(clock, rate, burst)
        served: list[int] = []
        cancelled: list[int] = []

        async def one(number: int, start: float, tokens: int) -> None:
            await clock.sleep_async(start)
            try:
                await limiter.acquire_async(tokens)
            except asyncio.CancelledError:
                cancelled.append(number)
                raise
            served.append(number)

        async def cancel(task: asyncio.Task[None], after: float) -> None:
            await clock.sleep_async(after)
            task.cancel()

        async def all_of_them() -> None:
            tasks = [asyncio.create_task(one(i, start, n)) for i, (start, n, _) in enumerate(asked)]
            stops = [
                asyncio.create_task(cancel(task, start + after))
                for task, (start, _, after) in zip(tasks, asked, strict=True)
                if after is not None
            ]
            await clock.run()
            await asyncio.gather(*tasks, *stops, return_exceptions=True)

        asyncio.run(all_of_them())
        assert {i for i, (_, _, after) in enumerate(asked) if after is None} <= set(served)
        assert not set(served) & set(cancelled)
        # Nothing that was given up is still being paid for.
        owed = sum(asked[i][1] for i in served)
        assert limiter.reserve(limiter.burst) <= owed / rate + 1e-5
        assert len(limiter._waiting) <= 1

    def test_threads_and_tasks_share_one_bucket(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limiter = RateLimiter(50_000, burst=10)
        tickets: list[tuple[_Ticket, float]] = []

        def noted(seconds: float, due: float) -> _Ticket:
            # Made under the limiter's lock: in the order of the queue.
            tickets.append((_Ticket(seconds, due), seconds * limiter.rate))
            return tickets[-1][0]

        monkeypatch.setattr(rate_limit, "_Ticket", noted)
        start = threading.Barrier(5)

        def in_thread(number: int) -> int:
            start.wait()
            for i in range(40):
                limiter.acquire(1 + (i + number) % 15)
            return 40

        async def task(number: int) -> int:
            for i in range(20):
                await limiter.acquire_async(1 + (i + number) % 15)
            return 20

        async def in_loop() -> int:
            start.wait()
            return sum(await asyncio.gather(*(task(number) for number in range(4))))

        with ThreadPoolExecutor(5) as pool:
            loop = pool.submit(lambda: asyncio.run(in_loop()))
            assert sum(pool.map(in_thread, range(4))) + loop.result() == 240
        assert len(tickets) == 240
        assert_bounded([part for ticket, n in tickets for part in parts(ticket.due, n, limiter)], limiter)
        assert [ticket.due for ticket, _ in tickets] == sorted(ticket.due for ticket, _ in tickets)
