"""The blocking reader over snapshots put together by hand."""

import gc
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.errors import (
    ConfigError,
    CountMismatchError,
    DigestMismatchError,
    ManifestError,
    ObjectMissingError,
    QueryError,
    ReaderClosedError,
    SnapshotKindError,
    SnapshotNotFoundError,
    StoreError,
)
from sf_pipelines.snapshot.index.lancedb import LanceDBShard
from sf_pipelines.snapshot.index.protocol import IndexFamily
from sf_pipelines.snapshot.manifest.codec import encode_manifest
from sf_pipelines.snapshot.manifest.models import Manifest
from sf_pipelines.snapshot.manifest.pointer import CURRENT, manifest_name
from sf_pipelines.snapshot.metric import DistanceMetric, Float32
from sf_pipelines.snapshot.reader import search as searching
from sf_pipelines.snapshot.reader.reader import ShardedVectorReader
from sf_pipelines.snapshot.reader.state import read_current
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.snapshots import brute_force, clustered, point_at, publish_by_hand
from sf_pipelines_tests.snapshots import publish as publish_manifest

DIM = 8
CENTROIDS = np.concatenate([clustered(4, DIM, seed=0), np.full((1, DIM), 1e6, dtype=np.float32)])
VECTORS = clustered(240, DIM, centres=4, seed=0)
QUERIES = clustered(12, DIM, centres=4, seed=0) + np.float32(0.1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True)


def publish(store: Store, vectors: Float32 = VECTORS, ids: list[Any] | None = None, **options: Any) -> Manifest:
    options.setdefault("centroids", CENTROIDS)
    return publish_by_hand(store, list(range(len(vectors))) if ids is None else ids, vectors, **options)


def opened(store: Store, tmp_path: Path, **options: Any) -> ShardedVectorReader:
    assert store.local_root is not None
    return ShardedVectorReader(store.local_root, cache_dir=tmp_path / "cache", **options)


@pytest.mark.parametrize("family", IndexFamily)
@pytest.mark.parametrize("metric", DistanceMetric)
def test_all_probes_give_the_exact_answer(
    store: Store, tmp_path: Path, metric: DistanceMetric, family: IndexFamily
) -> None:
    publish(store, metric=metric, family=family)
    truth, distances = brute_force(QUERIES, VECTORS, metric, 10)
    with opened(store, tmp_path) as reader:
        found = reader.search_arrays(QUERIES, 10, num_probes=99)
        assert found.ids.tolist() == truth.tolist()
        np.testing.assert_allclose(found.scores, distances, rtol=1e-6, atol=1e-6)


def test_batch_single_arrays_and_curve_agree(store: Store, tmp_path: Path) -> None:
    publish(store)
    with opened(store, tmp_path) as reader:
        curve = reader.probe_curve(QUERIES, 7)
        assert len(curve) == len(CENTROIDS)
        for probes, step in enumerate(curve, start=1):
            arrays = reader.search_arrays(QUERIES, 7, num_probes=probes)
            batch = reader.batch_search(QUERIES, 7, num_probes=probes)
            assert arrays.ids.tolist() == step.ids.tolist()
            np.testing.assert_array_equal(arrays.scores, step.scores)
            for at, query in enumerate(QUERIES):
                single = reader.search(query, 7, num_probes=probes)
                assert single.results == batch[at].results
                assert single.shard_ids == batch[at].shard_ids == reader.route_vector(query, probes)
                assert [hit.id for hit in single.results] == arrays.ids[at][: arrays.counts[at]].tolist()


def test_hits_carry_payload_and_vector(store: Store, tmp_path: Path) -> None:
    payloads = [None if at % 2 else {"title": f"row {at}"} for at in range(len(VECTORS))]
    publish(store, payloads=payloads)
    with opened(store, tmp_path) as reader:
        answer = reader.search(VECTORS[7], 20, include_vectors=True)
        assert answer.results[0].id == 7
        for hit in answer.results:
            assert isinstance(hit.id, int)
            assert hit.payload == payloads[hit.id]
            np.testing.assert_array_equal(hit.vector, VECTORS[hit.id])
        assert reader.search(VECTORS[7]).results[0].vector is None


