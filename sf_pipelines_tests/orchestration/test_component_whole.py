"""The component as a whole: every field can be said in YAML, what is scaffolded builds, tools have nothing to say."""

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest
import yaml
from dagster.components.testing import create_defs_folder_sandbox
from pydantic import BaseModel
from reference import models_of

from sf_pipelines.components import VectorSnapshotComponent
from sf_pipelines.components.vector_snapshot import VectorSnapshotAttributes
from sf_pipelines.orchestration import SnapshotOptions, build_snapshot_defs
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines_tests.orchestration.browser import copy_project, serve, wait_for
from sf_pipelines_tests.orchestration.test_component import ATTRIBUTES, FULL, ROOT, load, load_error
from sf_pipelines_tests.tables import clustered, vector_table

# Together these say every field that there is.
VARIANTS = """\
- vector_spec:
    dim: 8
    vector_col: v
    metric: l2
    backend: lancedb
    index_type: hnsw
    index_params: {num_partitions: 2, m: 8, ef_construction: 100}
    quantization: i8
    sharding: {strategy: cluster, num_probes: auto, training_rows: 900, seed: 1, max_iter: 9}
  id_col: sku
  filter_cols: [section]
  recall_gate: {k: 5, min_recall: 0.9, query_rows: 300, blocking: [recall_spread]}
  drift: {min_overlap: 0.5, max_gone_fraction: 0.5, max_added_fraction: 2, max_changed_fraction: 0.5,
          max_routing_shift: 0.5, blocking: true}
  max_reject_fraction: 0.1
  max_shard_skew: 3
  retrain: never
  batch_rows: 100
  s3: {endpoint_url: "http://s3", region: r, access_key_id: k, secret_access_key: s, session_token: t, timeout: 9,
       retries: 2}
- vector_spec: {dim: 8, sharding: {strategy: lsh, num_probes: 2, num_hash_bits: 4, training_rows: 900, seed: 1}}
  backfill: run_per_shard
  refresh_source: true
  key_prefix: a/b
  group: g
  owners: ["team:x"]
  tags: {tier: gold}
  kinds: [k]
  pool: p
  operations: true
  automation: {interval_seconds: 9, default_status: running}
  schedule: {cron: "0 3 * * *", timezone: Europe/Berlin, force: true, default_status: running}
  cleanup: {cron: "0 5 * * 0", timezone: UTC, keep: 2, older_than_days: 30, stale_after_days: 3, dry_run: false,
            default_status: running}
  source_sensor: {interval_seconds: 9, settle_seconds: 9, default_status: running}
  pointer_sensor: {interval_seconds: 9, default_status: running}
  freshness: {fail_hours: 36, warn_hours: 26}
  executor: {type: multiprocess, max_concurrent: 2}
  s3_resource: {endpoint_url: {env: SOME_VARIABLE}, region_name: r, aws_access_key_id: {env: SOME_VARIABLE},
                aws_secret_access_key: {env: SOME_VARIABLE}, aws_session_token: {env: SOME_VARIABLE}}
- vector_spec: {dim: 8, sharding: {strategy: explicit, shard_id_col: fold}}
- vector_spec:
    dim: 8
    sharding: {strategy: cel, cel_expr: "region", cel_columns: {region: string}, routing_values: [a, b, c]}
- vector_spec:
    dim: 8
    vector_fn: package.module:function
    vector_fn_cols: [title]
    vector_fn_version: "2"
    sharding: {strategy: hash}
  key_value: {key_col: sku, value_cols: [title], key_encoding: utf8}
- key_value: {key_col: sku, value_col: raw}
  engine: {type: local, workers: 2}
- engine: {type: dask, address: "tcp://scheduler:8786"}
- engine: {type: dask, workers: 2}
- engine: {type: ray, address: auto, task_cpus: 2}
- engine: {type: ray, workers: 2}
- engine: {type: spark, address: "local[4]", workers: 2}
"""


def said(model: BaseModel) -> Iterator[tuple[str, str]]:
    """Fields that were given, in a model and below."""
    for name in model.model_fields_set:
        yield type(model).__name__, name
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from said(value)


