"""One snapshot's Dagster definitions from its configuration, without YAML."""

from collections.abc import Iterator, Sequence
from datetime import UTC
from typing import TYPE_CHECKING, Any

import dagster as dg

from sf_pipelines.orchestration.assets import build_assets, build_checks, build_now_job
from sf_pipelines.orchestration.graph import Execute, Graph, beta_accepted, execute_stage
from sf_pipelines.orchestration.io_manager import reference_io_manager
from sf_pipelines.orchestration.operations import CleanupConfig, build_operation_jobs
from sf_pipelines.orchestration.options import CleanupScheduleOptions, ScheduleOptions, SnapshotOptions
from sf_pipelines.orchestration.pointer_sensor import build_pointer_sensor, build_published_snapshot
from sf_pipelines.orchestration.resources import snapshot_resource
from sf_pipelines.orchestration.shards import build_shard_indexes
from sf_pipelines.orchestration.source_sensor import build_source_sensor
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.routing import needs_training
from sf_pipelines.snapshot.run.build import Build

if TYPE_CHECKING:
    from dagster_aws.s3 import S3Resource


def build_snapshot_defs(
    config: WriteConfig,
    options: SnapshotOptions | None = None,
    *,
    s3: "S3Resource | None" = None,
    execute: Execute = execute_stage,
    **fields: Any,
) -> dg.Definitions:
    """Assets, checks, jobs, schedules, sensors and resources of one snapshot.

    Merge the definitions of several snapshots with ``Definitions.merge``.

    Args:
        config: the snapshot.
        options: how it sits in Dagster.
        s3: credentials for source and store, as a resource object.
        execute: does the work of each stage; wrap it to add something before or after.
        **fields: fields of ``SnapshotOptions``, where ``options`` is not given: ``build_snapshot_defs(config,
            source_assets=["lake/products"], schedule={"cron": "0 3 * * *"})``. A source asset may also be an
            ``AssetKey`` or a list of its parts.

    Raises:
        ConfigError: an option is unknown or wrong, options or credentials are given twice, or the sharding expression
            does not compile.
    """
    if options is not None and fields:
        raise ConfigError(f"give options or the fields {', '.join(sorted(fields))}, not both")
    chosen = options or SnapshotOptions(**fields)
    credentials = {"the configuration's s3": config.s3, "s3": s3, "s3_resource": chosen.s3_resource}
    given = [name for name, value in credentials.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"snapshot {config.name!r}: give S3 credentials by {' or by '.join(given)}, not both")
    if not needs_training(config.sharding):
        # An expression that does not compile fails here, when the definitions are loaded.
        Build(config.sized(config.shard_count or 1)).routing(None)
    graph = Graph(config, chosen, execute)
    upstream = [dg.AssetKey(item.split("/")) for item in chosen.source_assets]
    with beta_accepted():
        assets = [*build_assets(graph, upstream), build_shard_indexes(graph)]
    own = [key for asset in assets for key in asset.keys]
    snapshot = snapshot_resource(config, s3 or chosen.s3_resource, chosen.engine)
    return dg.Definitions(
        assets=[*assets, *([build_published_snapshot(graph)] if chosen.pointer_sensor else [])],
        asset_checks=[build_checks(graph)],
        jobs=[
            dg.define_asset_job(
                graph.job("build"),
                selection=dg.AssetSelection.assets(*own, *(upstream if chosen.refresh_source else [])),
                # A run without partitions does everything: all shards, unpartitioned assets and checks.
                tags=graph.run_tags,
                executor_def=graph.executor,
                description=f"Builds the snapshot {graph.config.name!r} in one run: source, shards, manifest, checks, "
                "pointer.",
            ),
            build_now_job(graph),
            *(build_operation_jobs(graph) if chosen.operations else []),
        ],
        schedules=list(_schedules(graph)),
        sensors=list(_sensors(graph, own)),
        resources={graph.resource: snapshot, graph.io_manager: reference_io_manager(graph.resource)},
    )


def _schedules(graph: Graph) -> Iterator[dg.ScheduleDefinition]:
    options = graph.options
    if options.schedule:
        forced = {"ops": {graph.asset("source_vectors").to_python_identifier(): {"config": {"force": True}}}}
        yield _schedule(
            graph.part("schedule"),
            graph.job("build"),
            options.schedule,
            f"Builds the snapshot {graph.config.name!r}"
            + (", also when nothing is new." if options.schedule.force else "; publishes nothing when nothing is new."),
            run_key=graph.scope,
            tags=graph.run_tags,
            run_config=forced if options.schedule.force else None,
        )
    if options.cleanup:
        config = options.cleanup.model_dump(include=set(CleanupConfig.model_fields))
        yield _schedule(
            graph.part("cleanup_schedule"),
            graph.job("cleanup"),
            options.cleanup,
            f"{'Shows' if options.cleanup.dry_run else 'Removes'} what is no longer needed of {graph.config.name!r}.",
            run_key=graph.job("cleanup"),
            run_config={"ops": {graph.part("cleanup"): {"config": config}}},
        )


def _schedule(
    name: str, job: str, options: ScheduleOptions | CleanupScheduleOptions, text: str, *, run_key: str, **request: Any
) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=name,
        job_name=job,
        cron_schedule=options.cron,
        execution_timezone=options.timezone,
        default_status=dg.DefaultScheduleStatus[options.default_status.upper()],
        description=text,
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        moment = context.scheduled_execution_time.astimezone(UTC)
        # The key makes one run of a tick that is evaluated more than once.
        return dg.RunRequest(run_key=f"{run_key}:{moment:%Y-%m-%dT%H:%M:%SZ}", **request)

    return schedule


def _sensors(graph: Graph, own: Sequence[dg.AssetKey]) -> Iterator[dg.SensorDefinition]:
    options = graph.options
    if options.source_sensor:
        yield build_source_sensor(graph, options.source_sensor, own)
    if options.pointer_sensor:
        yield build_pointer_sensor(graph, options.pointer_sensor)
    if options.automation:
        yield dg.AutomationConditionSensorDefinition(
            graph.part("automation_sensor"),
            target=dg.AssetSelection.assets(*own),
            minimum_interval_seconds=options.automation.interval_seconds,
            default_status=options.automation.dagster_status,
            description=f"Requests assets of {graph.config.name!r} when what they build on is new.",
        )
