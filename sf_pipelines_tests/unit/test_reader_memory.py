"""The memory budget: what is kept in memory, what is asked of the index, and that answers do not tell."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.errors import IntegrityError
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.reader.reader import ShardedVectorReader
from sf_pipelines.snapshot.reader.shards import OpenShard
from sf_pipelines.snapshot.routing.explicit import ExplicitRouting
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.faces import Face, vector_reader
from sf_pipelines_tests.metering import FakeProvider
from sf_pipelines_tests.snapshots import brute_force, clustered, publish_by_hand

DIM, SHARDS, ROWS = 32, 4, 400
VECTORS = clustered(ROWS, DIM)
QUERIES = clustered(5, DIM, seed=4)
EVERY = list(range(SHARDS))
# Vectors of one shard.
SIZE = ROWS // SHARDS * DIM * 4


@pytest.fixture(params=["lancedb", "sqlite-vec"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    publish_by_hand(
        Store.open(tmp_path / "store", create=True),
        list(range(ROWS)),
        VECTORS,
        routing=ExplicitRouting(SHARDS),
        shard_of=(np.arange(ROWS) % SHARDS).astype(np.int32),
        metric=DistanceMetric.L2,
        backend=request.param,
        ours=True,
    )
    return tmp_path / "store"


def answers(reader: Any) -> tuple[list[list[int]], list[list[float]]]:
    found = reader.batch_search(QUERIES, 7, shard_ids=EVERY)
    return [[hit.id for hit in one.results] for one in found], [[hit.score for hit in one.results] for one in found]


def in_memory(reader: Any) -> int:
    return len(reader._core.served.shards.in_memory)


def test_answers_are_the_same_and_memory_is_bounded(root: Path, tmp_path: Path, face: Face) -> None:
    ids, scores = brute_force(QUERIES, VECTORS, DistanceMetric.L2, 7)
    held = []
    for budget in (0, SIZE - 1, 2 * SIZE, 3 * SIZE, 8 * SIZE, 100 * SIZE):
        with vector_reader(face, root, cache_dir=tmp_path / "cache", memory_budget=budget) as reader:
            for _ in range(3):
                found, distances = answers(reader)
                assert found == ids.tolist()
                np.testing.assert_allclose(distances, scores, rtol=1e-6)
                assert reader.health().memory_bytes <= budget
            held.append(in_memory(reader))
    # None, some, all.
    assert held[0] == held[1] == 0
    assert held[-1] == SHARDS
    assert held == sorted(held)


def test_without_exact_scan_nothing_is_kept(root: Path, tmp_path: Path) -> None:
    with vector_reader("sync", root, cache_dir=tmp_path / "cache", exact_scan=False) as reader:
        assert answers(reader)[0] == brute_force(QUERIES, VECTORS, DistanceMetric.L2, 7)[0].tolist()
        assert in_memory(reader) == 0


def test_room_is_kept_for_shards_that_have_not_loaded_yet(root: Path, tmp_path: Path) -> None:
    with vector_reader("sync", root, cache_dir=tmp_path / "cache", memory_budget=2 * SIZE) as reader:
        handles = reader._core.served.shards
        with handles.borrow(0) as first, handles.borrow(1) as second, handles.borrow(2) as third:
            # Opened, and nothing loaded: only what they may load counts.
            for opened in (first, second, third):
                _ = opened.index
            assert [opened.reserved for opened in (first, second, third)] == [SIZE, SIZE, 0]


def test_a_shard_that_cannot_be_opened_keeps_no_room(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = OpenShard._checked

    def fails(self: OpenShard, opener: Any, is_right: Any, counted: str) -> Any:
        return whole(self, opener, lambda rows: self.entry.db_id != 0 and is_right(rows), counted)

    monkeypatch.setattr(OpenShard, "_checked", fails)
    with vector_reader("sync", root, cache_dir=tmp_path / "cache", memory_budget=100 * SIZE) as reader:
        for _ in range(3):
            with pytest.raises(IntegrityError, match="shard 0 at"):
                reader.search(QUERIES[0], 3, shard_ids=[0])
            assert (reader.health().memory_bytes, reader.health().open_shards) == (0, [])


def test_a_shard_that_outgrew_the_budget_is_asked_by_its_index(tmp_path: Path) -> None:
    """Vectors alone would fit; with what comes along they do not: once is enough to know."""
    store = Store.open(tmp_path / "store", create=True)
    vectors = clustered(400, 8)
    payloads = [{"text": "x" * 300}] * len(vectors)
    publish_by_hand(store, list(range(400)), vectors, centroids=clustered(4, 8, seed=0), payloads=payloads, ours=True)
    provider = FakeProvider()
    budget = 4 * vectors.nbytes
    assert store.local_root is not None
    with ShardedVectorReader(
        store.local_root, cache_dir=tmp_path / "cache", memory_budget=budget, meter_provider=provider
    ) as reader:
        for _ in range(5):
            reader.search(vectors[0], 5, num_probes=4)
        before = len(provider.named("shard.opened"))
        for _ in range(5):
            reader.search(vectors[0], 5, num_probes=4)
            reader.health()
        assert len(provider.named("shard.opened")) == before
