"""Telling people that a run has failed: in the log, and through a webhook."""

from typing import Any

import dagster as dg
import requests
import stamina

from sf_pipelines.orchestration.graph import Graph
from sf_pipelines.orchestration.options import FailureAlertOptions, sensor_status, text_of
from sf_pipelines.snapshot.errors import SfPipelinesError

# Of a message; chat programs cut or refuse longer ones.
_MESSAGE = 2000


class WebhookError(SfPipelinesError, ConnectionError):
    """The webhook did not take the alert."""

    kind = "webhook"


class _PassingError(WebhookError):
    """It may take it at the next try."""

    retryable = True


def build_failure_sensor(graph: Graph, options: FailureAlertOptions) -> dg.SensorDefinition:
    """A sensor on failed runs that build this snapshot or operate on it, however they were launched."""
    names = graph.names

    @dg.run_failure_sensor(
        name=names.failure_sensor,
        default_status=sensor_status(options.default_status),
        description=f"Logs failed runs of the snapshot {names.name!r}"
        + ("." if options.webhook_url is None else " and posts them to a webhook."),
    )
    def failure_sensor(context: dg.RunFailureSensorContext) -> dg.SkipReason | None:
        run = context.dagster_run
        # Every failed run of the code location is shown to this sensor.
        if not graph.is_about(run):
            return dg.SkipReason(f"Run {run.run_id} does not build or operate on the snapshot {names.name!r}.")
        alert = describe_failure(context, graph)
        context.log.error("%s", alert["text"])
        if options.webhook_url is not None:
            post(text_of(options.webhook_url), alert, options)
        return None

    return failure_sensor


def describe_failure(context: dg.RunFailureSensorContext, graph: Graph) -> dict[str, Any]:
    """The alert as plain values; ``text`` alone is what chat programs show."""
    run, causes = context.dagster_run, []
    for event in context.get_step_failure_events():
        data = event.step_failure_data
        reason = data.user_failure_data.description if data.user_failure_data else None
        causes.append({"step": event.step_key, "reason": (reason or _innermost(data.error) or "unknown")[:_MESSAGE]})
    shown = "; ".join(f"{cause['step']}: {cause['reason']}" for cause in causes) or context.failure_event.message
    return {
        "text": f"Snapshot {graph.names.name!r}: run {run.run_id} of {run.job_name} has failed; what was published "
        f"before is still served. {shown}"[:_MESSAGE],
        "snapshot": graph.names.name,
        "store": graph.config.store,
        "job": run.job_name,
        "run_id": run.run_id,
        "causes": causes,
    }


def _innermost(error: Any) -> str | None:
    while error is not None and error.cause is not None:
        error = error.cause
    return None if error is None else error.message.strip()


def post(url: str, alert: dict[str, Any], options: FailureAlertOptions) -> None:
    """Posts an alert as JSON.

    Raises:
        WebhookError: it was refused, or the last try failed. The address is not named, since it may be a secret.
    """
    headers = {"Authorization": text_of(options.authorization)} if options.authorization is not None else {}
    for attempt in stamina.retry_context(on=_PassingError, attempts=options.tries, wait_initial=0.5, timeout=None):
        with attempt:
            try:
                answer = requests.post(
                    url, json=alert, headers=headers, timeout=options.timeout_seconds, allow_redirects=False
                )
            except requests.RequestException as error:
                # The error's text has the address in it.
                kind = _PassingError if isinstance(error, requests.ConnectionError | requests.Timeout) else WebhookError
                raise kind(f"the failure webhook could not be called: {type(error).__name__}") from None
            if answer.status_code >= 500 or answer.status_code == 429:
                raise _PassingError(f"the failure webhook answered {answer.status_code} {answer.reason}")
            if answer.status_code >= 300:
                raise WebhookError(f"the failure webhook answered {answer.status_code} {answer.reason}")
