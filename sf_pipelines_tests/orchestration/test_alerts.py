"""Failed runs are told: in the log, and to a real HTTP server."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines.orchestration.alerts import WebhookError, post
from sf_pipelines.orchestration.options import FailureAlertOptions
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines_tests.orchestration.conftest import run_job


class Webhook:
    """A server that gives prepared answers and keeps what it was sent.

    Attributes:
        answers: status of the next calls; a float is slept first. When there are none left, 200.
        calls: path, headers and JSON of each call.
    """

    def __init__(self) -> None:
        self.answers: list[int | float] = []
        self.calls: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hook.calls.append((self.path, dict(self.headers), body))
                answer = hook.answers.pop(0) if hook.answers else 200
                if isinstance(answer, float):
                    time.sleep(answer)
                    answer = 200
                self.send_response(answer)
                if answer == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook/s3cret"


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    hook = Webhook()
    thread = threading.Thread(target=hook.server.serve_forever)
    thread.start()
    yield hook
    hook.server.shutdown()
    thread.join()
    hook.server.server_close()


def tell(
    config: WriteConfig, instance: dg.DagsterInstance, failed: dg.ExecuteInProcessResult, **options: Any
) -> dg.SkipReason | None:
    """Shows a failed run to the snapshot's failure sensor, as the daemon does."""
    defs = build_snapshot_defs(config, failure_alert=options)
    sensor = defs.resolve_sensor_def(f"{config.name}_failure_sensor")
    (event,) = [event for event in failed.all_events if event.event_type_value == "PIPELINE_FAILURE"]
    context = dg.build_run_status_sensor_context(sensor.name, event, instance, failed.dagster_run)
    return sensor(context.for_run_failure())  # pyright: ignore[reportReturnType]


@pytest.fixture
def failed(config: WriteConfig, instance: dg.DagsterInstance, source: Path) -> dg.ExecuteInProcessResult:
    source.write_bytes(b"PAR1 but damaged")
    result = run_job(config, instance)
    assert not result.success
    return result


def test_a_failed_run_is_posted_with_its_cause(
    config: WriteConfig,
    instance: dg.DagsterInstance,
    failed: dg.ExecuteInProcessResult,
    webhook: Webhook,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ALERT_URL", webhook.url)
    monkeypatch.setenv("ALERT_TOKEN", "Bearer 123")
    webhook.answers = [503, 429]

    told = tell(config, instance, failed, webhook_url={"env": "ALERT_URL"}, authorization={"env": "ALERT_TOKEN"})

    assert told is None
    assert len(webhook.calls) == 3
    path, headers, alert = webhook.calls[-1]
    assert (path, headers["Authorization"]) == ("/hook/s3cret", "Bearer 123")
    assert (alert["snapshot"], alert["job"], alert["run_id"]) == ("tiny", "build_tiny", failed.run_id)
    assert alert["store"] == config.store
    assert alert["causes"][0]["step"] == "tiny__source_vectors"
    assert "SourceSchemaError" in alert["causes"][0]["reason"]
    assert "digits.parquet" in alert["text"]
    assert "still served" in alert["text"]


def test_without_a_webhook_it_is_logged(
    config: WriteConfig,
    instance: dg.DagsterInstance,
    failed: dg.ExecuteInProcessResult,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert tell(config, instance, failed) is None
    assert "Snapshot 'tiny': run" in "".join(capfd.readouterr())


def test_runs_of_other_snapshots_are_not_told(
    config: WriteConfig, instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    @dg.asset(key=["other", "source_vectors"])
    def broken() -> None:
        raise ValueError("not ours")

    result = dg.materialize([broken], instance=instance, raise_on_error=False)
    told = tell(config, instance, result, webhook_url=webhook.url)
    assert isinstance(told, dg.SkipReason)
    assert webhook.calls == []


def test_assets_launched_without_the_job_are_told(
    config: WriteConfig, instance: dg.DagsterInstance, source: Path, webhook: Webhook
) -> None:
    source.unlink()
    defs = build_snapshot_defs(config, key_prefix="search")
    job = defs.resolve_implicit_global_asset_job_def()
    key = dg.AssetKey(["search", "tiny", "source_vectors"])
    result = job.execute_in_process(instance=instance, asset_selection=[key], raise_on_error=False)
    alert_options = {"webhook_url": webhook.url}
    sensor = build_snapshot_defs(config, key_prefix="search", failure_alert=alert_options).resolve_sensor_def(
        "tiny_failure_sensor"
    )
    (event,) = [event for event in result.all_events if event.event_type_value == "PIPELINE_FAILURE"]
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    sensor(dg.build_run_status_sensor_context(sensor.name, event, instance, run).for_run_failure())
    assert webhook.calls[0][2]["causes"][0]["step"] == "search__tiny__source_vectors"


@pytest.mark.parametrize(("answers", "calls"), [([500, 500, 500], 3), ([403], 1), ([302], 1)])
def test_an_alert_that_is_not_taken_is_an_error_without_the_address(
    webhook: Webhook, answers: list[int | float], calls: int
) -> None:
    webhook.answers = list(answers)
    with pytest.raises(WebhookError, match=str(answers[0])) as caught:
        post(webhook.url, {"text": "x"}, FailureAlertOptions(webhook_url=webhook.url))
    assert "s3cret" not in str(caught.value)
    assert len(webhook.calls) == calls


def test_a_webhook_that_hangs_or_is_gone_is_given_up(webhook: Webhook) -> None:
    options = FailureAlertOptions(webhook_url=webhook.url, timeout_seconds=0.2, tries=2)
    webhook.answers = [0.6, 0.6]
    with pytest.raises(WebhookError, match="ReadTimeout"):
        post(webhook.url, {"text": "x"}, options)
    with pytest.raises(WebhookError, match="ConnectionError") as caught:
        post("http://127.0.0.1:9/s3cret", {"text": "x"}, options)
    assert "s3cret" not in str(caught.value)


def test_a_secret_that_is_not_set_is_named(
    config: WriteConfig, instance: dg.DagsterInstance, failed: dg.ExecuteInProcessResult
) -> None:
    with pytest.raises(ConfigError, match="NOT_SET_ANYWHERE"):
        tell(config, instance, failed, webhook_url={"env": "NOT_SET_ANYWHERE"})
