"""Snapshots of frames: what an engine writes once gives the shards that files give."""

import importlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sf_pipelines import ShardedVectorReader, UnifiedShardedReader, WriteConfig, build_snapshot
from sf_pipelines.engines.frames import build_from_frame, frame_columns, write_part
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import (
    ConfigError,
    DataContractError,
    SourceEmptyError,
    SourceSchemaError,
    TaskCrashedError,
    VectorFunctionError,
    WorkerLostError,
)
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.operations.cleanup import CleanupRules, plan_cleanup
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import SampleReceipt
from sf_pipelines.snapshot.stages.pipeline import BuildResult
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.engines import misbehaving
from sf_pipelines_tests.engines.misbehaving import Misbehaving
from sf_pipelines_tests.tables import clustered

_ROWS, _DIM = 1500, 16
_REASONS = {"null_vector": 1, "not_finite": 1, "wrong_dimension": 1, "duplicate_id": 1}


def table() -> pa.Table:
    """Rows with one of each fault; the second row of id 20 is the last one."""
    vectors: list[Any] = clustered(_ROWS, _DIM).tolist()
    vectors[7], vectors[8] = None, [float("nan"), *vectors[8][1:]]
    vectors[9] = vectors[9][:-1]
    ids = np.arange(_ROWS)
    ids[-1] = 20
    titles = [f"row {n}" for n in range(_ROWS)]
    # Types that not every engine knows.
    sizes = pa.array(ids % 250, pa.uint8())
    return pa.table({"id": ids, "vector": pa.array(vectors, pa.list_(pa.float32())), "title": titles, "size": sizes})


def settings(root: Path, **more: Any) -> WriteConfig:
    shared: dict[str, Any] = {
        "name": "framed",
        "source": "a frame",
        "store": str(root / "framed"),
        "num_dbs": 4,
        "vector_spec": {"dim": _DIM},
        "max_reject_fraction": 0.01,
        "recall_gate": {"query_rows": 200},
    }
    return WriteConfig(**(shared | more))


def from_files(root: Path, config: WriteConfig, rows: pa.Table) -> BuildResult:
    pq.write_table(rows, root / "rows.parquet", row_group_size=400)
    where = {"source": str(root / "rows.parquet"), "store": str(root / "filed")}
    return build_snapshot(config.model_copy(update=where))


def assert_same(ours: BuildResult, theirs: BuildResult) -> None:
    assert ours.published
    assert [(shard.rows, shard.rows_digest) for shard in ours.shards] == [
        (shard.rows, shard.rows_digest) for shard in theirs.shards
    ]


def staged(config: WriteConfig) -> list[str]:
    return [info.key for info in Store.open(config.store).objects("staging/frames")]


# Clusters of two workers.


def dask_frame(rows: pa.Table) -> Any:
    """Three partitions; columns stay Arrow's."""
    import pandas as pd
    from dask.dataframe import from_pandas

    return from_pandas(rows.to_pandas(types_mapper=pd.ArrowDtype), npartitions=3)


def ray_frame(rows: pa.Table) -> Any:
    """Two blocks."""
    import ray.data

    return ray.data.from_arrow([rows.slice(0, 700), rows.slice(700)])


def spark_frame(engine: Any, rows: pa.Table) -> Any:
    """Two partitions. Spark has no unsigned numbers."""
    return engine.session.createDataFrame(rows.select(["id", "vector", "title"])).coalesce(2)


class Cluster(NamedTuple):
    """A cluster.

    Attributes:
        frame: a table as the engine's own frame of several partitions.
        write: its ``write_sharded``.
        retries: whether it runs tasks again whose worker is lost.
    """

    frame: Callable[[pa.Table], Any]
    write: Callable[..., BuildResult]
    retries: bool