def test_every_field_can_be_said_in_yaml() -> None:
    found: set[tuple[str, str]] = set()
    for variant in yaml.safe_load(VARIANTS):
        component, made = load(ATTRIBUTES | variant)
        found |= set(said(component.attributes))
        built = "build_a__b__products" if "key_prefix" in variant else "build_products"
        assert built in {job.name for job in made.jobs or ()}
    own = {VectorSnapshotAttributes.__name__: {WriteConfig.__name__, SnapshotOptions.__name__}}
    there = {(owner, name) for model, name in found for owner in own.get(model, {model})}
    missing = [
        f"{model.__name__}.{name}"
        for model in models_of(WriteConfig, SnapshotOptions)
        for name in model.model_fields
        if (model.__name__, name) not in there
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"vector_spec": {"dim": 8, "sharding": {"strategy": "lsh", "num_hash_bits": 99}}}, "vector_spec.sharding"),
        ({"cleanup": {"cron": "0 5 * * 0"}}, "cleanup.keep"),
        ({"cleanup": {"cron": "daily-ish", "keep": 2}}, "cleanup.cron"),
        ({"cleanup": {"cron": "0 5 * * 0", "keep": 2, "timezone": "Mars/Olympus"}}, "cleanup.timezone"),
        ({"cleanup": {"cron": "0 5 * * 0", "keep": 0}}, "cleanup.keep"),
        ({"cleanup": {"cron": "0 5 * * 0", "keep": 2}, "operations": False}, "cleanup"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(change: dict[str, Any], field: str) -> None:
    assert re.search(rf"defs\.yaml:\d+: attributes\.{field}[.\w]*: ", load_error(ATTRIBUTES | change))


@contextmanager
def two_of_one_name(prefix: str | None) -> Iterator[dg.RepositoryDefinition]:
    """A project with two components of one name, the second of them below a prefix."""
    both = {name: value for name, value in FULL.items() if name not in {"key_prefix", "pool"}} | ATTRIBUTES
    with create_defs_folder_sandbox() as sandbox:
        for path, change in (("one", {}), ("two", {"key_prefix": prefix} if prefix else {})):
            sandbox.scaffold_component(
                VectorSnapshotComponent,
                defs_path=path,
                defs_yaml_contents={
                    "type": "sf_pipelines.components.VectorSnapshotComponent",
                    "attributes": both | change,
                },
            )
        with sandbox.build_all_defs() as made:
            yield made.get_repository_def()


def test_two_snapshots_of_one_name_are_refused() -> None:
    with pytest.raises(Exception, match="two") as caught, two_of_one_name(None):
        pass
    assert "products" in "".join(traceback.format_exception(caught.value))


def test_two_snapshots_of_one_name_share_a_project_below_two_prefixes() -> None:
    with two_of_one_name("other/team-2") as found:
        scope = "other__team_2__products"
        for names in (
            set(found.job_names) - {"__ASSET_JOB"},
            {item.name for item in (*found.schedule_defs, *found.sensor_defs)},
            set(found.get_top_level_resources()),
        ):
            below = {name for name in names if scope in name}
            assert {name.replace(scope, "products") for name in below} == names - below
        one, two = (found.get_job(name) for name in ("build_products", f"build_{scope}"))
        assert not {node.name for node in one.all_node_defs} & {node.name for node in two.all_node_defs}
        assert not set(one.asset_layer.executable_asset_keys) & set(two.asset_layer.executable_asset_keys)


def test_what_is_scaffolded_builds(tmp_path: Path) -> None:
    with create_defs_folder_sandbox() as sandbox:
        folder = sandbox.scaffold_component(VectorSnapshotComponent, defs_path="movies")
        attributes = yaml.safe_load((folder / "defs.yaml").read_text())["attributes"]
    component, _ = load(attributes)
    (tmp_path / "data/movies").mkdir(parents=True)
    pq.write_table(vector_table(clustered(400, 384)), tmp_path / "data/movies/rows.parquet")
    made = build_snapshot_defs(component.config(tmp_path), component.options, execute=component.execute)
    assert made.resolve_job_def("build_movies").execute_in_process().success
    assert (tmp_path / "data/movies/snapshot/_CURRENT").is_file()


def warnings_in(text: str) -> list[str]:
    """Lines that warn of something in this package, and errors of any kind."""
    return [
        line
        for line in text.splitlines()
        if re.search(r"Warning:|\bWARNING\b|\bERROR\b|Traceback", line)
        and ("sf_pipelines" in line or "ERROR" in line or "Traceback" in line)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["check defs", "check yaml", "list defs --json"])
def test_dg_has_nothing_to_say(command: str, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("dg")
    env = os.environ | {"PYTHONPATH": str(ROOT), "DAGSTER_HOME": str(tmp_path)}
    done = subprocess.run([script, *command.split()], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert warnings_in(done.stdout + done.stderr) == []


@pytest.mark.slow
def test_dagster_dev_starts_without_a_warning(tmp_path: Path) -> None:
    copy_project(tmp_path / "project")
    with serve(tmp_path / "project") as served:
        log = served.project / "server.log"
        wait_for(lambda: "SensorDaemon" in log.read_text() or "Started" in log.read_text(), seconds=120, what="daemons")
        assert warnings_in(log.read_text()) == []
