"""Builds whose number of shards is ``auto``."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sf_pipelines import ShardedVectorReader, WriteConfig, build_snapshot
from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.operations.rollback import rollback
from sf_pipelines.snapshot.run import sizing
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import SampleReceipt, ScanReceipt
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.tables import small_config, vector_table, write_source


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is full with 100 rows."""
    monkeypatch.setattr(sizing, "ROWS", 100)


def config(root: Path, **more: Any) -> WriteConfig:
    return small_config(root, **{"num_dbs": "auto", **more})


def build(root: Path, rows: int, **more: Any) -> Any:
    write_source(root / "source.parquet", rows)
    return build_snapshot(config(root, **more), cache_dir=root / "cache")


def shards_of(root: Path) -> int:
    with ShardedVectorReader(root / "store", cache_dir=root / "reader") as reader:
        vectors = pq.read_table(root / "source.parquet")["vector"]
        assert reader.search(vectors[7].as_py(), top_k=1).results[0].id == 7
        return reader.snapshot_info().num_dbs


def scan_of(root: Path, run_id: str) -> ScanReceipt:
    return Ledger(Store.open(root / "store"), run_id).need(ScanReceipt)


def test_a_small_table_is_one_shard(tmp_path: Path) -> None:
    first = build(tmp_path, 600)
    assert (len(first.shards), shards_of(tmp_path)) == (1, 1)
    assert scan_of(tmp_path, first.run_id).sizing == "num_dbs auto: 1 for 600 rows x 16 and 0.1 MiB of files"


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_the_number_follows_the_source_at_leisure(tmp_path: Path) -> None:
    first = build(tmp_path, 600)
    assert shards_of(tmp_path) == 8
    same = build_snapshot(config(tmp_path), cache_dir=tmp_path / "cache")
    assert (same.published, same.run_id) == (False, first.run_id)
    # 3.2 shards' worth would be 4 of them; 8 are kept, as 3.2 is not below their half by enough... until it is.
    kept = build(tmp_path, 420)
    assert (kept.published, shards_of(tmp_path)) == (True, 8)
    assert scan_of(tmp_path, kept.run_id).sizing.endswith("as in the current snapshot (the rule alone says 4)")
    build(tmp_path, 390)
    assert shards_of(tmp_path) == 4
    forced = build_snapshot(config(tmp_path), cache_dir=tmp_path / "cache", force=True)
    assert (forced.published, shards_of(tmp_path)) == (True, 4)


@pytest.mark.usefixtures("few_rows")
def test_a_hold_covers_a_build_whatever_its_number(tmp_path: Path) -> None:
    first = build(tmp_path, 200)
    second = build(tmp_path, 450)
    assert [len(first.shards), len(second.shards)] == [2, 4]
    third = build(tmp_path, 390)
    assert len(third.shards) == 4
    rollback(tmp_path / "store", to=first.run_id)
    # From two shards the rule would keep two for these rows; it is the same build all the same.
    again = build_snapshot(config(tmp_path), cache_dir=tmp_path / "cache")
    assert (again.published, again.held, len(again.shards)) == (False, True, 4)


@pytest.mark.usefixtures("few_rows")
def test_shards_are_copied_where_the_number_stays(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet", 800)
    build_snapshot(config(tmp_path), cache_dir=tmp_path / "cache")
    table = pq.read_table(tmp_path / "source.parquet")
    pq.write_table(table.slice(0, 799), tmp_path / "source.parquet")
    second = build_snapshot(config(tmp_path), cache_dir=tmp_path / "cache")
    assert len(second.shards) == 8
    assert sum(shard.reused is not None for shard in second.shards) == 7


@pytest.mark.usefixtures("few_rows")
def test_more_probes_than_shards_is_told_before_any_work(tmp_path: Path) -> None:
    spec = {"dim": 16, "sharding": {"num_probes": 5}}
    with pytest.raises(ConfigError, match="num_probes 5 is more than num_dbs 4, which auto has chosen"):
        build(tmp_path, 400, vector_spec=spec)
    assert not list((tmp_path / "store").rglob("*.arrow"))


@pytest.mark.parametrize("strategy", ["lsh", "hash"])
@pytest.mark.usefixtures("few_rows")
def test_other_strategies(tmp_path: Path, strategy: str) -> None:
    keyed: dict[str, Any] = {"key_value": {"value_cols": ["title"], "key_col": "id"}} if strategy == "hash" else {}
    found = build(tmp_path, 400, vector_spec={"dim": 16, "sharding": {"strategy": strategy}}, **keyed)
    assert len(found.shards) == 4


def test_equal_rows_are_counted(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(1000, 16)).astype(np.float32)
    vectors[:300] = vectors[:3].repeat(100, axis=0)
    vectors[300:400] = vectors[400:500]
    pq.write_table(vector_table(vectors, title=["row"] * 1000), tmp_path / "source.parquet")
    made = build_snapshot(config(tmp_path), cache_dir=tmp_path / "cache")
    receipt = Ledger(Store.open(tmp_path / "store"), made.run_id).need(SampleReceipt)
    assert receipt.repeated == pytest.approx(0.5)
