"""The component: YAML in, definitions out, and errors that name the field."""

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import jsonschema
import pyarrow.parquet as pq
import pytest
import yaml
from dagster.components.testing import create_defs_folder_sandbox

from sf_pipelines.components import VectorSnapshotComponent
from sf_pipelines.components.scaffolder import VectorSnapshotScaffolder
from sf_pipelines.components.vector_snapshot import VectorSnapshotAttributes
from sf_pipelines.definitions import defs
from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines.orchestration.graph import Done, StageContext
from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.gate.verdicts import CHECKS
from sf_pipelines_tests.orchestration.conftest import make_config
from sf_pipelines_tests.orchestration.described import describe

ROOT = Path(__file__).parents[2]

ATTRIBUTES: dict[str, Any] = {
    "name": "products",
    "source": "data/products/*.parquet",
    "store": "data/products/snapshot",
    "num_dbs": 3,
    "payload_cols": ["title"],
    "vector_spec": {"dim": 8, "metric": "l2"},
    "source_assets": ["lake/products"],
}


def load(attributes: dict[str, Any]) -> tuple[VectorSnapshotComponent, dg.Definitions]:
    """A component from YAML, through Dagster's own loader."""
    with create_defs_folder_sandbox() as sandbox:
        folder = sandbox.scaffold_component(
            VectorSnapshotComponent,
            defs_path="products",
            defs_yaml_contents={"type": "sf_pipelines.components.VectorSnapshotComponent", "attributes": attributes},
        )
        with sandbox.load_component_and_build_defs(defs_path=folder) as (component, made):
            assert isinstance(component, VectorSnapshotComponent)
            return component, made


def test_the_demos_load() -> None:
    graph = defs().resolve_asset_graph()
    stages = {"source_vectors", "training_data", "routed_vectors", "shard_indexes", "manifest", "current_pointer"}

    assert {key.to_user_string() for key in graph.get_all_asset_keys()} == {
        "digits/table",
        "digits/centroids",
        "digits/published_snapshot",
        "digits_kv/published_snapshot",
        *(f"digits/{noun}" for noun in stages),
        # Keys are sharded by hash, so there is nothing to train.
        *(f"digits_kv/{noun}" for noun in stages),
    }
    assert {(key.asset_key.path[0], key.name) for key in graph.asset_check_keys} == {
        (snapshot, name) for snapshot in ("digits", "digits_kv") for name in CHECKS
    }
    for snapshot in ("digits", "digits_kv"):
        assert dg.AssetKey(["digits", "table"]) in graph.get(dg.AssetKey([snapshot, "source_vectors"])).parent_keys
    assert {graph.get(key).group_name for key in graph.get_all_asset_keys()} == {"digits", "digits_kv"}
    assert graph.get(dg.AssetKey(["digits_kv", "shard_indexes"])).kinds == {"sqlite_vec", "sqlite"}


def test_every_asset_can_be_part_of_a_single_run() -> None:
    graph = defs().resolve_asset_graph()
    policies = {graph.get(key).backfill_policy for key in graph.materializable_asset_keys}
    assert policies == {dg.BackfillPolicy.single_run()}
    assert all(graph.get(key).code_version for key in graph.materializable_asset_keys)


def test_yaml_has_the_fields_of_the_configuration() -> None:
    component, made = load(ATTRIBUTES | {"backfill": "run_per_shard"})

    config = component.config(Path("/srv/project"))
    assert (config.source, config.store) == (
        "/srv/project/data/products/*.parquet",
        "/srv/project/data/products/snapshot",
    )
    assert config.vector_spec.dim == 8
    graph = made.resolve_asset_graph()
    shards = graph.get(dg.AssetKey(["products", "shard_indexes"]))
    assert shards.backfill_policy == dg.BackfillPolicy.multi_run(1)
    assert shards.partitions_def is not None
    assert list(shards.partitions_def.get_partition_keys()) == ["00000", "00001", "00002"]
    assert graph.get(dg.AssetKey(["products", "source_vectors"])).parent_keys == {dg.AssetKey(["lake", "products"])}
    assert made.resolve_job_def("build_products")