@pytest.mark.parametrize("make_id", [int, str, "{:05d}".format, "k{}".format], ids=["int", "digits", "padded", "text"])
def test_ids_come_back_with_their_type(store: Store, tmp_path: Path, make_id: Any) -> None:
    ids = [make_id(at) for at in range(len(VECTORS))]
    publish(store, ids=ids)
    with opened(store, tmp_path) as reader:
        for at, answer in enumerate(reader.batch_search(VECTORS[:30], 1, num_probes=5)):
            assert answer.results[0].id == ids[at]
            assert type(answer.results[0].id) is type(ids[at])


def test_more_than_there_is_gives_everything_once(store: Store, tmp_path: Path) -> None:
    publish(store)
    with opened(store, tmp_path) as reader:
        answer = reader.search(QUERIES[0], 10_000, num_probes=5)
        assert sorted(hit.id for hit in answer.results) == list(range(240))
        assert (answer.num_shards_queried, len(answer.shard_ids)) == (5, 5)
        arrays = reader.search_arrays(QUERIES, 300, num_probes=5)
        assert arrays.counts.tolist() == [240] * len(QUERIES)
        assert arrays.ids[0][240:].tolist() == [None] * 60


def test_an_empty_shard_is_an_empty_answer(store: Store, tmp_path: Path) -> None:
    publish(store, metric=DistanceMetric.L2)
    with opened(store, tmp_path) as reader:
        assert [shard.vector_count == 0 for shard in reader.shard_details()][-1]
        assert reader.shard_details()[-1].db_url is None
        answer = reader.search(QUERIES[0], shard_ids=[4])
        assert (answer.results, answer.shard_ids) == ([], [4])
        assert reader.search_arrays(QUERIES[:1], 3, num_probes=5).counts.tolist() == [3]


def test_named_shards_are_the_only_ones_asked(store: Store, tmp_path: Path) -> None:
    publish(store)
    with opened(store, tmp_path) as reader:
        details = {shard.db_id: shard.vector_count for shard in reader.shard_details()}
        for shard in (0, 2):
            answer = reader.search(QUERIES[0], 1000, shard_ids=[shard])
            assert len(answer.results) == details[shard]
            assert answer.shard_ids == [shard]


