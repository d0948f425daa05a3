"""Metrics of readers: every measure has its instrument, its labels are few, and without an SDK nothing is recorded."""

import time

import pytest
from opentelemetry.metrics import get_meter_provider

from sf_pipelines.snapshot.errors import StoreUnavailableError
from sf_pipelines.snapshot.reader.metrics import Metrics, metrics_of
from sf_pipelines_tests.metering import FakeProvider


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


def test_a_call_that_ended_well_or_in_part(provider: FakeProvider) -> None:
    metrics, missing = metrics_of(provider), [3]
    with metrics.timed("search", "vector"):
        pass
    with metrics.timed("search", "unified", missing):
        pass
    assert provider.named("search.calls") == [
        (1, {"kind": "vector", "status": "ok"}),
        (1, {"kind": "unified", "status": "partial"}),
    ]
    assert [labels["status"] for _, labels in provider.named("search.latency")] == ["ok", "partial"]
    assert not provider.named("search.errors")


@pytest.mark.parametrize(
    ("error", "kind"),
    [(StoreUnavailableError("away"), "store.unavailable"), (KeyboardInterrupt(), "KeyboardInterrupt")],
)
def test_a_call_that_failed(provider: FakeProvider, error: BaseException, kind: str) -> None:
    with pytest.raises(type(error)), metrics_of(provider).timed("get", "unified"):
        raise error
    assert provider.named("get.calls") == [(1, {"kind": "unified", "status": "error"})]
    assert provider.named("get.errors") == [(1, {"kind": "unified", "error": kind})]


def test_work_that_was_done_together_is_timed_once(provider: FakeProvider) -> None:
    metrics_of(provider).ended("shard_search", "vector", "ok", time.perf_counter() - 0.5, calls=4)
    assert provider.named("shard_search.calls") == [(4, {"kind": "vector", "status": "ok"})]
    ((latency, _),) = provider.named("shard_search.latency")
    assert latency >= 500


def test_instruments_are_made_once_and_say_what_they_are(provider: FakeProvider) -> None:
    assert metrics_of(provider) is metrics_of(provider)
    (meter,) = provider.meters.values()
    assert all(unit and description for unit, description, _ in meter.instruments.values())
    boundaries = meter.instruments["sf_pipelines.reader.search.latency"][2]
    assert boundaries is not None
    assert list(boundaries) == sorted(set(boundaries))
    assert boundaries[0] < 1, "searches are faster than the default boundaries can tell"


def test_the_default_provider_records_nothing() -> None:
    assert isinstance(metrics_of(None), Metrics)
    assert metrics_of(None) is metrics_of(get_meter_provider())
    with metrics_of(None).timed("search", "vector"):
        pass
