"""Everything that a deployment's definitions say, as plain values that can be compared."""

from typing import Any

import dagster as dg


def describe(repository: dg.RepositoryDefinition) -> dict[str, Any]:
    """Assets, checks, jobs, schedules and sensors by name."""
    graph = repository.asset_graph
    return {
        "assets": {key.to_user_string(): _asset(graph, key) for key in sorted(graph.get_all_asset_keys())},
        "checks": {
            f"{key.asset_key.to_user_string()}:{key.name}": "blocks" if graph.get(key).blocking else "warns"
            for key in sorted(graph.asset_check_keys)
        },
        "jobs": {job.name: _job(job) for job in repository.get_all_jobs() if not job.name.startswith("__")},
        "schedules": {
            schedule.name: {
                "job": schedule.job_name,
                "cron": schedule.cron_schedule,
                "timezone": schedule.execution_timezone,
                "status": schedule.default_status.value,
            }
            for schedule in repository.schedule_defs
        },
        "sensors": {sensor.name: _sensor(sensor) for sensor in repository.sensor_defs},
        "resources": sorted(repository.get_top_level_resources()),
    }


def _asset(graph: Any, key: dg.AssetKey) -> dict[str, Any]:
    node = graph.get(key)
    freshness = node.freshness_policy_or_from_metadata
    partitions = node.partitions_def
    return {
        "after": sorted(parent.to_user_string() for parent in node.parent_keys),
        "group": node.group_name,
        "kinds": sorted(node.kinds),
        "owners": sorted(node.owners),
        "tags": {name: value for name, value in sorted(node.tags.items()) if not name.startswith("dagster/")},
        "partitions": list(partitions.get_partition_keys()) if partitions else None,
        "backfill": str(node.backfill_policy.policy_type.value) if node.backfill_policy else None,
        "executable": node.is_executable,
        "automation": node.automation_condition is not None,
        "freshness": str(freshness) if freshness else None,
    }


def _job(job: dg.JobDefinition) -> dict[str, Any]:
    return {
        "assets": sorted(key.to_user_string() for key in job.asset_layer.executable_asset_keys),
        "tags": dict(sorted(job.tags.items())),
        "pools": sorted({node.pool for node in job.all_node_defs if isinstance(node, dg.OpDefinition) and node.pool}),
    }


def _sensor(sensor: dg.SensorDefinition) -> dict[str, Any]:
    return {
        "type": sensor.sensor_type.value,
        "job": sensor.job_name if sensor.has_jobs else None,
        "interval": sensor.minimum_interval_seconds,
        "status": sensor.default_status.value,
    }