def test_templates_are_filled_in_before_values_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS", "5")
    monkeypatch.setenv("SECRET", "hush")
    s3 = {"secret_access_key": "{{ env.SECRET }}", "access_key_id": "key"}
    component, _ = load(ATTRIBUTES | {"num_dbs": "{{ env.SHARDS }}", "source": "s3://lake/x.parquet", "s3": s3})

    assert component.attributes.num_dbs == 5
    assert component.attributes.s3 is not None
    assert component.attributes.s3.secret_access_key is not None
    assert component.attributes.s3.secret_access_key.get_secret_value() == "hush"
    assert component.config(Path("/srv")).source == "s3://lake/x.parquet"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_dbs": 0}, "num_dbs"),
        ({"num_shards": 4}, "num_shards"),
        ({"vector_spec": {"dim": 0}}, "vector_spec.dim"),
        ({"vector_spec": {"dim": 8, "metric": "manhattan"}}, "vector_spec.metric"),
        ({"vector_spec": {"dim": 8, "sharding": {"probes": 2}}}, "vector_spec.sharding.probes"),
        ({"vector_spec": {"dim": 8, "sharding": {"strategy": "random"}}}, "cluster, lsh, explicit, cel, hash"),
        ({"key_value": {"key_col": "id"}}, "key_value"),
        ({"backfill": "weekly"}, "backfill"),
        ({"recall_gate": {"min_recall": 2}}, "recall_gate.min_recall"),
        ({"schedule": {"cron": "never"}}, "schedule.cron"),
        ({"schedule": {"cron": "0 3 * * *", "timezone": "Mars/Olympus"}}, "schedule.timezone"),
        ({"source_sensor": {"settle_seconds": -1}}, "source_sensor.settle_seconds"),
        ({"pointer_sensor": {"every": 3}}, "pointer_sensor.every"),
        ({"freshness": {"fail_hours": 1, "warn_hours": 2}}, "freshness"),
        ({"s3_resource": {"endpoint_url": {"env": "no name"}}}, "s3_resource.endpoint_url.env"),
        ({"executor": "celery"}, "executor"),
        ({"executor": {"type": "multiprocess", "max_concurrent": 0}}, "executor.max_concurrent"),
        ({"s3_resource": {"aws_secret": "x"}}, "s3_resource.aws_secret"),
        ({"s3": {"region": "x"}, "s3_resource": "lake"}, "s3_resource"),
        ({"owners": ["joe"]}, "owners"),
        ({"tags": {"a b": "c"}}, "tags"),
        ({"key_prefix": "a//b"}, "key_prefix"),
        ({"automation": True}, "automation"),
    ],
)
def test_a_wrong_field_is_named_at_load(change: dict[str, Any], field: str) -> None:
    told = load_error(ATTRIBUTES | change)
    assert field in told
    if field != "key_value" and "," not in field and "num_shards" not in field:
        assert re.search(rf"defs\.yaml:\d+: attributes\.{field}: ", told), told


WRONG = """\
# a comment
type: sf_pipelines.components.VectorSnapshotComponent

attributes:
  name: products
  source: data/products/*.parquet
  store: data/products/snapshot
  num_dbs: 3
  vector_spec:
    # another
    dim: eight
  schedule: {cron: "0 3 * * *",
             timezone: Mars/Olympus}
"""


def test_the_line_of_a_wrong_field_is_that_of_the_file() -> None:
    with create_defs_folder_sandbox() as sandbox:
        folder = sandbox.scaffold_component(VectorSnapshotComponent, defs_path="products")
        (folder / "defs.yaml").write_text(WRONG)
        with (
            pytest.raises(Exception, match="products") as caught,
            sandbox.load_component_and_build_defs(defs_path=folder),
        ):
            pass
    told = "".join(traceback.format_exception(caught.value))
    assert "products/defs.yaml:11: attributes.vector_spec.dim: should be a valid integer" in told
    assert "products/defs.yaml:13: attributes.schedule.timezone: is no time zone" in told


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"s3": {"aws_secret_acces_key": "hush-hush"}}, "s3.aws_secret_acces_key"),
        ({"s3": {"secret_access_key": ["hush-hush"]}}, "s3.secret_access_key"),
        ({"s3": {"endpoint_url": "http://key:hush-hush@127.0.0.1"}}, "s3.endpoint_url"),
        ({"s3": "hush-hush"}, "s3"),
        ({"s3_resource": {"secret_access_key": "hush-hush"}}, "s3_resource.secret_access_key"),
        ({"s3_resource": {"aws_secret_access_key": {"env": "hush-hush"}}}, "s3_resource.aws_secret_access_key.env"),
        ({"secret_access_key": "hush-hush"}, "secret_access_key"),
    ],
    ids=str,
)
def test_an_error_at_load_shows_no_secret(change: dict[str, Any], field: str) -> None:
    told = load_error(ATTRIBUTES | change)
    assert field in told
    assert "hush" not in told


