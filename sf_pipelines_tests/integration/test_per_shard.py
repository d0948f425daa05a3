"""What a good mean hides: a shard with a bad recall of its own, rows that nobody reaches; and what would pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sf_pipelines import WriteConfig, build_snapshot
from sf_pipelines.snapshot.errors import GateFailedError
from sf_pipelines.snapshot.gate.verdicts import Verdict
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.stages.pipeline import BuildResult
from sf_pipelines_tests.tables import small_config, vector_table, write_source

_DIM = 32


def write(root: Path, vectors: Any) -> None:
    pq.write_table(vector_table(vectors.astype(np.float32), title=["row"] * len(vectors)), root / "source.parquet")


def config(root: Path, num_dbs: int, gate: dict[str, Any] | None = None, **spec: Any) -> WriteConfig:
    fields = {"dim": _DIM, "metric": "l2", **spec}
    return small_config(root, num_dbs=num_dbs, vector_spec=fields, recall_gate=gate or {})


def verdict_of(result: BuildResult, name: str) -> Verdict:
    return next(verdict for verdict in result.verdicts if verdict.name == name)


@pytest.fixture
def minority() -> Float32:
    """98 % of the rows in seven narrow groups, 2 % far apart from each other, over several shards."""
    random = np.random.default_rng(0)
    groups = np.repeat(6 * random.normal(size=(7, _DIM)), 1400, axis=0) + 0.05 * random.normal(size=(9800, _DIM))
    vectors = np.concatenate([groups, 4 * random.normal(size=(200, _DIM))])
    random.shuffle(vectors)
    return vectors.astype(np.float32)


def test_a_minority_with_a_bad_recall_is_seen(tmp_path: Path, minority: Float32) -> None:
    write(tmp_path, minority)
    result = build_snapshot(config(tmp_path, 12), cache_dir=tmp_path / "cache")
    assert result.recall > 0.98
    spread = verdict_of(result, "recall_spread")
    assert not spread.passed
    assert spread.severity == "WARN"
    assert "num_probes" in spread.message
    assert float(spread.figures["worst_lower_bound"]) < 0.8
    weak = [row for row in spread.table if row["lower_bound"] < 0.85]
    # A uniform sample has five of them: shards with few queries get more.
    assert sum(row["queries"] for row in weak) >= 20
    assert {row["db_id"] for row in spread.table} > {row["db_id"] for row in weak}


def test_the_spread_keeps_a_snapshot_back_where_that_is_asked_for(tmp_path: Path, minority: Float32) -> None:
    write(tmp_path, minority)
    with pytest.raises(GateFailedError, match=r"recall_spread: .*shard \d+ .*Nothing is published yet"):
        build_snapshot(config(tmp_path, 12, {"blocking": ["recall_spread"]}), cache_dir=tmp_path / "cache")


def test_even_shards_have_no_spread(tmp_path: Path) -> None:
    write(tmp_path, np.random.default_rng(1).normal(size=(3000, _DIM)))
    result = build_snapshot(config(tmp_path, 4), cache_dir=tmp_path / "cache")
    spread = verdict_of(result, "recall_spread")
    assert spread.passed
    assert [row["db_id"] for row in spread.table] == [0, 1, 2, 3]
    assert all(row["queries"] >= 15 for row in spread.table)
    assert verdict_of(result, "rows_reachable").passed


@pytest.mark.slow
def test_rows_that_a_graph_has_lost_are_named(tmp_path: Path) -> None:
    """Three vectors a thousand times each disconnect others from the graph; the mean recall does not show it."""
    random = np.random.default_rng(0)
    equal = np.repeat(random.normal(size=(3, _DIM)), 1000, axis=0)
    write(tmp_path, np.concatenate([random.normal(size=(3000, _DIM)), equal]))
    result = build_snapshot(config(tmp_path, 4, index_type="hnsw"), cache_dir=tmp_path / "cache")
    assert result.recall > 0.99
    lost = verdict_of(result, "rows_reachable")
    assert not lost.passed
    assert lost.severity == "WARN"
    assert lost.figures["not_found"] == sum(row["not_found"] for row in lost.table) > 0
    assert "not found by their own vector in shards" in lost.message
    # Equal vectors are found: any of them is as near.
    assert int(lost.figures["not_found"]) < 50

    again = {"blocking": ["rows_reachable"]}
    with pytest.raises(GateFailedError, match=rf"rows_reachable: .*Run {result.run_id} keeps serving"):
        build_snapshot(config(tmp_path, 4, again, index_type="hnsw"), cache_dir=tmp_path / "cache")
    fixed = build_snapshot(config(tmp_path, 4, again, index_type="ivf_sq"), cache_dir=tmp_path / "cache")
    assert fixed.published
    assert verdict_of(fixed, "rows_reachable").passed


# What would pass.


def test_a_failed_gate_says_what_would_pass(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    first = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    write_source(tmp_path / "source.parquet", seed=1)
    one: dict[str, Any] = {"dim": 16, "sharding": {"num_probes": 1}}
    strict = small_config(tmp_path, vector_spec=one, recall_gate={"min_recall": 0.96})
    with pytest.raises(GateFailedError) as failed:
        build_snapshot(strict, cache_dir=tmp_path / "cache")
    message = str(failed.value)
    assert "1 of 3 shards) is 0." in message
    assert "of 3 shards would reach" in message
    assert "set num_probes to auto or" in message
    assert f"Run {first.run_id} keeps serving." in message
    passing = int(message.split(" of 3 shards would reach", maxsplit=1)[0].rsplit(" ", 1)[1])
    one["sharding"] = {"num_probes": passing}
    fixed = small_config(tmp_path, vector_spec=one, recall_gate={"min_recall": 0.96})
    assert build_snapshot(fixed, cache_dir=tmp_path / "cache").published


def test_an_index_that_loses_neighbours_is_named_with_the_next_one(tmp_path: Path) -> None:
    """No number of shards helps where the index itself is too coarse, as a graph of few links is."""
    write(tmp_path, np.random.default_rng(0).normal(size=(3000, _DIM)))
    coarse: dict[str, Any] = {"index_type": "hnsw", "index_params": {"m": 4, "ef_construction": 8}}
    with pytest.raises(GateFailedError, match=r"index hnsw loses neighbours: set index_type to hnsw_flat or ivf_flat"):
        build_snapshot(config(tmp_path, 4, {"min_recall": 0.98}, **coarse), cache_dir=tmp_path / "cache")
