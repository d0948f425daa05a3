"""From the writer to every reader on local disk, without any object store: ids, payloads, values, health."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sf_pipelines import WriteConfig, build_snapshot
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines_tests.faces import Face, unified_reader, vector_reader
from sf_pipelines_tests.snapshots import brute_force, clustered
from sf_pipelines_tests.tables import vector_table

ROWS, DIM, SHARDS = 60, 8, 2
VECTORS = clustered(ROWS, DIM)
QUERIES = clustered(4, DIM, seed=8)
IDS: dict[str, list[Any]] = {
    "int": [n - 7 for n in range(ROWS)],
    "string": [f"row é {n}" for n in range(ROWS)],
    "digits": [f"{n:03d}" for n in range(ROWS)],
}


@pytest.fixture(autouse=True)
def no_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"an object store was asked for: {arguments} {options}")

    monkeypatch.setattr("sf_pipelines.snapshot.store.s3_client", refuse)


def write(root: Path, ids: list[Any], backend: str, *, unified: bool = False, column: str = "vector") -> Path:
    table = vector_table(VECTORS, ids, title=[f"title {n}" for n in range(ROWS)])
    if column != "vector":
        # Whoever took any other column than the named one would read these.
        wrong = vector_table(VECTORS[::-1].copy()).column("vector")
        table = table.rename_columns({"vector": column}).append_column("vector", wrong)
    pq.write_table(table, root / "source.parquet", row_group_size=25)
    fields: dict[str, Any] = {
        "vector_spec": {"dim": DIM, "metric": "l2", "backend": backend, "vector_col": column},
        "recall_gate": {"k": 3, "min_recall": 0.5},
    }
    if unified:
        fields["key_value"] = {"key_col": "id", "value_cols": ["title"]}
    else:
        fields["payload_cols"] = ("title",)
    config = WriteConfig(
        name="trip",
        source=str(root / "source.parquet"),
        store=str(root / "store"),
        num_dbs=SHARDS,
        **fields,
    )
    build_snapshot(config, cache_dir=root / "built")
    return root / "store"


def right(reader: Any, ids: list[Any]) -> None:
    """Answers are those of brute force, ids with the type that they were written with."""
    found, scores = brute_force(QUERIES, VECTORS, DistanceMetric.L2, 5)
    answers = reader.batch_search(QUERIES, 5, shard_ids=list(range(SHARDS)), include_vectors=True)
    for answer, places, distances in zip(answers, found, scores, strict=True):
        assert [hit.id for hit in answer.results] == [ids[place] for place in places]
        assert {type(hit.id) for hit in answer.results} == {type(ids[0])}
        np.testing.assert_allclose([hit.score for hit in answer.results], distances, rtol=1e-6)
        np.testing.assert_array_equal(np.stack([hit.vector for hit in answer.results]), VECTORS[places])


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("backend", ["lancedb", "sqlite-vec"])
def test_ids_come_back_as_they_went_in(tmp_path: Path, backend: str, kind: str) -> None:
    ids = IDS[kind]
    root = write(tmp_path, ids, backend)
    for face in ("sync", "async"):
        with vector_reader(face, root, cache_dir=tmp_path / "cache") as reader:
            right(reader, ids)
            hit = reader.search(VECTORS[3], 1, num_probes=SHARDS).results[0]
            assert (hit.id, hit.payload) == (ids[3], {"title": "title 3"})
            assert reader.snapshot_info().backend == backend


@pytest.mark.parametrize("kind", ["whole", "string", "digits"])
@pytest.mark.parametrize("backend", ["lancedb", "sqlite-vec"])
def test_keys_come_back_as_they_went_in(tmp_path: Path, backend: str, kind: str) -> None:
    ids = list(range(ROWS)) if kind == "whole" else IDS[kind]
    root = write(tmp_path, ids, backend, unified=True)
    for face in ("sync", "async"):
        with unified_reader(face, root, cache_dir=tmp_path / "cache") as reader:
            right(reader, ids)
            assert reader.get(ids[3]) == b'{"title":"title 3"}'
            assert reader.get(ROWS if kind == "whole" else "7") is None
            assert set(reader.multi_get(ids)) == set(ids)
            assert None not in reader.multi_get(ids).values()


@pytest.mark.parametrize("backend", ["lancedb", "sqlite-vec"])
def test_vectors_are_taken_from_the_named_column(tmp_path: Path, backend: str) -> None:
    root = write(tmp_path, IDS["int"], backend, column="embedding")
    with vector_reader("sync", root, cache_dir=tmp_path / "cache") as reader:
        right(reader, IDS["int"])


@pytest.mark.parametrize("unified", [False, True], ids=["vector", "unified"])
def test_health_of_all_four_readers(tmp_path: Path, face: Face, unified: bool) -> None:
    root = write(tmp_path, list(range(ROWS)), "sqlite-vec", unified=unified)
    opener = unified_reader if unified else vector_reader
    with opener(face, root, cache_dir=tmp_path / "cache") as reader:
        assert reader._core.state.manifest.custom["vector"]["dim"] == DIM
        assert reader.health().status == "healthy"
        assert reader.health(3600).status == "healthy"
        stale = reader.health(1e-6)
        assert (stale.status, stale.is_closed, stale.last_error, stale.num_shards) == ("degraded", False, None, SHARDS)
        assert stale.manifest_age_seconds > 0
        reader.close()
        for threshold in (None, 1e-6):
            closed = reader.health(threshold)
            assert (closed.status, closed.is_closed, closed.open_shards) == ("unhealthy", True, [])
