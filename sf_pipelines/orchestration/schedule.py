"""Rebuilds by the clock."""

from datetime import UTC
from typing import Any

import dagster as dg

from sf_pipelines.orchestration.graph import Graph
from sf_pipelines.orchestration.options import ScheduleOptions, schedule_status


def build_schedule(graph: Graph, options: ScheduleOptions) -> dg.ScheduleDefinition:
    """The schedule; however often a tick is evaluated, it asks for one run."""
    names = graph.names

    @dg.schedule(
        name=names.schedule,
        job_name=names.job,
        cron_schedule=options.cron,
        execution_timezone=options.timezone,
        default_status=schedule_status(options.default_status),
        description=f"Builds the snapshot {names.name!r}"
        + (", also when nothing is new." if options.force else "; publishes nothing when nothing is new."),
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        moment = context.scheduled_execution_time.astimezone(UTC)
        return dg.RunRequest(
            run_key=f"{names.scope}:{moment:%Y-%m-%dT%H:%M:%SZ}",
            tags=names.run_tags,
            run_config=_forced(graph) if options.force else None,
        )

    return schedule


def _forced(graph: Graph) -> dict[str, Any]:
    return {"ops": {graph.names.step("source_vectors"): {"config": {"force": True}}}}
