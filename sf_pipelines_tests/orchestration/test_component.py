"""The component: YAML in, definitions out, and errors that name the field."""

import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster.components.testing import create_defs_folder_sandbox

from sf_pipelines.components import VectorSnapshotComponent
from sf_pipelines.definitions import defs
from sf_pipelines.snapshot.gate import CHECKS

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
    policies = {graph.get(key).backfill_policy for key in graph.get_all_asset_keys()}
    assert policies == {dg.BackfillPolicy.single_run()}
    assert all(graph.get(key).code_version for key in graph.get_all_asset_keys())


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
    ],
)
def test_a_wrong_field_is_named_at_load(change: dict[str, Any], field: str) -> None:
    assert field in load_error(ATTRIBUTES | change)


def test_a_missing_field_is_named_at_load() -> None:
    assert "num_dbs" in load_error({name: value for name, value in ATTRIBUTES.items() if name != "num_dbs"})


def load_error(attributes: dict[str, Any]) -> str:
    """What a user is told, causes included."""
    with pytest.raises(Exception, match="products") as caught:
        load(attributes)
    return "".join(traceback.format_exception(caught.value))


def test_the_schema_describes_every_field() -> None:
    schema = VectorSnapshotComponent.model().model_json_schema()
    assert set(schema["properties"]) >= {*ATTRIBUTES, "recall_gate", "s3", "backfill", "refresh_source"}
    assert schema["properties"]["num_dbs"]["anyOf"][0]["type"] == "integer"


def test_the_scaffold_is_a_component_that_loads() -> None:
    with create_defs_folder_sandbox() as sandbox:
        folder = sandbox.scaffold_component(VectorSnapshotComponent, defs_path="movies")
        attributes = yaml.safe_load((folder / "defs.yaml").read_text())["attributes"]
    component, _ = load(attributes)
    assert component.attributes.name == "movies"


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
