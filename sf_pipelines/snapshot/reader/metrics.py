"""OpenTelemetry metrics of readers and rate limiters.

Only the API package is needed. It does nothing until the application sets up an SDK.
"""

import time
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

from opentelemetry.metrics import Counter, Histogram, Meter, MeterProvider, get_meter_provider

from sf_pipelines.snapshot.errors import SfPipelinesError

_METER = "sf_pipelines.reader"
# A search takes 0.1 ms to some seconds; the default boundaries begin at 5.
_LATENCIES = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 10000.0)
_COUNTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0, 4096.0)

Operation = Literal["search", "shard_search", "get", "multi_get", "refresh"]
_OPERATIONS: tuple[tuple[Operation, str], ...] = (
    ("search", "searches"),
    ("shard_search", "searches of one shard"),
    ("get", "look-ups of a key"),
    ("multi_get", "look-ups of several keys"),
    ("refresh", "refreshes"),
)


class Metrics:
    """Instruments ``sf_pipelines.reader.<operation>.<measure>``. Thread-safe.

    Labels are ``kind``; ``status`` (``ok``, ``partial``, ``error``; or ``unchanged``, ``updated``, ``failed``);
    and ``error`` (an error's stable kind). Run ids and shard numbers are no labels: each would be a new series.
    """

    def __init__(self, meter: Meter) -> None:
        def counter(name: str, unit: str, description: str) -> Counter:
            return meter.create_counter(f"{_METER}.{name}", unit, description)

        def histogram(name: str, unit: str, description: str) -> Histogram:
            return meter.create_histogram(
                f"{_METER}.{name}",
                unit,
                description,
                explicit_bucket_boundaries_advisory=_LATENCIES if unit == "ms" else _COUNTS,
            )

        self._calls = {name: counter(f"{name}.calls", "{call}", f"{what}, by outcome") for name, what in _OPERATIONS}
        self._latency = {name: histogram(f"{name}.latency", "ms", f"Time of {what}") for name, what in _OPERATIONS}
        self._errors = {name: counter(f"{name}.errors", "{error}", f"Errors of {what}") for name, what in _OPERATIONS}
        self.search_queries = counter("search.queries", "{query}", "Queries searched")
        self.search_shards = histogram("search.shards", "{shard}", "Shards asked")
        self.search_results = histogram("search.results", "{result}", "Results found")
        self.get_results = counter("get.results", "{result}", "Keys found")
        self.multi_get_keys = counter("multi_get.keys", "{key}", "Keys asked for")
        self.multi_get_results = counter("multi_get.results", "{result}", "Keys found")
        self.opened = counter("opened", "{reader}", "Readers opened")
        self.closed = counter("closed", "{reader}", "Readers closed")
        self.shard_opened = counter("shard.opened", "{shard}", "Shards opened")
        self.shard_open_latency = histogram("shard.open_latency", "ms", "Time to fetch, verify and open a shard")
        self.shard_closed = counter("shard.closed", "{shard}", "Shards closed")
        self.throttled = counter("rate_limiter.throttled", "{call}", "Calls that had to wait")
        self.wait = histogram("rate_limiter.wait", "ms", "Waits for the limiter")
        self.denied = counter("rate_limiter.denied", "{call}", "Calls that the limiter refused")

    def ended(
        self, operation: Operation, kind: str, status: str, started: float, *, error: str | None = None, calls: int = 1
    ) -> None:
        """Records calls that began together at ``started`` (of ``time.perf_counter``) and have just ended."""
        labels = {"kind": kind, "status": status}
        self._calls[operation].add(calls, labels)
        self._latency[operation].record((time.perf_counter() - started) * 1000, labels)
        if error is not None:
            self._errors[operation].add(1, {"kind": kind, "error": error})

    @contextmanager
    def timed(self, operation: Operation, kind: str, missing: Sized = ()) -> Iterator[None]:
        """Records how a block ended; it is ``partial`` where something is missing then."""
        started = time.perf_counter()
        try:
            yield
        except BaseException as error:
            # Cancellations, interrupts and faults of ours count too.
            name = error.kind if isinstance(error, SfPipelinesError) else type(error).__name__
            self.ended(operation, kind, "error", started, error=name)
            raise
        self.ended(operation, kind, "partial" if missing else "ok", started)


def metrics_of(provider: MeterProvider | None) -> Metrics:
    """Instruments of a provider; None is the process's own. They are made once: the API never forgets a meter."""
    return _metrics_of(get_meter_provider() if provider is None else provider)


@lru_cache(maxsize=16)
def _metrics_of(provider: MeterProvider) -> Metrics:
    return Metrics(provider.get_meter(_METER))