def test_equal_vectors_are_ordered_by_id(store: Store, tmp_path: Path) -> None:
    vectors = np.tile(VECTORS[:1], (50, 1))
    publish(store, vectors, ids=list(range(49, -1, -1)))
    with opened(store, tmp_path) as reader:
        assert [hit.id for hit in reader.search(VECTORS[0], 5).results] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": [1.0, 2.0]}, "must have 8 numbers"),
        ({"query": [[1.0] * 8]}, "must have 8 numbers"),
        ({"query": [0.0] * 8}, "is zero"),
        ({"query": [np.nan] * 8}, "holds NaN"),
        ({"top_k": 0}, "top_k"),
        ({"num_probes": 0}, "num_probes"),
        ({"num_probes": -1}, "num_probes"),
        ({"shard_ids": [5]}, "shard_ids names 5"),
        ({"shard_ids": [1, 1]}, "twice"),
        ({"shard_ids": []}, "is empty"),
        ({"shard_ids": [1], "num_probes": 1}, "exclude each other"),
        ({"routing_context": {"region": "eu"}}, "routing_context"),
    ],
)
def test_a_wrong_call_is_a_query_error(store: Store, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    publish(store)
    with opened(store, tmp_path) as reader, pytest.raises(QueryError, match=message):
        reader.search(**({"query": QUERIES[0]} | arguments))


def test_an_empty_batch_is_an_empty_answer(store: Store, tmp_path: Path) -> None:
    publish(store)
    with opened(store, tmp_path) as reader:
        assert reader.batch_search([]) == []
        assert reader.search_arrays(np.empty((0, DIM)), 3).ids.shape == (0, 3)


# What cannot be trusted.


def shard_key(manifest: Manifest, part: str) -> str:
    """Key of one object of the first shard."""
    row = manifest.shards[0]
    assert row.db_url is not None
    assert row.objects is not None
    name = next(item.path for item in row.objects if part in item.path)
    return f"{manifest.key_of(row.db_url)}/{name}"


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("part", ["/data/", "/_versions/", "/_indices/"])
@pytest.mark.parametrize("damage", ["changed", "truncated", "deleted"])
def test_a_damaged_shard_is_an_error_that_names_the_object(
    store: Store, tmp_path: Path, damage: str, part: str
) -> None:
    manifest = publish(store)
    key = shard_key(manifest, part)
    data = store.get(key)
    if damage == "deleted":
        store.delete(key)
    else:
        store.put(key, flip(data) if damage == "changed" else data[:-3])
    with opened(store, tmp_path) as reader:
        for _ in range(2):
            with pytest.raises((DigestMismatchError, ObjectMissingError), match=key.rsplit("/", 1)[-1]):
                reader.search_arrays(QUERIES, 3, num_probes=5)
        store.put(key, data)
        assert reader.search_arrays(QUERIES, 3, num_probes=5).counts.tolist() == [3] * len(QUERIES)


def test_a_damaged_shard_does_not_stop_the_others(store: Store, tmp_path: Path) -> None:
    manifest = publish(store)
    store.delete(shard_key(manifest, "/data/"))
    other = manifest.shards[1].db_id
    with opened(store, tmp_path) as reader:
        assert reader.search(QUERIES[0], shard_ids=[other]).results


def test_a_damaged_copy_is_fetched_again(store: Store, tmp_path: Path) -> None:
    publish(store)
    with opened(store, tmp_path) as reader:
        good = reader.search_arrays(QUERIES, 3, num_probes=5)
    for path in (tmp_path / "cache").rglob("data/*.lance"):
        path.write_bytes(flip(path.read_bytes()))
    with opened(store, tmp_path) as reader:
        again = reader.search_arrays(QUERIES, 3, num_probes=5)
    assert again.ids.tolist() == good.ids.tolist()
    np.testing.assert_array_equal(again.scores, good.scores)


def test_rows_that_do_not_add_up_are_an_error(store: Store, tmp_path: Path) -> None:
    manifest = publish(store)
    row = manifest.shards[0]
    wrong = manifest.model_copy(
        update={"shards": (row.model_copy(update={"row_count": row.row_count + 1}), *manifest.shards[1:])}
    )
    publish_manifest(store, wrong)
    with (
        opened(store, tmp_path) as reader,
        pytest.raises(CountMismatchError, match=f"manifest says {row.row_count + 1}"),
    ):
        reader.search(QUERIES[0], shard_ids=[row.db_id])


def test_the_manifest_must_be_the_one_that_the_pointer_sealed(store: Store, tmp_path: Path) -> None:
    manifest = publish(store)
    name = manifest_name(manifest.run_id, manifest.created_at)
    point_at(store, name, manifest.run_id, "0" * 64)
    with pytest.raises(DigestMismatchError, match="the pointer says 0000"):
        opened(store, tmp_path)
    store.delete(name)
    with pytest.raises(ObjectMissingError, match="manifest"):
        opened(store, tmp_path)


def saved(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (saved(CENTROIDS[:3]), r"shape \(3, 8\), must be \(5, 8\)"),
        (saved(CENTROIDS.astype(np.int32)), "holds int32"),
        (saved(np.where(CENTROIDS > 0, np.nan, CENTROIDS)), "holds NaN or infinity"),
        (saved(CENTROIDS.astype(np.float64) * 1e300), "holds NaN or infinity"),
        (saved(CENTROIDS)[:-4], "bytes long"),
        (saved(np.empty((5, 8), dtype=object), allow_pickle=True), "holds object"),
        (b"", "is no .npy file"),
        (b"\x93NUMPY\x09\x00", "is no .npy file"),
        (b"PK\x03\x04", "is no .npy file"),
    ],
)
def test_centroids_that_cannot_be_used_are_named(store: Store, tmp_path: Path, data: bytes, message: str) -> None:
    manifest = publish(store)
    assert manifest.vector.centroids_ref is not None
    store.put(manifest.key_of(manifest.vector.centroids_ref), data)
    with pytest.raises(ManifestError, match=rf"custom\.vector\.centroids_ref.*{message}"):
        opened(store, tmp_path)