def test_a_missing_field_is_named_at_load() -> None:
    fields = {"s3": {"session_token": "hush-hush"}, **ATTRIBUTES}
    told = load_error({name: value for name, value in fields.items() if name != "source"})
    assert re.search(r"defs\.yaml:\d+: attributes\.source: Field required", told)
    assert "hush" not in told


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_dbs": "{{ env('NOT_SET_ANYWHERE') }}"}, "num_dbs"),
        ({"source": "s3://{{ env.NOT_SET_ANYWHERE }}/rows.parquet"}, "source"),
        ({"payload_cols": ["title", "{{ env['NOT_SET_ANYWHERE'] }}"]}, "payload_cols.1"),
        # Without it the environment's own credentials would be taken.
        ({"s3": {"secret_access_key": "{{ env.NOT_SET_ANYWHERE }}"}}, "s3.secret_access_key"),
        ({"schedule": {"cron": "{{ NOT_SET_ANYWHERE }}"}}, "schedule.cron"),
    ],
)
def test_a_variable_that_is_not_set_is_named_at_load(change: dict[str, Any], field: str) -> None:
    told = load_error(ATTRIBUTES | change)
    place = rf"ConfigError: \S+defs\.yaml:\d+: attributes\.{re.escape(field)}: its template cannot be filled in: "
    assert re.search(place + "(environment variable )?'?NOT_SET_ANYWHERE", told)
    assert "ResolutionException" not in told


def test_a_variable_that_may_be_missing_has_a_default() -> None:
    said = {"num_dbs": "{{ env.NOT_SET_ANYWHERE or 5 }}", "store": "{{ env('NOT_SET_ANYWHERE', 'there') }}/snapshot"}
    component, _ = load(ATTRIBUTES | said | {"s3": {"region": "{{ env('NOT_SET_ANYWHERE', none) }}"}})
    assert (component.attributes.num_dbs, component.attributes.store) == (5, "there/snapshot")
    assert component.attributes.s3 is not None
    assert component.attributes.s3.region is None


FULL: dict[str, Any] = {
    "key_prefix": "search/prod-1",
    "group": "vectors",
    "owners": ["team:search", "a@b.org"],
    "tags": {"tier": "gold"},
    "kinds": ["embedding"],
    "pool": "heavy",
    "automation": {},
    "schedule": {"cron": "0 3 * * *", "timezone": "Europe/Berlin", "default_status": "running"},
    "source_sensor": {"interval_seconds": 45, "default_status": "running"},
    "pointer_sensor": {},
    "freshness": {"fail_hours": 36, "warn_hours": 26},
    "s3_resource": {"region_name": "eu-west-1", "aws_secret_access_key": {"env": "LAKE_SECRET"}},
}


def test_every_option_arrives_in_dagster() -> None:
    _, made = load(ATTRIBUTES | FULL)
    graph = made.resolve_asset_graph()
    prefix = ["search", "prod-1", "products"]
    own = [key for key in graph.get_all_asset_keys() if key.path[:3] == prefix]
    assert len(own) == 8
    for key in own:
        node = graph.get(key)
        assert (node.group_name, set(node.owners), node.tags["tier"]) == ("vectors", set(FULL["owners"]), "gold")
        assert "embedding" in node.kinds
        assert (node.automation_condition is not None) == (key.path[-1] != "published_snapshot")
    window = timedelta(hours=36), timedelta(hours=26)
    policy = graph.get(dg.AssetKey([*prefix, "published_snapshot"])).freshness_policy_or_from_metadata
    assert policy == dg.FreshnessPolicy.time_window(*window)
    assert graph.get(dg.AssetKey([*prefix, "current_pointer"])).freshness_policy_or_from_metadata is None
    pools = {
        node.pool
        for node in made.resolve_job_def("build_search__prod_1__products").all_node_defs
        if isinstance(node, dg.OpDefinition)
    }
    assert pools == {None, "heavy"}
    sensors = {f"search__prod_1__products_{noun}_sensor" for noun in ("source", "pointer", "automation")}
    assert {sensor.name for sensor in made.sensors or ()} == sensors
    assert (
        made.resolve_schedule_def("search__prod_1__products_schedule").default_status
        == dg.DefaultScheduleStatus.RUNNING
    )
    source = made.resolve_sensor_def("search__prod_1__products_source_sensor")
    assert (source.minimum_interval_seconds, source.default_status) == (45, dg.DefaultSensorStatus.RUNNING)


