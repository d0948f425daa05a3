"""What only some kinds of snapshots can get wrong, and what notices."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq
import pytest

from sf_pipelines import ShardedVectorReader, UnifiedShardedReader, WriteConfig, build_snapshot
from sf_pipelines.snapshot.errors import GateFailedError
from sf_pipelines.snapshot.manifest.models import Manifest
from sf_pipelines.snapshot.operations.verify import verify_snapshot
from sf_pipelines.snapshot.run.receipts import SampleReceipt
from sf_pipelines_tests.combinations import CHOSEN
from sf_pipelines_tests.integration import test_combinations as combos
from sf_pipelines_tests.tables import vector_table

ROWS, DIM = 300, 8


called_for: list[int] = []


def random_vectors(rows: pa.RecordBatch) -> np.ndarray:
    """Others each time."""
    called_for.append(rows.num_rows)
    return np.random.default_rng().standard_normal((rows.num_rows, DIM))


def make_config(root: Path, *, spec: dict[str, Any] | None = None, **more: Any) -> WriteConfig:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((ROWS, DIM)).astype(np.float32)
    columns = {
        "x": rng.standard_normal(ROWS),
        "region": [f"r{n % 2}" for n in range(ROWS)],
        # A third of the rows has no usable text.
        "label": [None if n % 3 == 0 else str(n) for n in range(ROWS)],
    }
    pq.write_table(vector_table(vectors, **columns), root / "source.parquet")
    fields: dict[str, Any] = {
        "name": "kinds",
        "source": str(root / "source.parquet"),
        "store": str(root / "store"),
        "num_dbs": 2,
        "vector_spec": {"dim": DIM, **(spec or {})},
    }
    return WriteConfig(**(fields | more))


def test_a_function_is_called_once_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it may be a slow one, and one that gives a row another vector each time does no harm."""
    monkeypatch.setattr(sys.modules[__name__], "called_for", [])
    config = make_config(
        tmp_path,
        spec={"vector_fn": "sf_pipelines_tests.integration.test_kinds:random_vectors", "vector_fn_cols": ("x",)},
        key_value={"key_col": "id", "value_col": "label"},
        max_reject_fraction=0.5,
    )
    result = build_snapshot(config, cache_dir=tmp_path / "cache")
    assert result.published
    assert sum(called_for) == ROWS


KEYED: dict[str, Any] = {
    "hash": {},
    "cel": {
        "sharding": {
            "strategy": "cel",
            "cel_expr": "region",
            "cel_columns": {"region": "string"},
            "routing_values": ["r0", "r1"],
        }
    },
}


