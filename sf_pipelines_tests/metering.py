"""An OpenTelemetry provider that keeps what is recorded: the SDK is none of our dependencies."""

from collections.abc import Sequence
from typing import Any

from opentelemetry import metrics

Points = list[tuple[str, float, dict[str, Any]]]


class FakeCounter(metrics.Counter):
    def __init__(self, name: str, points: Points) -> None:
        self._name, self._points = name, points

    def add(self, amount: float, attributes: Any = None, context: Any = None) -> None:
        del context
        self._points.append((self._name, amount, dict(attributes or {})))


class FakeHistogram(metrics.Histogram):
    def __init__(self, name: str, points: Points) -> None:
        self._name, self._points = name, points

    def record(self, amount: float, attributes: Any = None, context: Any = None) -> None:
        del context
        self._points.append((self._name, amount, dict(attributes or {})))


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

    def named(self, name: str) -> list[tuple[float, dict[str, Any]]]:
        """What an instrument got, by its name below the meter's."""
        full = f"sf_pipelines.reader.{name}"
        return [(amount, labels) for known, amount, labels in self.points if known == full]

    @property
    def points(self) -> Points:
        """What all instruments got."""
        return [point for meter in self.meters.values() for point in meter.points]

    def clear(self) -> None:
        """Forgets it."""
        for meter in self.meters.values():
            meter.points.clear()

    def get_meter(
        self, name: str, version: str | None = None, schema_url: str | None = None, attributes: Any = None
    ) -> metrics.Meter:
        del version, schema_url, attributes
        return self.meters.setdefault(name, FakeMeter(name))