def test_double_precision_centroids_in_either_order_are_understood(store: Store, tmp_path: Path) -> None:
    manifest = publish(store)
    assert manifest.vector.centroids_ref is not None
    with opened(store, tmp_path) as reader:
        order = reader.route_batch(QUERIES)
    store.put(manifest.key_of(manifest.vector.centroids_ref), saved(np.asfortranarray(CENTROIDS, dtype=np.float64)))
    with opened(store, tmp_path) as reader:
        np.testing.assert_array_equal(reader.route_batch(QUERIES), order)


def test_a_key_value_snapshot_is_refused(store: Store, tmp_path: Path) -> None:
    publish_manifest(store, publish(store).model_copy(update={"custom": {}}))
    with pytest.raises(SnapshotKindError, match="key-value snapshot"):
        opened(store, tmp_path)


def test_nothing_published_is_said_so(store: Store, tmp_path: Path) -> None:
    with pytest.raises(SnapshotNotFoundError, match="has no _CURRENT"):
        opened(store, tmp_path)
    with pytest.raises(SnapshotNotFoundError, match="nothing has been published under"):
        ShardedVectorReader(tmp_path / "missing", cache_dir=tmp_path / "cache")
    store.put(CURRENT, b"{")
    with pytest.raises(ManifestError, match="_CURRENT"):
        opened(store, tmp_path)


def test_shards_without_digests_are_served_too(store: Store, tmp_path: Path) -> None:
    publish(store, sealed=False)
    truth, _ = brute_force(QUERIES, VECTORS, DistanceMetric.COSINE, 4)
    with opened(store, tmp_path) as reader:
        assert reader.search_arrays(QUERIES, 4, num_probes=5).ids.tolist() == truth.tolist()


# Refresh, health, closing.


def test_refresh_follows_the_pointer(store: Store, tmp_path: Path) -> None:
    first = publish(store)
    with opened(store, tmp_path) as reader:
        unchanged = reader.refresh()
        assert (unchanged.status, bool(unchanged), unchanged.run_id) == ("unchanged", False, first.run_id)
        second = publish(store, VECTORS[:100])
        updated = reader.refresh()
        assert (updated.status, bool(updated), updated.run_id) == ("updated", True, second.run_id)
        assert reader.snapshot_info().total_vectors == 100
        assert len(reader.search(QUERIES[0], 1000, num_probes=5).results) == 100


def test_a_failed_refresh_keeps_the_old_snapshot_and_says_why(store: Store, tmp_path: Path) -> None:
    first = publish(store)
    with opened(store, tmp_path) as reader:
        second = publish(store, VECTORS[:100])
        name = manifest_name(second.run_id, second.created_at)
        data = store.get(name)
        store.put(name, data[:-1])
        outcome = reader.refresh()
        assert (outcome.status, bool(outcome), outcome.run_id) == ("failed", False, first.run_id)
        assert isinstance(outcome.error, DigestMismatchError)
        assert reader.health().status == "degraded"
        assert "DigestMismatchError" in (reader.health().last_error or "")
        assert len(reader.search(QUERIES[0], 1000, num_probes=5).results) == 240
        store.delete(CURRENT)
        assert isinstance(reader.refresh().error, SnapshotNotFoundError)
        store.put(name, data)
        point_at(store, name, second.run_id)
        assert reader.refresh()
        assert reader.health().status == "healthy"


