"""Events: listeners that fail, and the metrics that OpenTelemetry gets."""

import logging
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from opentelemetry import metrics

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.reader.events import SILENT, EventName, ReaderEvents, RecordingEvents, guarded
from sf_pipelines.snapshot.reader.opentelemetry import OpenTelemetryEvents


class Failing:
    """Fails on every event."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def emit(self, name: str, attributes: Mapping[str, Any]) -> None:
        del name, attributes
        self.calls += 1
        raise self.error


class TestGuarded:
    def test_failures_are_logged_once_per_name(self, caplog: pytest.LogCaptureFixture) -> None:
        failing = Failing(RuntimeError("listener broke"))
        events = guarded(failing)
        with caplog.at_level(logging.ERROR):
            for name in (EventName.SEARCH, EventName.SEARCH, EventName.CLOSED, EventName.SEARCH):
                events.emit(name, {})
        assert failing.calls == 4
        assert ["reader.search" in one.getMessage() for one in caplog.records] == [True, False]
        assert "listener broke" in caplog.text

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
    def test_interrupts_go_through(self, error: BaseException) -> None:
        with pytest.raises(type(error)):
            guarded(Failing(error)).emit(EventName.SEARCH, {})

    def test_wraps_once(self) -> None:
        assert guarded(SILENT) is SILENT
        once = guarded(RecordingEvents())
        assert guarded(once) is once
        SILENT.emit(EventName.SEARCH, {})

    def test_passes_on(self) -> None:
        recording = RecordingEvents()
        guarded(recording).emit(EventName.SEARCH, {"queries": 1})
        assert recording.records == [("reader.search", {"queries": 1})]


class TestRecording:
    def test_keeps_copies(self) -> None:
        events, fields = RecordingEvents(), {"results": 1}
        events.emit(EventName.GET, fields)
        fields["results"] = 2
        events.emit("other", fields)
        events.records.clear()
        assert events.records == [("reader.get", {"results": 1}), ("other", {"results": 2})]
        assert events.named(EventName.GET) == [{"results": 1}]
        events.clear()
        assert not events.records

    def test_threads(self) -> None:
        events = RecordingEvents()
        threads = [
            threading.Thread(target=lambda: [events.emit(EventName.GET, {"results": i}) for i in range(200)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(events.records) == 800


Points = list[tuple[str, float, dict[str, Any]]]


class FakeCounter(metrics.Counter):
    def __init__(self, name: str, points: Points) -> None:
        self._name, self._points = name, points

    def add(self, amount: float, attributes: Any = None, context: Any = None) -> None:
        del context
        self._points.append((self._name, amount, dict(attributes)))


class FakeHistogram(metrics.Histogram):
    def __init__(self, name: str, points: Points) -> None:
        self._name, self._points = name, points

    def record(self, amount: float, attributes: Any = None, context: Any = None) -> None:
        del context
        self._points.append((self._name, amount, dict(attributes)))


class FakeMeter(metrics.NoOpMeter):
    """Keeps the points of counters and histograms."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.points: Points = []
        self.instruments: dict[str, tuple[str, str, Sequence[float] | None]] = {}

    def create_counter(self, name: str, unit: str = "", description: str = "") -> metrics.Counter:
        self._note(name, unit, description, None)
        return FakeCounter(name, self.points)

    def create_histogram(
        self,
        name: str,
        unit: str = "",
        description: str = "",
        *,
        explicit_bucket_boundaries_advisory: Sequence[float] | None = None,
    ) -> metrics.Histogram:
        self._note(name, unit, description, explicit_bucket_boundaries_advisory)
        return FakeHistogram(name, self.points)

    def _note(self, name: str, unit: str, description: str, boundaries: Sequence[float] | None) -> None:
        assert name not in self.instruments, "made twice"
        self.instruments[name] = (unit, description, boundaries)


class FakeProvider(metrics.MeterProvider):
    def __init__(self) -> None:
        self.meters: dict[str, FakeMeter] = {}

    def get_meter(
        self, name: str, version: str | None = None, schema_url: str | None = None, attributes: Any = None
    ) -> metrics.Meter:
        del version, schema_url, attributes
        return self.meters.setdefault(name, FakeMeter(name))


@pytest.fixture
def meter_and_events() -> tuple[FakeMeter, ReaderEvents]:
    provider = FakeProvider()
    events = OpenTelemetryEvents(provider)
    return provider.meters["sf_pipelines.reader"], events


