"""Answers of several shards through the readers: all there is, ties, empty shards, ids that are there twice."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.metric import DistanceMetric, Float32
from sf_pipelines.snapshot.reader.async_reader import AsyncShardedVectorReader
from sf_pipelines.snapshot.reader.reader import ShardedVectorReader
from sf_pipelines.snapshot.reader.types import VectorSearchResponse
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.racing import PATIENCE
from sf_pipelines_tests.snapshots import publish_by_hand

# One row in each direction from the middle: all are equally far from it. Nothing is near the fourth centroid.
DIRECTIONS = np.array([[1, 0], [0, 1], [-1, 0]], dtype=np.float32)
CENTROIDS = np.concatenate([DIRECTIONS, np.full((1, 2), 1e6, dtype=np.float32)])
MIDDLE = np.zeros(2, dtype=np.float32)


@pytest.fixture(params=["lancedb", "sqlite-vec"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["scan", "file"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {"cache_dir": tmp_path / "cache", "exact_scan": request.param == "scan"}


def answered(
    tmp_path: Path, options: dict[str, Any], ids: list[Any], vectors: Float32, query: Float32, k: int, **how: Any
) -> VectorSearchResponse:
    """The answer of both readers, which is the same."""
    how = {"centroids": CENTROIDS, "metric": DistanceMetric.L2, "num_probes": 4} | how
    publish_by_hand(Store.open(tmp_path / "root", create=True), ids, vectors, **how)

    async def search() -> VectorSearchResponse:
        async with asyncio.timeout(PATIENCE), await AsyncShardedVectorReader.open(tmp_path / "root", **options) as slow:
            return await slow.search(query, k)

    with ShardedVectorReader(tmp_path / "root", **options) as reader:
        found = reader.search(query, k)
        (of_batch,) = reader.batch_search([query], k)
    awaited = asyncio.run(search())
    assert found.results == of_batch.results == awaited.results
    assert found.shortfall == of_batch.shortfall == awaited.shortfall
    return found


def test_equal_scores_are_ordered_by_id_over_all_shards(tmp_path: Path, options: dict[str, Any], backend: str) -> None:
    vectors = np.tile(DIRECTIONS, (4, 1))
    ids = [11, 3, 7, 0, 10, 5, 2, 9, 4, 8, 1, 6]
    found = answered(tmp_path, options, ids, vectors, MIDDLE, 8, backend=backend, ours=True)
    assert [(hit.id, hit.score) for hit in found.results] == [(number, 1.0) for number in range(8)]
    assert (found.shortfall, sorted(found.shard_ids)) == (None, [0, 1, 2, 3])


def test_more_than_there_is_gives_all_and_says_so(tmp_path: Path, options: dict[str, Any], backend: str) -> None:
    ids = ["c", "a", "b"]
    found = answered(tmp_path, options, ids, DIRECTIONS, MIDDLE, 50, backend=backend, ours=True)
    assert [hit.id for hit in found.results] == ["a", "b", "c"]
    assert found.shortfall == "3 of 50 results: the 4 shards that were asked hold 3 rows"
    assert [hit.payload for hit in found.results] == [{"n": "a"}, {"n": "b"}, {"n": "c"}]


def test_an_empty_shard_alone_is_an_empty_answer(tmp_path: Path, options: dict[str, Any], backend: str) -> None:
    query = CENTROIDS[3]
    found = answered(tmp_path, options, [1, 2, 3], DIRECTIONS, query, 2, backend=backend, num_probes=1)
    assert (found.results, found.shard_ids) == ([], [3])
    assert found.shortfall == "0 of 2 results: the 1 shards that were asked hold 0 rows; ask more shards"


def test_of_an_id_in_several_shards_the_best_stays(tmp_path: Path, options: dict[str, Any], backend: str) -> None:
    """A stranger's: what this package writes holds each id once."""
    query = np.array([0.9, 0.1], dtype=np.float32)
    # Ids 1 and 2 are in all three shards, 3 twice in one.
    vectors = np.concatenate([DIRECTIONS, DIRECTIONS * 1.5, DIRECTIONS[:1] * 2, DIRECTIONS[:1] * 3])
    ids = [1, 1, 1, 2, 2, 2, 3, 3]
    payloads = [{"at": at} for at in range(len(ids))]
    found = answered(tmp_path, options, ids, vectors, query, 5, backend=backend, payloads=payloads)
    best = [((vectors[at] - query) ** 2).sum() for at in (0, 3, 6)]
    assert [hit.id for hit in found.results] == [1, 2, 3]
    assert [hit.score for hit in found.results] == pytest.approx(best)
    assert [hit.payload for hit in found.results] == [{"at": 0}, {"at": 3}, {"at": 6}]
    assert found.shortfall is not None
    assert found.shortfall.endswith("have no distance to the query, or an id that is there")
    # No shard repeats an id of its own.
    few = answered(tmp_path, options, ids[:6], vectors[:6], query, 5, backend=backend)
    assert [hit.id for hit in few.results] == [1, 2]
    # With fewer wanted, repeats take nobody's place.
    assert [hit.id for hit in answered(tmp_path, options, ids, vectors, query, 3, backend=backend).results] == [1, 2, 3]
