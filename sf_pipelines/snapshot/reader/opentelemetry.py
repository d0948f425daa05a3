"""Events of readers as OpenTelemetry metrics. Needs the API package only, the extra ``otel``."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.reader.events import EventField, EventName, Value

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter, MeterProvider

_METER = "sf_pipelines.reader"
# A search takes 0.1 ms to some seconds; the default boundaries begin at 5.
_LATENCIES = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 10000.0)
_COUNTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0, 4096.0)

_Record = Callable[[Mapping[str, Value]], None]


class _Metric(NamedTuple):
    """What is recorded of an event.

    Attributes:
        event: its name.
        name: of the instrument, below the meter's.
        instrument: what it is.
        unit: in UCUM.
        description: what it measures.
        field: whose value is recorded, where the event has it; None records 1.
        labels: fields that go along. Run ids and shard numbers do not: each value would make a new series.
        when: field that the event must have to count.
    """

    event: EventName
    name: str
    instrument: Literal["counter", "histogram"]
    unit: str
    description: str
    field: EventField | None = None
    labels: tuple[EventField, ...] = ()
    when: EventField | None = None


_BY_STATUS = (EventField.KIND, EventField.STATUS)
_BY_KIND = (EventField.KIND,)


def _operation(event: EventName, name: str, what: str) -> list[_Metric]:
    """Calls, latency and errors of something that a reader does."""
    errors = (EventField.KIND, EventField.ERROR)
    return [
        _Metric(event, f"{name}.calls", "counter", "{call}", f"{what}, by outcome", labels=_BY_STATUS),
        _Metric(event, f"{name}.latency", "histogram", "ms", f"Time of {what}", EventField.LATENCY_MS, _BY_STATUS),
        _Metric(
            event, f"{name}.errors", "counter", "{error}", f"Errors of {what}", labels=errors, when=EventField.ERROR
        ),
    ]


_METRICS: Final = (
    *_operation(EventName.SEARCH, "search", "searches"),
    _Metric(
        EventName.SEARCH, "search.queries", "counter", "{query}", "Queries searched", EventField.QUERIES, _BY_STATUS
    ),
    _Metric(EventName.SEARCH, "search.shards", "histogram", "{shard}", "Shards asked", EventField.SHARDS, _BY_KIND),
    _Metric(EventName.SEARCH, "search.results", "histogram", "{result}", "Results found", EventField.RESULTS, _BY_KIND),
    *_operation(EventName.SHARD_SEARCH, "shard_search", "searches of one shard"),
    *_operation(EventName.GET, "get", "look-ups of a key"),
    _Metric(EventName.GET, "get.results", "counter", "{result}", "Keys found", EventField.RESULTS, _BY_KIND),
    *_operation(EventName.MULTI_GET, "multi_get", "look-ups of several keys"),
    _Metric(EventName.MULTI_GET, "multi_get.keys", "counter", "{key}", "Keys asked for", EventField.KEYS, _BY_KIND),
    _Metric(
        EventName.MULTI_GET, "multi_get.results", "counter", "{result}", "Keys found", EventField.RESULTS, _BY_KIND
    ),
    *_operation(EventName.REFRESHED, "refresh", "refreshes"),
    _Metric(EventName.INITIALIZED, "opened", "counter", "{reader}", "Readers opened", labels=_BY_KIND),
    _Metric(EventName.CLOSED, "closed", "counter", "{reader}", "Readers closed", labels=_BY_KIND),
    _Metric(EventName.SHARD_OPENED, "shard.opened", "counter", "{shard}", "Shards opened", labels=_BY_KIND),
    _Metric(
        EventName.SHARD_OPENED,
        "shard.open_latency",
        "histogram",
        "ms",
        "Time to fetch, verify and open a shard",
        EventField.LATENCY_MS,
        _BY_KIND,
    ),
    _Metric(EventName.SHARD_CLOSED, "shard.closed", "counter", "{shard}", "Shards closed", labels=_BY_KIND),
    _Metric(EventName.THROTTLED, "rate_limiter.throttled", "counter", "{call}", "Calls that had to wait"),
    _Metric(EventName.THROTTLED, "rate_limiter.wait", "histogram", "ms", "Waits for the limiter", EventField.WAIT_MS),
    _Metric(EventName.DENIED, "rate_limiter.denied", "counter", "{call}", "Calls that the limiter refused"),
)


class OpenTelemetryEvents:
    """Counts and measures what readers do, for OpenTelemetry. Thread-safe.

    Instruments are named ``sf_pipelines.reader.<operation>.<measure>``: ``calls``, ``latency`` (ms) and ``errors`` of
    ``search``, ``shard_search``, ``get``, ``multi_get`` and ``refresh``; shards asked and results found of searches;
    shards opened and closed; calls that a rate limiter held up or refused. Events of unknown names are left alone.

    Args:
        meter_provider: where the metrics go; None is the process's own, which records nothing until one is set.

    Raises:
        ConfigError: the package ``opentelemetry-api`` is not installed.
    """

    def __init__(self, meter_provider: "MeterProvider | None" = None) -> None:
        try:
            from opentelemetry.metrics import get_meter_provider
        except ImportError as error:
            raise ConfigError(
                "OpenTelemetryEvents needs the package opentelemetry-api, which is not installed; "
                "install sf-pipelines[otel]"
            ) from error
        meter = (get_meter_provider() if meter_provider is None else meter_provider).get_meter(_METER)
        self._records: dict[str, list[_Record]] = {}
        for metric in _METRICS:
            self._records.setdefault(metric.event, []).append(_recorder(meter, metric))

    def emit(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Records an event."""
        for record in self._records.get(name, ()):
            record(attributes)


def _recorder(meter: "Meter", metric: _Metric) -> _Record:
    add = _instrument(meter, metric)

    def record(attributes: Mapping[str, Value]) -> None:
        if metric.when is not None and metric.when not in attributes:
            return
        amount = 1 if metric.field is None else attributes.get(metric.field)
        # What failed has no results to count.
        if isinstance(amount, int | float):
            add(amount, {str(label): attributes[label] for label in metric.labels if label in attributes})

    return record


def _instrument(meter: "Meter", metric: _Metric) -> Callable[[float, Mapping[str, Value]], None]:
    name = f"{_METER}.{metric.name}"
    if metric.instrument == "counter":
        return meter.create_counter(name, metric.unit, metric.description).add
    boundaries = _LATENCIES if metric.unit == "ms" else _COUNTS
    return meter.create_histogram(
        name, metric.unit, metric.description, explicit_bucket_boundaries_advisory=boundaries
    ).record
