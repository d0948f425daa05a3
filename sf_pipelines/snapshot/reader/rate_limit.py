"""A token bucket for threads and asyncio tasks at once."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from numbers import Real

from opentelemetry.metrics import MeterProvider

from sf_pipelines.snapshot.errors import ConfigError, RateLimitError
from sf_pipelines.snapshot.reader.metrics import metrics_of

_SLICE = 0.05  # seconds after which a waiting caller looks whether others gave up and its turn came forward
_INSTANT = 1e-6  # seconds that are no wait: rounding must not refuse a full bucket's worth


@dataclass(eq=False, slots=True)
class _Ticket:
    """A place in the queue: seconds in which the bucket makes its tokens, and when the last of them is its own."""

    seconds: float
    due: float


class RateLimiter:
    """Lets tokens through at a rate, in the order in which they were asked for. Thread-safe and task-safe.

    The bucket starts full. Each request takes a place in one queue for threads and tasks alike and is served when the
    bucket has made the tokens of all before it and its own. More tokens than the bucket holds are served in parts, as
    they are made, and take as long as they take. In any t seconds at most ``burst + rate * t`` tokens go through; a
    caller who gives up frees its place, and those behind it move up within that bound.

    The arithmetic is that of the generic cell rate algorithm (ITU-T I.371): in place of a level it keeps the instant
    at which all that was asked for is served, so nothing runs in the background.

    Args:
        rate: tokens a second.
        burst: tokens that the bucket holds; None is one second's worth, at least 1.
        meter_provider: where OpenTelemetry metrics of waits and refusals go; None is the process's own.

    Raises:
        ConfigError: ``rate`` or ``burst`` is no finite number above 0.
    """

    # Tests put their own time here.
    _clock = staticmethod(time.monotonic)
    _sleep = staticmethod(time.sleep)
    _sleep_async = staticmethod(asyncio.sleep)

    def __init__(self, rate: float, *, burst: float | None = None, meter_provider: MeterProvider | None = None) -> None:
        self.rate = _positive(rate, "rate")
        self.burst = max(self.rate, 1.0) if burst is None else _positive(burst, "burst")
        self._full = self._seconds(self.burst)
        self._metrics = metrics_of(meter_provider)
        self._lock = threading.Lock()
        self._waiting: deque[_Ticket] = deque()
        # All that was asked for is served then; before now by what is in the bucket.
        self._edge = self._clock() - self._full

    def reserve(self, n: float) -> float:
        """Takes tokens for good. Returns the seconds until they are the caller's, who does the waiting; 0 is now."""
        return self._enter(n, math.inf)[1]

    def try_acquire(self, n: float = 1) -> bool:
        """Takes tokens if that needs no wait; more than ``burst`` always do.

        Raises:
            ConfigError: ``n`` is no finite number above 0.
        """
        ticket, _ = self._enter(n, 0.0)
        if ticket is None:
            self._metrics.denied.add(1)
        return ticket is not None

    def acquire(self, n: float = 1, timeout: float | None = None) -> None:
        """Takes tokens and blocks the thread until they are its own.

        An exception during the wait (an interrupt) gives them back.

        Args:
            n: tokens; more than ``burst`` are served in parts.
            timeout: longest wait in seconds; None waits as long as it takes.

        Raises:
            RateLimitError: the wait would be longer than ``timeout``. Raised at once, and no tokens were taken.
            ConfigError: ``n`` is no finite number above 0, or ``timeout`` one below 0.
        """
        with self._queued(n, timeout) as ticket:
            while (left := ticket.due - self._clock()) > 0:
                self._sleep(min(left, _SLICE))

    # asyncio.timeout would hold a place in the queue until it runs out; here nothing is taken.
    async def acquire_async(self, n: float = 1, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """As ``acquire``, but the task waits; cancellation gives the tokens back."""
        with self._queued(n, timeout) as ticket:
            while (left := ticket.due - self._clock()) > 0:
                await self._sleep_async(min(left, _SLICE))

    @contextmanager
    def _queued(self, n: float, timeout: float | None) -> Iterator[_Ticket]:
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, Real) or not timeout >= 0):
            raise ConfigError(f"timeout of a rate limiter must be a number of seconds of at least 0 (got {timeout!r})")
        ticket, wait = self._enter(n, math.inf if timeout is None else timeout)
        if ticket is None:
            self._metrics.denied.add(1)
            raise RateLimitError(
                f"{n} tokens would take {wait:.3f} s at {self.rate} tokens a second, longer than the timeout of "
                f"{timeout} s; try again later, allow a longer wait, or raise the limiter's rate"
            )
        if wait:
            self._metrics.throttled.add(1)
            self._metrics.wait.record(wait * 1000)
        try:
            yield ticket
        except BaseException:
            self._leave(ticket)
            raise

    def _enter(self, n: float, limit: float) -> tuple[_Ticket | None, float]:
        """A place in the queue unless its wait is longer than the limit, and the wait."""
        seconds = self._seconds(_positive(n, "n"))
        with self._lock:
            now = self._clock()
            # A full bucket makes no more tokens.
            edge = max(self._edge, now - self._full) + seconds
            wait = edge - now if edge - now > _INSTANT else 0.0
            if wait > limit:
                return None, wait
            self._edge = edge
            ticket = _Ticket(seconds, now + wait)
            self._drop_served(now)
            if wait:
                self._waiting.append(ticket)
            return ticket, wait

    def _leave(self, ticket: _Ticket) -> None:
        """Gives what a caller was not served yet, and up to a bucketful that it was, to those behind it."""
        with self._lock:
            now = self._clock()
            self._drop_served(now)
            if ticket.due > now:
                freed = min(ticket.seconds, ticket.due - now + self._full)
                behind = list(takewhile(lambda other: other is not ticket, reversed(self._waiting)))
                self._waiting.remove(ticket)
            else:
                # Served but not used. The bucket has been filling since then, and both together are at most full:
                # else many who give up at once would let through more than a burst.
                freed = max(0.0, min(ticket.seconds, self._full) - (now - ticket.due))
                behind = list(self._waiting)
            self._edge = max(self._edge, now - self._full) - freed
            for other in behind:
                other.due = max(now, other.due - freed)

    def _drop_served(self, now: float) -> None:
        while self._waiting and self._waiting[0].due <= now:
            self._waiting.popleft()

    def _seconds(self, tokens: float) -> float:
        seconds = tokens / self.rate
        if not math.isfinite(seconds):
            raise ConfigError(f"{tokens} tokens at a rate of {self.rate} tokens a second would never be served")
        return seconds


def _positive(value: float, name: str) -> float:
    # NaN fails the comparison.
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ConfigError(f"{name} of a rate limiter must be a finite number above 0 (got {value!r})")
    return float(value)
