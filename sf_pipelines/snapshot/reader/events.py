"""What readers and rate limiters tell a listener: one name and a few plain values for each thing that happened."""

import logging
import threading
from collections.abc import Mapping
from enum import StrEnum
from typing import Final, Protocol

_LOG = logging.getLogger(__name__)

Value = str | int | float | bool


class EventName(StrEnum):
    """Names of events, and the fields that each comes with.

    ``status`` of an operation is ``ok``, ``partial`` or ``error``; with ``error`` (in a refresh: ``failed``) comes the
    field ``error``, the stable ``kind`` of the error. The number of results is that of all queries together.
    """

    INITIALIZED = "reader.initialized"  # kind, run_id, shards, latency_ms
    SEARCH = "reader.search"  # kind, queries, shards, results, latency_ms, status, error
    SHARD_SEARCH = "reader.shard_search"  # kind, shard, queries, results, latency_ms, status, error
    GET = "reader.get"  # kind, results (0 or 1), latency_ms, status, error
    MULTI_GET = "reader.multi_get"  # kind, keys, shards, results, latency_ms, status, error
    REFRESHED = "reader.refreshed"  # kind, run_id, latency_ms, status (unchanged, updated, failed), error
    CLOSED = "reader.closed"  # kind, run_id
    SHARD_OPENED = "reader.shard_opened"  # kind, run_id, shard, latency_ms
    SHARD_CLOSED = "reader.shard_closed"  # kind, run_id, shard
    THROTTLED = "rate_limiter.throttled"  # tokens, wait_ms; told before the wait
    DENIED = "rate_limiter.denied"  # tokens, wait_ms (the wait that was not made)


class EventField(StrEnum):
    """Names of the fields of events."""

    KIND = "kind"  # vector or unified
    RUN_ID = "run_id"
    SHARD = "shard"
    SHARDS = "shards"
    QUERIES = "queries"
    KEYS = "keys"
    RESULTS = "results"
    LATENCY_MS = "latency_ms"
    STATUS = "status"
    ERROR = "error"
    TOKENS = "tokens"
    WAIT_MS = "wait_ms"


class ReaderEvents(Protocol):
    """Listens to readers and rate limiters.

    ``emit`` is called on the caller's thread, on threads of the reader, and inside event loops, several at a time: it
    must be thread-safe and must not block. What it raises is logged and goes no further, see ``guarded``.
    """

    def emit(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Takes one event.

        Args:
            name: one of ``EventName``; more may come with later versions.
            attributes: by ``EventField``; not to be changed or kept.
        """


class _Silent:
    """Does nothing."""

    __slots__ = ()

    def emit(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Does nothing."""


SILENT: Final[ReaderEvents] = _Silent()
"""The default listener. Compare by ``is`` where gathering an event's fields costs something."""


class _Guarded:
    """Keeps a listener's failures away from the reader."""

    __slots__ = ("_events", "_lock", "_logged")

    def __init__(self, events: ReaderEvents) -> None:
        self._events = events
        self._lock = threading.Lock()
        self._logged: set[str] = set()

    def emit(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Passes an event on."""
        try:
            self._events.emit(name, attributes)
        except Exception as error:  # noqa: BLE001 - a stranger's code; whatever it raises must not break a search
            with self._lock:
                first = name not in self._logged
                self._logged.add(name)
            if first:
                _LOG.error(
                    "the listener %r failed on the event %s, which is lost; later failures on it are not logged",
                    self._events,
                    name,
                    exc_info=error,
                )


def guarded(events: ReaderEvents) -> ReaderEvents:
    """A listener that never raises.

    The first failure on each event name is logged with its traceback. What is no ``Exception`` (an interrupt, a
    cancellation) goes through. ``SILENT`` and what is guarded already come back as they are.
    """
    return events if events is SILENT or isinstance(events, _Guarded) else _Guarded(events)


class RecordingEvents:
    """Keeps all events in memory, for tests. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: list[tuple[str, dict[str, Value]]] = []

    def emit(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Keeps an event."""
        with self._lock:
            self._records.append((str(name), dict(attributes)))

    @property
    def records(self) -> list[tuple[str, dict[str, Value]]]:
        """Names and fields so far, in order of arrival."""
        with self._lock:
            return list(self._records)

    def named(self, name: str) -> list[dict[str, Value]]:
        """Fields of the events of one name."""
        return [attributes for known, attributes in self.records if known == name]

    def clear(self) -> None:
        """Forgets all events."""
        with self._lock:
            self._records.clear()
