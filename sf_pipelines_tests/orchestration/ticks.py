"""Ticks of schedules and sensors on a real instance: what the daemon does with what they return."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import dagster as dg

from sf_pipelines.orchestration import SnapshotOptions, build_snapshot_defs
from sf_pipelines.snapshot.config import WriteConfig


@dataclass(frozen=True)
class Tick:
    """What came of a look."""

    requests: list[dg.RunRequest]
    events: list[dg.AssetMaterialization]
    reason: str


@dataclass
class Sensor:
    """One sensor with its cursor, as the daemon keeps it.

    Attributes:
        defs: of the code location.
        name: of the sensor.
        instance: that it looks at.
        cursor: kept when a tick went well.
        run_keys: of requests that were accepted.
    """

    defs: dg.Definitions
    name: str
    instance: dg.DagsterInstance
    cursor: str | None = None
    run_keys: set[str] = field(default_factory=set)

    def tick(self) -> Tick:
        """Evaluates the sensor; an error leaves the cursor. Events are reported, repeated run keys dropped."""
        sensor, repository = self.defs.resolve_sensor_def(self.name), self.defs.get_repository_def()
        with dg.build_sensor_context(
            self.instance, cursor=self.cursor, repository_def=repository, resources=dict(self.defs.resources or {})
        ) as context:
            result = sensor.evaluate_tick(context)
        events: list[dg.AssetMaterialization] = []
        for event in result.asset_events:
            assert isinstance(event, dg.AssetMaterialization)
            self.instance.report_runless_asset_event(event)
            events.append(event)
        requests = [request for request in result.run_requests or [] if request.run_key not in self.run_keys]
        self.run_keys |= {request.run_key for request in requests if request.run_key}
        self.cursor = result.cursor
        return Tick(requests, events, result.skip_message or "")

    def run(self, request: dg.RunRequest) -> dg.ExecuteInProcessResult:
        """Executes a requested run of the sensor's job."""
        return run_request(self.defs, self.defs.resolve_sensor_def(self.name).job_name, request, self.instance)


def run_request(
    defs: dg.Definitions, job: str | None, request: dg.RunRequest, instance: dg.DagsterInstance
) -> dg.ExecuteInProcessResult:
    """Executes a requested run."""
    assert job is not None
    return defs.resolve_job_def(job).execute_in_process(
        instance=instance,
        tags=dict(request.tags),
        run_config=request.run_config,
        asset_selection=request.asset_selection,
        raise_on_error=False,
    )


def snapshot_sensor(config: WriteConfig, instance: dg.DagsterInstance, noun: str, **options: Any) -> Sensor:
    """A sensor of one snapshot: ``source``, ``pointer``."""
    fields: dict[str, Any] = {f"{noun}_sensor": options}
    defs = build_snapshot_defs(config, SnapshotOptions(**fields))
    return Sensor(defs, f"{config.name}_{noun}_sensor", instance)


def schedule_tick(
    defs: dg.Definitions, name: str, instance: dg.DagsterInstance, moment: datetime
) -> list[dg.RunRequest]:
    """Evaluates a schedule as the daemon does at a moment."""
    schedule = defs.resolve_schedule_def(name)
    repository = defs.get_repository_def()
    with dg.build_schedule_context(instance, scheduled_execution_time=moment, repository_def=repository) as context:
        return list(schedule.evaluate_tick(context).run_requests or [])
