"""Vector-only snapshots of every strategy, on both backends: which shards are asked, and with what answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.errors import CountMismatchError, QueryError, SnapshotKindError
from sf_pipelines.snapshot.index.protocol import VectorType
from sf_pipelines.snapshot.index.sqlite_vec import SqliteVecShard
from sf_pipelines.snapshot.metric import DistanceMetric, Float32
from sf_pipelines.snapshot.reader.plan import ShardChoice, plan_for, routable
from sf_pipelines.snapshot.reader.reader import ShardedVectorReader, UnifiedShardedReader, open_reader
from sf_pipelines.snapshot.reader.state import load_current
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.cluster import ClusterRouting
from sf_pipelines.snapshot.routing.explicit import ExplicitRouting
from sf_pipelines.snapshot.routing.lsh import LshRouting
from sf_pipelines.snapshot.routing.protocol import Routing
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.faces import Face, vector_reader
from sf_pipelines_tests.snapshots import brute_force, clustered, publish, publish_by_hand

DIM, SHARDS = 8, 4
VECTORS = clustered(200, DIM)
QUERIES = clustered(9, DIM) + np.float32(0.1)
REGIONS = ("eu", "us", "ap", "sa")
HOMES = (np.arange(len(VECTORS)) % SHARDS).astype(np.int32)
HYPERPLANES = np.random.default_rng(3).standard_normal((6, DIM)).astype(np.float32)


def routing_of(strategy: str) -> Routing:
    return {
        "cluster": lambda: ClusterRouting(clustered(SHARDS, DIM), DistanceMetric.L2),
        "lsh": lambda: LshRouting(HYPERPLANES, SHARDS),
        "explicit": lambda: ExplicitRouting(SHARDS),
        "cel": lambda: CelRouting("region", {"region": "string"}, SHARDS, REGIONS),
    }[strategy]()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True)


@pytest.fixture(params=["lancedb", "sqlite-vec"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def write(store: Store, strategy: str, **options: Any) -> Any:
    options = {"metric": DistanceMetric.L2, "routing": routing_of(strategy), "shard_of": HOMES, "ours": True} | options
    return publish_by_hand(store, list(range(len(VECTORS))), VECTORS, **options)


def opened(store: Store, tmp_path: Path, **options: Any) -> ShardedVectorReader:
    assert store.local_root is not None
    return ShardedVectorReader(store.local_root, cache_dir=tmp_path / "cache", **options)


def nearest(members: Any, queries: Float32, k: int = 5) -> list[list[int]]:
    """Ids of the true neighbours among some rows."""
    found, _ = brute_force(queries, VECTORS[members], DistanceMetric.L2, k)
    return np.flatnonzero(members)[found].tolist()


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("strategy", ["cluster", "lsh", "explicit", "cel"])
def test_named_shards_give_the_exact_answer(
    store: Store, tmp_path: Path, strategy: str, backend: str, ours: bool
) -> None:
    write(store, strategy, backend=backend, ours=ours)
    with opened(store, tmp_path) as reader:
        found = reader.batch_search(QUERIES, 5, shard_ids=[3, 1, 0, 2])
        assert [[hit.id for hit in answer.results] for answer in found] == nearest(HOMES >= 0, QUERIES)
        assert found[0].shard_ids == [3, 1, 0, 2]
        assert found[0].results[0].payload == {"n": found[0].results[0].id}
        info = reader.snapshot_info()
        assert (info.sharding, info.backend) == (strategy, backend if ours else None)


@pytest.mark.parametrize("strategy", ["explicit", "cel"])
def test_each_query_in_its_own_shard(store: Store, tmp_path: Path, strategy: str, backend: str) -> None:
    write(store, strategy, backend=backend)
    homes = HOMES[: len(QUERIES)]
    truth = [nearest(home == HOMES, QUERIES[at : at + 1])[0] for at, home in enumerate(homes)]
    with opened(store, tmp_path) as reader:
        arrays = reader.search_arrays(QUERIES, 5, shard_of=homes)
        assert arrays.ids.tolist() == truth
        (point,) = reader.probe_curve(QUERIES, 5, shard_of=homes)
        assert point.ids.tolist() == truth
        assert reader.route_batch(QUERIES, shard_of=homes).tolist() == homes[:, None].tolist()
        assert reader.stock_style(QUERIES, 5, 1, shard_of=homes).ids.tolist() == truth
        wrongs: list[Any] = [homes[:-1], homes + np.int32(1), homes - np.int32(1), homes.astype(np.float32)]
        for wrong in wrongs:
            with pytest.raises(QueryError, match="shard_of must name one shard from 0 to 3 for each of 9 queries"):
                reader.search_arrays(QUERIES, 5, shard_of=wrong)


def test_homes_mean_nothing_where_the_vector_decides(store: Store, tmp_path: Path) -> None:
    write(store, "cluster")
    with opened(store, tmp_path) as reader, pytest.raises(QueryError, match="not by 'cluster'"):
        reader.search_arrays(QUERIES, 5, shard_of=HOMES[: len(QUERIES)])


def test_contexts_of_a_batch(store: Store, tmp_path: Path, backend: str) -> None:
    write(store, "cel", backend=backend)
    regions = [REGIONS[home] for home in HOMES[: len(QUERIES)]]
    contexts = [{"region": region} for region in regions]
    with opened(store, tmp_path) as reader:
        each = reader.batch_search(QUERIES, 5, routing_context=contexts)
        for at, (query, context) in enumerate(zip(QUERIES, contexts, strict=True)):
            alone = reader.search(query, 5, routing_context=context)
            assert alone.results == each[at].results
            assert alone.shard_ids == each[at].shard_ids == [HOMES[at]]
            assert [hit.id for hit in alone.results] == nearest(HOMES[at] == HOMES, QUERIES[at : at + 1])[0]
        every = reader.batch_search(QUERIES, 5, routing_context={"region": "us"})
        assert [answer.shard_ids for answer in every] == [[1]] * len(QUERIES)
        # Shards that are named count more than the context.
        assert reader.search(QUERIES[0], shard_ids=[2], routing_context={"region": "us"}).shard_ids == [2]
        assert reader.snapshot_info().cel_columns == {"region": "string"}


@pytest.mark.parametrize(
    ("strategy", "arguments", "message"),
    [
        ("explicit", {}, "give shard_ids"),
        ("explicit", {"num_probes": 1}, "num_probes is for snapshots sharded by vector"),
        ("explicit", {"routing_context": {"shard_id": 1}}, "routing_context is for snapshots sharded by an expression"),
        ("cel", {}, "an expression over region: give routing_context"),
        ("cel", {"num_probes": 1}, "num_probes is for snapshots sharded by vector"),
        (
            "cel",
            {"num_probes": 1, "routing_context": {"region": "eu"}},
            "num_probes is for snapshots sharded by vector",
        ),
        ("cel", {"routing_context": {"region": "mars"}}, "not among routing_values"),
        ("cel", {"routing_context": {"region": 1}}, "region must be a CEL string"),
        ("cel", {"routing_context": {}}, "region is missing"),
        ("cel", {"routing_context": {"region": "eu", "tier": 1}}, "'tier' is unknown"),
        ("cel", {"routing_context": [{"region": "eu"}] * 2}, "2 contexts for 1 queries"),
        ("cel", {"routing_context": ["eu"]}, "routing_context 0 must be a mapping"),
        ("cel", {"routing_context": "eu"}, "must be a mapping, or one for each query, not str"),
        ("lsh", {"routing_context": {"region": "eu"}}, "this one is sharded by 'lsh'"),
        ("lsh", {"num_probes": 1, "shard_ids": [1]}, "exclude each other"),
    ],
)
def test_a_wrong_call_is_a_query_error(
    store: Store, tmp_path: Path, strategy: str, arguments: dict[str, Any], message: str
) -> None:
    write(store, strategy)
    with opened(store, tmp_path) as reader, pytest.raises(QueryError, match=message):
        reader.batch_search(QUERIES[:1], **arguments)


@pytest.mark.parametrize("strategy", ["explicit", "cel"])
def test_without_homes_a_measurement_is_refused(store: Store, tmp_path: Path, strategy: str) -> None:
    write(store, strategy)
    with opened(store, tmp_path) as reader:
        for measure in (
            lambda: reader.search_arrays(QUERIES, 5),
            lambda: reader.probe_curve(QUERIES, 5),
            lambda: reader.stock_style(QUERIES, 5, 2),
            lambda: reader.route_batch(QUERIES),
            lambda: reader.route_vector(QUERIES[0]),
        ):
            with pytest.raises(QueryError, match="give"):
                measure()


# LSH.


def test_lsh_finds_every_row_at_home_and_probes_on(store: Store, tmp_path: Path, backend: str) -> None:
    write(store, "lsh", backend=backend)
    routing = LshRouting(HYPERPLANES, SHARDS)
    with opened(store, tmp_path) as reader:
        order = reader.route_batch(VECTORS)
        np.testing.assert_array_equal(order[:, 0], routing.assign(VECTORS))
        assert all(sorted(row) == list(range(SHARDS)) for row in order.tolist())
        found = reader.search_arrays(VECTORS, 1, num_probes=1)
        assert found.ids[:, 0].tolist() == list(range(len(VECTORS)))
        for probes, step in enumerate(reader.probe_curve(QUERIES, 5), start=1):
            arrays = reader.search_arrays(QUERIES, 5, num_probes=probes)
            assert step.ids.tolist() == arrays.ids.tolist()
        assert reader.search_arrays(QUERIES, 5, num_probes=9).ids.tolist() == nearest(HOMES >= 0, QUERIES)


def test_only_snapshots_of_others_are_probed_in_their_order(store: Store, tmp_path: Path) -> None:
    hyperplanes = np.random.default_rng(5).standard_normal((3, DIM)).astype(np.float32)
    routing = LshRouting(hyperplanes, 8)
    rows = np.random.default_rng(6).standard_normal((50, DIM)).astype(np.float32)
    stock = routing.stock_probe(rows, 8)
    assert (stock < 0).any()
    for ours in (True, False):
        write(store, "lsh", routing=routing, ours=ours)
        with opened(store, tmp_path) as reader:
            order = reader.route_batch(rows)
            agrees = np.all((order == stock) | (stock < 0))
            assert agrees == (not ours)


def test_places_that_stay_empty_are_skipped(store: Store, tmp_path: Path) -> None:
    """One flipped bit reaches 4 of 8 cells; a stock reader asks no more, whatever it is told."""
    hyperplanes = np.random.default_rng(5).standard_normal((3, DIM)).astype(np.float32)
    routing = LshRouting(hyperplanes, 8)
    write(store, "lsh", routing=routing)
    stock = routing.stock_probe(QUERIES, 8)
    shard_of = routing.assign(VECTORS)
    with opened(store, tmp_path) as reader:
        found = reader.stock_style(QUERIES, 5, 8)
        for at in range(len(QUERIES)):
            members = np.isin(shard_of, stock[at][stock[at] >= 0])
            count = found.counts[at]
            assert found.ids[at][:count].tolist() == nearest(members, QUERIES[at : at + 1])[0][:count]


# Vectors stored as float16.


def test_fp16_queries_are_routed_as_rounded_and_scored_as_given(store: Store, tmp_path: Path) -> None:
    # The boundary between the two centroids lies between the query and its float16.
    centroids = np.array([[0.0, 1.0], [2.0, 1.0]], dtype=np.float32)
    vectors = np.array([[1.0, 1.0], [2.0, 1.0]], dtype=np.float32)
    query = np.array([1.0001, 1.0], dtype=np.float32)
    cases: list[tuple[VectorType, int]] = [("float16", 0), ("float32", 1)]
    for vector_type, home in cases:
        publish_by_hand(
            store,
            [0, 1],
            vectors,
            centroids=centroids,
            metric=DistanceMetric.L2,
            num_probes=1,
            ours=True,
            vector_type=vector_type,
        )
        with opened(store, tmp_path) as reader:
            assert reader.route_vector(query) == [home]
            (hit,) = reader.search(query).results
            assert hit.id == home
            assert hit.score == pytest.approx(float(np.square(vectors[home].astype(float) - query).sum()), rel=1e-9)


def test_what_float16_cannot_stand_for_is_routed_as_it_is(store: Store) -> None:
    publish_by_hand(
        store,
        [0],
        np.ones((1, DIM), dtype=np.float32),
        centroids=VECTORS[:1],
        metric=DistanceMetric.COSINE,
        ours=True,
        vector_type="float16",
    )
    state = load_current(store)
    rows = np.zeros((4, DIM), dtype=np.float32)
    rows[:, 0] = (1e30, -1e30, 1e-9, 1.0001)
    rows[:3, 1] = rows[:3, 0] / 3
    found = routable(state, rows)
    np.testing.assert_array_equal(found[:3], rows[:3])
    assert found[3, 0] == np.float16(1.0001)
    assert plan_for(state, rows, ShardChoice()).tolist() == [[0]] * 4


# Which reader, which backend.


def test_the_reader_fits_the_snapshot(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_PIPELINES_CACHE", str(tmp_path / "cache"))
    root = store.local_root
    assert root is not None
    write(store, "cel")
    with open_reader(root) as reader:
        assert isinstance(reader, ShardedVectorReader)
    with pytest.raises(SnapshotKindError, match="vector-only snapshot; open it with ShardedVectorReader"):
        UnifiedShardedReader(root)


def test_a_refresh_to_another_kind_fails_and_the_old_one_serves_on(store: Store, tmp_path: Path) -> None:
    first = write(store, "explicit")
    with opened(store, tmp_path) as reader:
        custom = first.custom["vector"] | {"unified": True, "kv_backend": "sqlite"}
        publish(store, first.model_copy(update={"run_id": "other", "custom": {"vector": custom}}))
        outcome = reader.refresh()
        assert isinstance(outcome.error, SnapshotKindError)
        assert "UnifiedShardedReader" in str(outcome.error)
        assert reader.search(QUERIES[0], shard_ids=[0]).results


def test_rows_are_counted_on_both_backends(store: Store, tmp_path: Path, backend: str) -> None:
    manifest = write(store, "explicit", backend=backend, ours=False)
    row = manifest.shards[0].model_copy(update={"row_count": 51})
    publish(store, manifest.model_copy(update={"shards": (row, *manifest.shards[1:])}))
    with (
        opened(store, tmp_path) as reader,
        pytest.raises(CountMismatchError, match="50 rows, the manifest says 51"),
    ):
        reader.search(QUERIES[0], shard_ids=[0])


def test_only_shards_that_are_asked_are_opened(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens: list[Path] = []
    real = SqliteVecShard.open

    def counting(folder: Path, **options: Any) -> Any:
        opens.append(folder)
        return real(folder, **options)

    monkeypatch.setattr(SqliteVecShard, "open", counting)
    write(store, "cel", backend="sqlite-vec")
    with opened(store, tmp_path) as reader:
        for _ in range(3):
            reader.search(QUERIES[0], routing_context={"region": "eu"})
        assert len(opens) == 1


@pytest.mark.parametrize("ours", [True, False])
def test_vectors_by_id(store: Store, tmp_path: Path, backend: str, ours: bool, face: Face) -> None:
    write(store, "explicit", backend=backend, ours=ours)
    assert store.local_root is not None
    with vector_reader(face, store.local_root, cache_dir=tmp_path / "cache") as reader:
        found = reader.get_vectors([5, 17, 5, 4711])
        assert list(found) == [5, 17, 4711]
        np.testing.assert_array_equal(np.stack([found[5], found[17]]), VECTORS[[5, 17]])
        assert found[4711] is None
        assert reader.get_vectors([5], shard_ids=[int(HOMES[6])]) == {5: None}
        assert reader.get_vectors([]) == {}
        wrongs: list[Any] = [[True], [2**63], ["\ud800"], 5, "5", [1.0], [None]] + ([["5"]] if ours else [])
        for wrong in wrongs:
            with pytest.raises(QueryError, match="id"):
                reader.get_vectors(wrong)
        with pytest.raises(QueryError, match="shard_ids"):
            reader.get_vectors([5], shard_ids=[9])
