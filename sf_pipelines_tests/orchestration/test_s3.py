"""Source and store on S3, with credentials from one place and none in the environment."""

import json
import os
from io import BytesIO
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dagster_aws.s3 import S3Resource

from sf_pipelines import ShardedVectorReader
from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines.snapshot.config import S3Options, WriteConfig
from sf_pipelines.snapshot.errors import ConfigError, SfPipelinesError
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.orchestration.conftest import ROWS, failures
from sf_pipelines_tests.orchestration.ticks import Sensor


@pytest.fixture(autouse=True)
def _no_credentials_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)


@pytest.fixture
def s3_fields(moto_options: S3Options, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The YAML of ``s3_resource``; key and secret come from variables that no library knows."""
    monkeypatch.setenv("LAKE_KEY", "test")
    monkeypatch.setenv("LAKE_SECRET", "hush-hush")
    return {
        "endpoint_url": moto_options.endpoint_url,
        "region_name": "us-east-1",
        "aws_access_key_id": {"env": "LAKE_KEY"},
        "aws_secret_access_key": {"env": "LAKE_SECRET"},
    }


@pytest.fixture
def config(bucket: str) -> WriteConfig:
    return WriteConfig(
        name="tiny",
        source=f"s3://{bucket}/lake/*.parquet",
        store=f"s3://{bucket}/serving/tiny",
        num_dbs=2,
        payload_cols=("label",),
        vector_spec={"dim": 64, "vector_col": "pixels"},  # pyright: ignore[reportArgumentType]
        recall_gate={"k": 5, "min_recall": 0.8, "query_rows": 200},  # pyright: ignore[reportArgumentType]
    )


def put(config: WriteConfig, options: S3Options, name: str, table: pa.Table) -> None:
    sink = BytesIO()
    pq.write_table(table, sink)
    Store.open(config.source.rpartition("/")[0], options).put(name, sink.getvalue())


def test_sensors_and_job_share_the_resource_of_the_yaml(
    config: WriteConfig, s3_fields: dict[str, Any], moto_options: S3Options, instance: dg.DagsterInstance
) -> None:
    defs = build_snapshot_defs(
        config,
        s3_resource=s3_fields,
        source_sensor={"settle_seconds": 0},
        pointer_sensor={},
        schedule={"cron": "0 3 * * *"},
    )
    source, pointer = (Sensor(defs, f"tiny_{noun}_sensor", instance) for noun in ("source", "pointer"))
    assert "matches no file" in source.tick().reason
    assert "yet" in pointer.tick().reason
    put(config, moto_options, "one.parquet", digits_table().slice(0, ROWS))

    (request,) = source.tick().requests
    result = source.run(request)

    assert result.success, failures(result)
    # The build has told of its own move.
    assert not pointer.tick().events
    told = instance.get_latest_materialization_event(dg.AssetKey(["tiny", "published_snapshot"]))
    assert told is not None
    assert told.asset_materialization is not None
    metadata = told.asset_materialization.metadata
    assert metadata["dagster/row_count"].value == ROWS
    assert str(metadata["dagster/uri"].value).startswith(config.store)
    events = [event.to_json() for event in instance.all_logs(result.run_id)]
    assert len(events) > 50
    assert "hush-hush" not in "".join(events)
    with ShardedVectorReader(config.store, s3=moto_options) as reader:
        assert reader.search(digits_table()["pixels"][3].as_py(), top_k=1).results[0].id == 3
    # The same bytes written again are the same version on S3.
    put(config, moto_options, "one.parquet", digits_table().slice(0, ROWS))
    assert "Nothing has changed" in source.tick().reason
    put(config, moto_options, "one.parquet", digits_table().slice(0, ROWS - 5))
    (rewritten,) = source.tick().requests
    put(config, moto_options, "one.parquet", digits_table().slice(0, ROWS))
    (back,) = source.tick().requests
    assert len({request.run_key, rewritten.run_key, back.run_key}) == 3
    assert "has not moved" in pointer.tick().reason


@pytest.mark.slow
def test_a_resource_of_the_deployment_is_shared(
    config: WriteConfig, moto_options: S3Options, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKE_SECRET", "test")
    lake = S3Resource(
        endpoint_url=moto_options.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key=dg.EnvVar("LAKE_SECRET"),
    )
    ours = build_snapshot_defs(config, s3_resource="lake", source_sensor={"settle_seconds": 0})
    defs = dg.Definitions.merge(ours, dg.Definitions(resources={"lake": lake}))
    dg.Definitions.validate_loadable(defs)
    put(config, moto_options, "one.parquet", digits_table().slice(0, ROWS))
    sensor = Sensor(defs, "tiny_source_sensor", instance)

    (request,) = sensor.tick().requests
    result = sensor.run(request)

    assert result.success, failures(result)
    with dg.build_resources({"lake": lake}) as found:
        # The very same resource is boto3's.
        listed = found.lake.list_objects_v2(Bucket=config.store.split("/")[2], Prefix="serving/tiny/_CURRENT")
        found.lake.close()
    assert listed["KeyCount"] == 1


@pytest.mark.slow
def test_a_resource_object_is_enough(
    config: WriteConfig, moto_options: S3Options, instance: dg.DagsterInstance
) -> None:
    lake = S3Resource(
        endpoint_url=moto_options.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",  # noqa: S106 - of the test server
    )
    put(config, moto_options, "one.parquet", digits_table().slice(0, ROWS))
    result = (
        build_snapshot_defs(config, s3=lake)
        .resolve_job_def("build_tiny")
        .execute_in_process(instance=instance, raise_on_error=False)
    )
    assert result.success, failures(result)


@pytest.mark.slow
def test_the_environment_is_enough(
    config: WriteConfig, moto_options: S3Options, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(config, moto_options, "one.parquet", digits_table().slice(0, ROWS))
    for name, value in {
        "AWS_ENDPOINT_URL": str(moto_options.endpoint_url),
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }.items():
        monkeypatch.setenv(name, value)
    result = (
        build_snapshot_defs(config)
        .resolve_job_def("build_tiny")
        .execute_in_process(instance=instance, raise_on_error=False)
    )
    assert result.success, failures(result)


def test_without_credentials_the_tick_fails_and_the_cursor_stays(
    config: WriteConfig, s3_fields: dict[str, Any], moto_options: S3Options, instance: dg.DagsterInstance
) -> None:
    put(config, moto_options, "one.parquet", digits_table().slice(0, ROWS))
    defs = build_snapshot_defs(config, s3_resource=s3_fields, source_sensor={"settle_seconds": 0})
    sensor = Sensor(defs, "tiny_source_sensor", instance)
    sensor.tick()
    before = sensor.cursor
    unreachable = s3_fields | {"endpoint_url": "http://127.0.0.1:9"}
    sensor.defs = build_snapshot_defs(config, s3_resource=unreachable, source_sensor={"settle_seconds": 0})
    with pytest.raises(SfPipelinesError, match="lake"):
        sensor.tick()
    assert sensor.cursor == before


def test_secrets_are_read_where_they_are_used_and_are_in_no_definition(
    config: WriteConfig, s3_fields: dict[str, Any]
) -> None:
    defs = build_snapshot_defs(config, s3_resource=s3_fields, source_sensor={}, pointer_sensor={})
    snapshot = defs.get_repository_def().get_top_level_resources()
    assert "hush-hush" not in json.dumps({name: str(vars(resource)) for name, resource in snapshot.items()})
    assert "hush-hush" not in str(defs.get_repository_def().get_job("build_tiny").get_job_snapshot())


def test_a_resource_of_another_kind_is_refused(config: WriteConfig) -> None:
    defs = build_snapshot_defs(config, s3_resource="lake")
    resources = {**(defs.resources or {}), "lake": dg.ResourceDefinition.hardcoded_resource("no credentials")}
    with pytest.raises(Exception, match="executing resource_fn") as caught, dg.build_resources(resources):
        pass
    assert "must name a dagster_aws.s3.S3Resource" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    "given",
    [
        {"s3_resource": "lake", "s3": S3Resource()},
        {"s3_resource": "lake", "config": S3Options(region="eu-west-1")},
        {"s3_resource": {"profile_name": "me"}},
    ],
)
def test_credentials_are_given_once_and_in_known_words(config: WriteConfig, given: dict[str, Any]) -> None:
    own = given.pop("config", None)
    with pytest.raises(ConfigError, match=r"not both|profile_name"):
        build_snapshot_defs(config.model_copy(update={"s3": own}), **given)