def test_freshness_without_a_pointer_sensor_is_that_of_the_pointer() -> None:
    _, made = load(ATTRIBUTES | {"freshness": {"fail_hours": 36}})
    graph = made.resolve_asset_graph()
    assert graph.get(dg.AssetKey(["products", "current_pointer"])).freshness_policy_or_from_metadata is not None


def test_keywords_say_the_same_as_the_yaml() -> None:
    component, made = load(ATTRIBUTES | FULL)
    again = build_snapshot_defs(
        component.config(Path("/srv")), **FULL, source_assets=[dg.AssetKey(["lake", "products"])]
    )
    same = build_snapshot_defs(component.config(Path("/srv")), component.options)
    described = [describe(defs.get_repository_def()) for defs in (made, again, same)]
    assert described[0] == described[1] == described[2]
    with pytest.raises(ConfigError, match="shedule"):
        build_snapshot_defs(component.config(Path("/srv")), shedule={})
    with pytest.raises(ConfigError, match="not both"):
        build_snapshot_defs(component.config(Path("/srv")), component.options, group="x")


class Counting(VectorSnapshotComponent):
    """Adds to what stages do."""

    def execute(self, context: StageContext, stage: str, work: Callable[[], Done]) -> Done:
        done = super().execute(context, stage, work)
        CALLS.append((stage, type(done).__name__))
        return done


CALLS: list[tuple[str, str]] = []


def test_a_subclass_adds_to_what_stages_do(tmp_path: Path) -> None:
    path = tmp_path / "source" / "digits.parquet"
    path.parent.mkdir()
    pq.write_table(digits_table().slice(0, 300), path)
    own = make_config(tmp_path, num_dbs=2).model_dump(exclude={"vector_spec", "recall_gate", "s3"})
    spec = {"dim": 64, "vector_col": "pixels"}
    gate = {"k": 5, "min_recall": 0.5, "query_rows": 200}
    component = Counting(VectorSnapshotAttributes(**own, vector_spec=spec, recall_gate=gate))  # pyright: ignore[reportArgumentType]
    calls = CALLS
    calls.clear()
    made = component.build_defs(dg.ComponentTree.for_test().load_context)
    assert made.resolve_job_def("build_tiny").execute_in_process().success
    assert calls == [
        ("scan", "ScanReceipt"),
        ("sample", "SampleReceipt"),
        ("train", "TrainReceipt"),
        ("route", "RouteReceipt"),
        ("build_shard", "list"),
        ("build_shard", "list"),
        ("assemble", "ManifestReceipt"),
        *[("check", "Verdict")] * len(CHECKS),
        ("promote", "PromoteReceipt"),
    ]


def load_error(attributes: dict[str, Any]) -> str:
    """What a user is told, causes included."""
    with pytest.raises(Exception, match="products") as caught:
        load(attributes)
    return "".join(traceback.format_exception(caught.value))


def test_the_schema_describes_every_field() -> None:
    schema = VectorSnapshotComponent.model().model_json_schema()
    assert set(schema["properties"]) >= {*ATTRIBUTES, "recall_gate", "s3", "backfill", "refresh_source"}
    assert schema["properties"]["num_dbs"]["anyOf"][0]["type"] == "integer"
    assert set(schema["properties"]) == set(VectorSnapshotAttributes.model_fields)
    validator = jsonschema.Draft202012Validator(schema)
    for good in (ATTRIBUTES, ATTRIBUTES | FULL, ATTRIBUTES | {"vector_spec": {"dim": "{{ env.DIM }}"}}):
        assert list(validator.iter_errors(good)) == []
    for bad in ({"num_dbs": "many"}, {"schedule": {"cron": 3}}, {"schedule": {"crom": "x"}}, {"s3_resource": 5}):
        assert list(validator.iter_errors(ATTRIBUTES | bad)), bad