def test_with_preload_a_damaged_shard_is_noticed_before_the_swap(store: Store, tmp_path: Path) -> None:
    publish(store)
    with opened(store, tmp_path, preload=True) as reader:
        second = publish(store, VECTORS[:100])
        store.delete(shard_key(second, "/data/"))
        assert isinstance(reader.refresh().error, ObjectMissingError)
        assert reader.snapshot_info().total_vectors == 240
    with pytest.raises(StoreError):
        opened(store, tmp_path, preload=True)


def test_a_pinned_manifest_is_served_whatever_the_pointer_says(store: Store, tmp_path: Path) -> None:
    first = publish(store)
    staged = f"staging/run_id={first.run_id}/manifest-x"
    store.put(staged, encode_manifest(first))
    store.delete(CURRENT)
    with opened(store, tmp_path, manifest_key=staged) as reader:
        publish(store, VECTORS[:100])
        assert reader.refresh().status == "unchanged"
        assert reader.snapshot_info().run_id == first.run_id
        assert reader.snapshot_info().published_at is None


def test_the_snapshot_is_described(store: Store, tmp_path: Path) -> None:
    manifest = publish(store)
    with opened(store, tmp_path) as reader:
        info = reader.snapshot_info()
        assert info.published_at == read_current(store).updated_at
        assert info.manifest_ref == store.url_of(manifest_name(manifest.run_id, manifest.created_at))
        assert (info.num_dbs, info.sharding, info.num_probes, info.dim) == (5, "cluster", 2, DIM)
        urls = {row.db_id: row.db_url for row in manifest.shards}
        assert {shard.db_id: shard.db_url for shard in reader.shard_details()} == {at: urls.get(at) for at in range(5)}
        assert reader.health(timedelta(hours=1)).status == "healthy"
        assert reader.health(timedelta(0)).status == "degraded"


def test_a_closed_reader_says_so_and_still_answers_health(store: Store, tmp_path: Path) -> None:
    publish(store)
    reader = opened(store, tmp_path)
    reader.search(QUERIES[0])
    reader.close()
    reader.close()
    calls = (lambda: reader.search(QUERIES[0]), reader.refresh, reader.snapshot_info, reader.shard_details)
    for call in calls:
        with pytest.raises(ReaderClosedError, match="was closed"):
            call()
    assert (reader.health().status, reader.health().is_closed) == ("unhealthy", True)


def test_at_most_so_many_shards_stay_open(store: Store, tmp_path: Path) -> None:
    publish(store)
    with opened(store, tmp_path, max_cached_shards=1) as reader:
        reader.search_arrays(QUERIES, 3, num_probes=5)
        assert len(reader._core._serving.shards.open_shards) == 1
    with opened(store, tmp_path, memory_budget=0) as reader:
        reader.search_arrays(QUERIES, 3, num_probes=5)
        assert reader._core._serving.shards.open_shards == []
    with pytest.raises(ConfigError, match="max_cached_shards"):
        opened(store, tmp_path, max_cached_shards=0)


# Threads.