@pytest.mark.parametrize("kind", KEYED)
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("key_encoding", {"key_encoding": "u32be"}),
        ("custom.vector.index_type", {"custom.vector": {"index_type": "hnsw"}}),
        ("custom.sf_pipelines.filter_columns", {"custom.sf_pipelines": {"filter_columns": {"nope": "int8"}}}),
        ("custom.sf_pipelines.id_type", {"custom.sf_pipelines": {"id_type": "string"}}),
        ("custom.sf_pipelines.build_key", {"custom.sf_pipelines": {"build_key": "zzz"}}),
    ],
)
def test_a_manifest_that_says_something_else_is_not_published(
    kind: str, field: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = import_module("sf_pipelines.snapshot.stages.assemble")
    made = assembly.describe

    def wrong(*arguments: Any) -> Manifest:
        manifest = made(*arguments)
        custom = {
            name: {**value, **change.get(f"custom.{name}", {})} if isinstance(value, dict) else value
            for name, value in manifest.custom.items()
        }
        plain = {name: value for name, value in change.items() if "." not in name}
        return manifest.model_copy(update={"custom": custom, **plain})

    monkeypatch.setattr(assembly, "describe", wrong)
    config = make_config(tmp_path, spec=KEYED[kind], key_value={"key_col": "id", "value_cols": ["x"]})
    with pytest.raises(GateFailedError, match=field):
        build_snapshot(config, cache_dir=tmp_path / "cache")


def test_keys_that_an_expression_leads_astray_fail_the_round_trip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both shards hold rows, but the reader of the gate is sent to the other one."""
    monkeypatch.setattr(UnifiedShardedReader, "get", lambda *_, **__: None)
    config = make_config(tmp_path, spec=KEYED["cel"], key_value={"key_col": "id", "value_cols": ["x"]})
    with pytest.raises(GateFailedError, match="gives nothing with its context"):
        build_snapshot(config, cache_dir=tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("one", CHOSEN[1:7], ids=lambda one: one.name)
def test_every_kind_is_verified_resumed_and_healed(one: Any, tmp_path: Path) -> None:
    combos.write_rows(tmp_path / "source.parquet", one, combos.clustered_vectors())
    config = combos.make_config(tmp_path, one)
    first = build_snapshot(config, cache_dir=tmp_path / "cache")
    found = verify_snapshot(config.store)
    assert found.faults == []
    assert found.rows == combos.ROWS
    assert found.recall is not None
    assert found.recall >= 0.95
    assert not build_snapshot(config, cache_dir=tmp_path / "cache").published

    shard = next(shard for shard in first.shards if shard.rows > 100)
    damaged = tmp_path / "store" / (shard.db_key or "") / shard.objects[0].path
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    assert any(shard.objects[0].path in fault for fault in verify_snapshot(config.store).faults)
    healed = build_snapshot(config, cache_dir=tmp_path / "cache")

    assert healed.published
    assert healed.run_id != first.run_id
    assert verify_snapshot(config.store).faults == []


def test_rejects_of_the_sample_are_counted_by_reason(tmp_path: Path) -> None:
    config = make_config(tmp_path, key_value={"key_col": "id", "value_col": "label"}, max_reject_fraction=0.5)
    result = build_snapshot(config, cache_dir=tmp_path / "cache")
    assert (result.rows, result.rejected) == (200, 100)
    staging = tmp_path / "store" / "staging" / f"run_id={result.run_id}" / "receipts" / "sample"
    receipt = SampleReceipt.model_validate_json(next(staging.glob("*.json")).read_bytes())
    assert receipt.reject_reasons == {"null_value": 100}


def test_files_that_differ_as_exports_do_make_one_snapshot(tmp_path: Path) -> None:
    vectors = np.random.default_rng(3).standard_normal((600, DIM)).astype(np.float32)
    lake = tmp_path / "lake"
    lake.mkdir()
    one = {"id": pa.array(range(200), pa.int32()), "vector": vectors[:200].tolist(), "title": ["a"] * 200}
    pq.write_table(pa.table(one | {"price": pa.array([1] * 200, pa.int16())}), lake / "1.parquet", row_group_size=70)
    two = pa.table(
        {
            "price": pa.nulls(200),
            "id": pa.array(range(200, 400), pa.uint64()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors[200:400].ravel()), DIM),
        }
    )
    with pa_ipc.new_stream(str(lake / "2.arrows"), two.schema) as stream:
        stream.write_table(two, max_chunksize=90)
    frame = pd.DataFrame({"title": pd.Categorical(["c"] * 200), "price": np.float32(0.5)})
    frame["vector"] = vectors[400:].astype(np.float64).tolist()
    frame.set_index(pd.RangeIndex(400, 600, name="id")).to_parquet(lake / "3.parquet")
    pq.write_table(pa.table({"id": pa.nulls(0), "vector": pa.nulls(0)}), lake / "4.parquet")
    config = make_config(tmp_path, source=str(lake), payload_cols=("title", "price"), filter_cols=("price",))
    assert build_snapshot(config, cache_dir=tmp_path / "cache").published
    assert verify_snapshot(tmp_path / "store").passed
    with ShardedVectorReader(tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        found = [reader.search(vectors[row], top_k=1).results[0] for row in (7, 207, 407)]
    assert [hit.id for hit in found] == [7, 207, 407]
    assert [hit.payload for hit in found] == [
        {"title": "a", "price": 1.0},
        {"title": None, "price": None},
        {"title": "c", "price": 0.5},
    ]
    assert not build_snapshot(config, cache_dir=tmp_path / "cache").published