class TestOpenTelemetry:
    def test_search(self, meter_and_events: tuple[FakeMeter, ReaderEvents]) -> None:
        meter, events = meter_and_events
        fields = {"kind": "vector", "queries": 3, "shards": 4, "results": 30, "latency_ms": 1.5, "status": "ok"}
        events.emit(EventName.SEARCH, {**fields, "run_id": "r1"})
        by_status, by_kind = {"kind": "vector", "status": "ok"}, {"kind": "vector"}
        assert sorted(meter.points, key=lambda point: point[0]) == [
            ("sf_pipelines.reader.search.calls", 1, by_status),
            ("sf_pipelines.reader.search.latency", 1.5, by_status),
            ("sf_pipelines.reader.search.queries", 3, by_status),
            ("sf_pipelines.reader.search.results", 30, by_kind),
            ("sf_pipelines.reader.search.shards", 4, by_kind),
        ]

    def test_failures(self, meter_and_events: tuple[FakeMeter, ReaderEvents]) -> None:
        meter, events = meter_and_events
        failed = {"kind": "unified", "status": "error", "error": "store.unavailable"}
        events.emit("reader.search", {**failed, "latency_ms": 2})
        events.emit("reader.refreshed", {"kind": "unified", "status": "updated", "run_id": "r2", "latency_ms": 7})
        assert meter.points == [
            ("sf_pipelines.reader.search.calls", 1, {"kind": "unified", "status": "error"}),
            ("sf_pipelines.reader.search.latency", 2, {"kind": "unified", "status": "error"}),
            ("sf_pipelines.reader.search.errors", 1, {"kind": "unified", "error": "store.unavailable"}),
            ("sf_pipelines.reader.refresh.calls", 1, {"kind": "unified", "status": "updated"}),
            ("sf_pipelines.reader.refresh.latency", 7, {"kind": "unified", "status": "updated"}),
        ]

    def test_limiter(self, meter_and_events: tuple[FakeMeter, ReaderEvents]) -> None:
        meter, events = meter_and_events
        events.emit(EventName.THROTTLED, {"tokens": 4.0, "wait_ms": 20.0})
        events.emit(EventName.DENIED, {"tokens": 4.0, "wait_ms": 900.0})
        assert meter.points == [
            ("sf_pipelines.reader.rate_limiter.throttled", 1, {}),
            ("sf_pipelines.reader.rate_limiter.wait", 20.0, {}),
            ("sf_pipelines.reader.rate_limiter.denied", 1, {}),
        ]

    @pytest.mark.parametrize("name", list(EventName))
    def test_every_event_is_counted(self, name: EventName, meter_and_events: tuple[FakeMeter, ReaderEvents]) -> None:
        meter, events = meter_and_events
        events.emit(name, {"kind": "vector", "run_id": "r1", "shard": 3})
        assert [amount for _, amount, _ in meter.points] == [1]
        assert not {"run_id", "shard"} & set(meter.points[0][2]), "they would make a series for each value"

    def test_unknown_events_are_left_alone(self, meter_and_events: tuple[FakeMeter, ReaderEvents]) -> None:
        meter, events = meter_and_events
        events.emit("reader.of_a_later_version", {"latency_ms": 1})
        assert not meter.points

    def test_instruments_say_what_they_are(self, meter_and_events: tuple[FakeMeter, ReaderEvents]) -> None:
        meter, _ = meter_and_events
        assert all(unit and description for unit, description, _ in meter.instruments.values())
        boundaries = meter.instruments["sf_pipelines.reader.search.latency"][2]
        assert boundaries is not None
        assert list(boundaries) == sorted(set(boundaries))
        assert boundaries[0] < 1, "searches are faster than the default boundaries can tell"

    def test_default_provider_records_nothing(self) -> None:
        OpenTelemetryEvents().emit(EventName.SEARCH, {"queries": 1, "latency_ms": 1.0})

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "opentelemetry.metrics", None)
        with pytest.raises(ConfigError, match=r"sf-pipelines\[otel\]"):
            OpenTelemetryEvents()

    def test_import_does_not_need_the_package(self) -> None:
        code = (
            "import sys; sys.modules['opentelemetry'] = None\n"
            "import sf_pipelines.snapshot.reader.opentelemetry, sf_pipelines.snapshot.reader.rate_limit"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