@pytest.mark.parametrize(
    ("wrong", "where", "message"),
    [
        ({"num_dbs": "many"}, "num_dbs", "'auto' was expected"),
        ({"vector_spec": {"dim": 8, "metrc": "l2"}}, "vector_spec", "('metrc' was unexpected)"),
        ({"vector_spec": {"dim": 8, "metric": "l3"}}, "vector_spec/metric", "'l3' is not one of ['cosine', "),
        (
            {"vector_spec": {"dim": 8, "sharding": {"strategy": "lsh", "num_probs": 3}}},
            "vector_spec/sharding",
            "('num_probs' was unexpected)",
        ),
        ({"vector_spec": {"dim": 8, "sharding": {"num_probs": 3}}}, "vector_spec/sharding", "('num_probs' was"),
        ({"vector_spec": {"dim": 8, "sharding": {"strategy": "lhs"}}}, "vector_spec/sharding/strategy", "'lhs' is not"),
        ({"vector_spec": {"dim": 8, "sharding": {"num_probes": 0}}}, "vector_spec/sharding/num_probes", "minimum of 0"),
        ({"recall_gate": {"min_recal": 0.9}}, "recall_gate", "('min_recal' was unexpected)"),
        ({"schedule": {"cron": 3}}, "schedule/cron", "3 is not of type 'string'"),
        ({"engine": {"type": "dask", "adress": "tcp://x"}}, "engine", "('adress' was unexpected)"),
        ({"s3_resource": {"endpoint_url": {"evn": "X"}}}, "s3_resource/endpoint_url", "('evn' was unexpected)"),
    ],
)
def test_the_schema_names_the_nested_field_that_is_wrong(wrong: dict[str, Any], where: str, message: str) -> None:
    """What ``dg check yaml`` prints and marks in the file."""
    validator = jsonschema.Draft202012Validator(VectorSnapshotComponent.model().model_json_schema())
    errors = list(validator.iter_errors(ATTRIBUTES | wrong))
    found = [error.message for error in errors if "/".join(map(str, error.absolute_path)) == where]
    assert message in " ".join(found)
    assert not [error.message for error in errors if "given schemas" in error.message]


def test_the_scaffold_is_a_component_that_loads() -> None:
    with create_defs_folder_sandbox() as sandbox:
        folder = sandbox.scaffold_component(VectorSnapshotComponent, defs_path="movies")
        attributes = yaml.safe_load((folder / "defs.yaml").read_text())["attributes"]
    component, _ = load(attributes)
    assert component.attributes.name == "movies"
    assert component.attributes.schedule is not None
    assert component.attributes.source_sensor is not None


def test_what_the_scaffold_has_in_comments_is_right(tmp_path: Path) -> None:
    no_params: Any = None
    request: Any = dg.ScaffoldRequest(
        type_name="mine.Snapshot",
        target_path=tmp_path / "2 movies",
        scaffold_format="yaml",
        project_root=tmp_path,
        params=no_params,
    )
    request.target_path.mkdir()
    VectorSnapshotScaffolder().scaffold(request)
    written = (request.target_path / "defs.yaml").read_text()
    everything = re.sub(r"^  # (?=[a-z0-9_]+:|  )", "  ", written, flags=re.MULTILINE)
    found = yaml.safe_load(everything)
    assert (found["type"], found["attributes"]["name"]) == ("mine.Snapshot", "_2_movies")
    assert set(found["attributes"]) >= {"automation", "freshness", "executor", "s3_resource", "key_prefix", "pool"}
    VectorSnapshotAttributes(**found["attributes"])


@pytest.mark.slow
def test_dagster_validates_the_workspace(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dagster", "definitions", "validate", "-w", "workspace.yaml"],
        cwd=ROOT,
        env=os.environ | {"DAGSTER_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
