"""An example of each kind of snapshot: its YAML is loaded by Dagster's own loader, built by its job, and searched."""

from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sf_pipelines import ShardedVectorReader, UnifiedShardedReader
from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines_tests.format_checker.checker import assert_format
from sf_pipelines_tests.orchestration.conftest import failures
from sf_pipelines_tests.orchestration.test_component import load

QUICK = {"cel_lancedb", "unified_hash_sqlite_vec"}
EXAMPLES = sorted(path.parent.name for path in (Path(__file__).parent / "examples").glob("*/defs.yaml"))
ROWS = 450
TRAINED = {"cluster": {"centroids"}, "lsh": {"hyperplanes"}}
ALWAYS = {"source_vectors", "training_data", "routed_vectors", "shard_indexes", "manifest", "current_pointer"}


def write_source(path: Path) -> pa.Table:
    table = digits_table().slice(0, ROWS)
    labels = table.column("label").to_numpy()
    extra = {
        "fold": pa.array(labels % 3),
        "parity": pa.array(["odd" if label % 2 else "even" for label in labels]),
        "name": pa.array([f"digit {label}" for label in labels]),
    }
    for name, column in extra.items():
        table = table.append_column(name, column)
    path.parent.mkdir(parents=True)
    pq.write_table(table, path)
    return table


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in EXAMPLES]
)
def test_an_example_loads_builds_and_answers(name: str, tmp_path: Path, instance: dg.DagsterInstance) -> None:
    written = yaml.safe_load((Path(__file__).parent / "examples" / name / "defs.yaml").read_text())
    component, _ = load(written["attributes"])
    config = component.config(tmp_path)
    table = write_source(tmp_path / "source" / "digits.parquet")

    defs = build_snapshot_defs(config)
    nouns = {key.path[-1] for key in defs.resolve_asset_graph().get_all_asset_keys()}
    assert nouns == ALWAYS | TRAINED.get(config.sharding.strategy, set())
    result = defs.resolve_job_def(f"build_{name}").execute_in_process(instance=instance, raise_on_error=False)

    assert result.success, failures(result)
    assert_format(config.store)
    pixels = np.stack(table.column("pixels").to_numpy()).astype(np.float32)
    face = ShardedVectorReader if config.key_value is None else UnifiedShardedReader
    with face(config.store, cache_dir=tmp_path / "cache") as reader:
        details = reader.shard_details()
        assert sum(shard.vector_count for shard in details) == ROWS
        filled = [shard.db_id for shard in details if shard.vector_count]
        hits = reader.search(pixels[7], top_k=3, shard_ids=filled).results
        assert hits[0].id == 7 or config.vector_spec.metric == "dot_product"
        assert all(hit.payload == {"label": table.column("label")[hit.id].as_py()} for hit in hits)