@pytest.fixture(scope="module", params=["dask", "ray", "spark", "connect"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with request.getfixturevalue(f"{request.param}_engine")() as engine:
        frame = {"dask": dask_frame, "ray": ray_frame}.get(request.param, partial(spark_frame, engine))
        write = importlib.import_module(f"sf_pipelines.engines.{engine.name}").write_sharded
        yield Cluster(frame, write, retries=engine.name != "spark")


@pytest.mark.slow
def test_a_frame_gives_what_files_give(cluster: Cluster, tmp_path: Path) -> None:
    config = settings(tmp_path, payload_cols=("title",))
    made = cluster.write(cluster.frame(table()), config)
    assert_same(made, from_files(tmp_path, config, table()))
    sampled = Ledger(Store.open(config.store), made.run_id).need(SampleReceipt)
    assert sampled.reject_reasons == _REASONS
    assert staged(config) == []
    with ShardedVectorReader(config.store) as reader:
        found = reader.search(np.asarray(table()["vector"][3].as_py(), np.float32), top_k=1).results[0]
    assert (found.id, found.payload) == (3, {"title": "row 3"})


@pytest.mark.slow
def test_unified_by_hash_on_s3(cluster: Cluster, bucket: str, moto_options: S3Options, tmp_path: Path) -> None:
    more = {"vector_spec": {"dim": _DIM, "backend": "sqlite-vec"}, "s3": moto_options}
    config = settings(tmp_path, key_value={"key_col": "id", "value_cols": ("title",)}, **more)
    on_s3 = config.model_copy(update={"store": f"s3://{bucket}/framed"})
    assert_same(cluster.write(cluster.frame(table()), on_s3), from_files(tmp_path, config, table()))
    with UnifiedShardedReader(on_s3.store, s3=moto_options, cache_dir=tmp_path / "cache") as reader:
        # Of two rows with the same key the first one counts.
        assert b"row 20" in (reader.get(20) or b"")


@pytest.mark.slow
def test_what_a_worker_refuses_is_said_and_nothing_is_published(cluster: Cluster, tmp_path: Path) -> None:
    config = settings(tmp_path, max_reject_fraction=0.0)
    with pytest.raises(DataContractError, match="4 of 1500"):
        cluster.write(cluster.frame(table()), config)
    with pytest.raises((VectorFunctionError, TaskCrashedError), match="vector_fn failed with ValueError: boom"):
        cluster.write(cluster.frame(table()), config, vector_fn=broken)
    assert read_pointer(Store.open(config.store)).pointer is None


@pytest.mark.slow
def test_a_worker_is_lost_while_the_frame_is_written(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask and Ray do its work again; a Spark of one machine does not, and says so."""
    fields: dict[str, Any] = {**dict(settings(tmp_path)), "folder": tmp_path}
    config, rows = Misbehaving(**fields), table()
    # As its workers do: driver and workers cut the source alike.
    monkeypatch.setattr(misbehaving.CUTTER, "_RANGE_BYTES", misbehaving.RANGE_BYTES)
    (tmp_path / "die").write_text("staging/frames/")
    if cluster.retries:
        assert_same(cluster.write(cluster.frame(rows), config), from_files(tmp_path, settings(tmp_path), rows))
    else:
        with pytest.raises(WorkerLostError, match="on Spark"):
            cluster.write(cluster.frame(rows), config)
        assert read_pointer(Store.open(config.store)).pointer is None
    assert (tmp_path / "dead").exists()


def broken(rows: pa.RecordBatch) -> Any:
    raise ValueError("boom")


# The same without a cluster.


def here(config: WriteConfig, rows: pa.Table, vector_fn: Any = None) -> BuildResult:
    """All that workers do, one after the other."""

    def stage(folder: str) -> list[str]:
        halves = [rows.slice(0, 800), rows.slice(800)]
        keys = [write_part(config, folder, vector_fn, half.to_batches()) for half in halves]
        # A task that everybody has forgotten writes its part again.
        write_part(config, folder, vector_fn, halves[0].to_batches())
        return [key for key in keys if key is not None]

    return build_from_frame(config, vector_fn, None, stage)


def test_a_forgotten_part_is_ignored_and_all_are_removed(tmp_path: Path) -> None:
    config = settings(tmp_path, filter_cols=("size",))
    assert_same(here(config, table()), from_files(tmp_path, config, table()))
    assert staged(config) == []


def test_the_parts_of_a_failed_build_stay_until_they_are_stale(tmp_path: Path) -> None:
    config = settings(tmp_path, max_reject_fraction=0.0)
    with pytest.raises(DataContractError, match="4 of 1500"):
        here(config, table())
    # Whoever looks at the rejects finds the rows; when they are old, a cleanup removes them.
    assert len(staged(config)) == 3
    store, rules = (
        Store.open(config.store),
        CleanupRules(keep=1, older_than=timedelta(0), stale_after=timedelta(days=1)),
    )
    assert not [group for group in plan_cleanup(store, rules).groups if group.rule == "frames"]
    later = plan_cleanup(store, rules, now=datetime.now(UTC) + timedelta(days=2))
    assert sum(group.objects for group in later.groups if group.rule == "frames") == 3
    assert not later.left_alone


def test_vectors_may_come_from_a_function(tmp_path: Path) -> None:
    config, rows = settings(tmp_path), table()
    made = here(
        config, rows.rename_columns(["id", "embedded", "title", "size"]), lambda batch: batch.column("embedded")
    )
    assert_same(made, from_files(tmp_path, config, rows))
    named = config.vector_spec.model_copy(update={"vector_fn": "a:b", "vector_fn_cols": ("title",)})
    with pytest.raises(ConfigError, match="leave one of them out"):
        here(config.model_copy(update={"vector_spec": named}), rows, broken)


def test_a_frame_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with pytest.raises(SourceSchemaError, match="no column vector; it has id"):
        frame_columns(config, ["id"], None)
    with pytest.raises(SourceEmptyError, match="has no rows"):
        here(config, table().slice(0, 0))


def test_tensors_become_lists(tmp_path: Path) -> None:
    config, store = settings(tmp_path), Store.open(tmp_path / "framed", create=True)
    vectors = clustered(5, _DIM)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(vectors)
    batches = [
        pa.record_batch({"id": pa.array(range(5)), "vector": tensors}),
    ]
    for batch in batches:
        key = write_part(config, "staging/frames/x", None, [batch])
        assert key is not None
        with store.open_file(key) as raw:
            column = pq.read_table(raw)["vector"]
        assert column.type.value_type == pa.float32()
        assert column.to_pylist() == vectors.tolist()