class Watched:
    """Counts opened and closed shards, and holds searches back on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.closed: list[int] = []
        self.hold: threading.Event | None = None
        self.reached = threading.Event()
        close, scan = LanceDBShard.close, LanceDBShard.scan

        def watched_close(shard: LanceDBShard) -> None:
            self.closed.append(id(shard))
            close(shard)

        def watched_scan(shard: LanceDBShard) -> Any:
            # A refresh warms shards in the test's own thread: that is no search.
            if self.hold is not None and threading.current_thread() is not threading.main_thread():
                self.reached.set()
                assert self.hold.wait(30)
            return scan(shard)

        monkeypatch.setattr(LanceDBShard, "close", watched_close)
        monkeypatch.setattr(LanceDBShard, "scan", watched_scan)


@pytest.mark.parametrize("end", ["refresh", "close"])
def test_shards_are_closed_after_the_last_search_on_them(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    watched = Watched(monkeypatch)
    publish(store)
    reader = opened(store, tmp_path)
    reader.search_arrays(QUERIES, 3, num_probes=5)
    used = len(reader._core._serving.shards.open_shards)
    watched.hold = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(reader.batch_search, QUERIES, 1000, num_probes=5)
        assert watched.reached.wait(30)
        if end == "refresh":
            publish(store, VECTORS[:100])
            assert reader.refresh()
        else:
            reader.close()
        assert len(watched.closed) < used
        watched.hold.set()
        assert all(len(answer.results) == 240 for answer in running.result(30))
    assert len(set(watched.closed)) == used
    reader.close()
    gc.collect()


def test_searches_never_see_half_of_a_refresh(store: Store, tmp_path: Path) -> None:
    """Every snapshot has its own ids: an answer that mixes two, or ranks by the wrong centroids, would show."""
    manifests = []
    for turn in range(3):
        vectors = clustered(240, DIM, centres=4, seed=turn)
        ids = [turn * 1000 + at for at in range(240)]
        manifests.append(publish(store, vectors, ids=ids, centroids=clustered(3 + turn, DIM, seed=turn)))
    names = [manifest_name(item.run_id, item.created_at) for item in manifests]
    stop = threading.Event()
    with opened(store, tmp_path, max_cached_shards=2) as reader, ThreadPoolExecutor(4) as pool:

        def work() -> int:
            rounds = 0
            while not stop.is_set():
                for answer in reader.batch_search(QUERIES[:3], 500, num_probes=99):
                    ids = [hit.id for hit in answer.results]
                    turn = int(ids[0]) // 1000
                    assert sorted(ids) == [turn * 1000 + at for at in range(240)]
                    assert len(answer.shard_ids) == 3 + turn
                rounds += 1
            return rounds

        running = [pool.submit(work) for _ in range(4)]
        deadline, turn, swaps = time.monotonic() + 4, 0, 0
        while time.monotonic() < deadline and not any(future.done() for future in running):
            turn = (turn + 1) % 3
            point_at(store, names[turn], manifests[turn].run_id)
            swaps += bool(reader.refresh())
        stop.set()
        assert all(future.result() > 0 for future in running)
        assert swaps >= 3


def test_age_counts_from_when_the_pointer_came_back(store: Store, tmp_path: Path) -> None:
    publish(store)
    first = read_current(store)
    with opened(store, tmp_path) as reader:
        point_at(store, "manifests/2020-01-01T00:00:00.000000Z_run_id=gone/manifest", "gone")
        assert reader.refresh().status == "failed"
        name = first.manifest_ref.removeprefix(store.url + "/")
        point_at(store, name, first.run_id, first.manifest_digest)
        assert reader.refresh().status == "unchanged"
        assert reader.health().last_error is None
        assert reader.snapshot_info().published_at == read_current(store).updated_at != first.updated_at


def test_batches_of_any_size_are_planned_in_parts(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store)
    with opened(store, tmp_path) as reader:
        whole = reader.search_arrays(VECTORS, 5)
        answers = reader.batch_search(VECTORS, 5)
        # Some queries at a time, for routing and for merging.
        monkeypatch.setattr(searching, "_CELLS", 40)
        parts = reader.search_arrays(VECTORS, 5)
        np.testing.assert_array_equal(parts.ids, whole.ids)
        np.testing.assert_array_equal(parts.scores, whole.scores)
        found = reader.batch_search(VECTORS, 5)
        assert [answer.results for answer in found] == [answer.results for answer in answers]
        assert [answer.shard_ids for answer in found] == [answer.shard_ids for answer in answers]
