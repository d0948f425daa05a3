from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.routing.cluster import ClusterRouting, train_centroids
from sf_pipelines.snapshot.testing.routing import VectorRoutingConformance

TABLE_CENTROIDS = np.array([[1, 0], [0, 1], [-1, 0], [1, 0]], dtype=np.float32)
TABLE = {
    (1, 0): {"cosine": [0, 3, 1], "l2": [0, 3, 1], "dot_product": [0, 3, 1]},
    (0, 0): {"cosine": [0, 1, 2], "l2": [0, 1, 2], "dot_product": [0, 1, 2]},
    (1, 1): {"cosine": [0, 1, 3], "l2": [0, 1, 3], "dot_product": [0, 1, 3]},
    (-2, 0): {"cosine": [2, 1, 0], "l2": [2, 1, 0], "dot_product": [2, 1, 0]},
    (0, -1): {"cosine": [0, 2, 3], "l2": [0, 2, 3], "dot_product": [0, 2, 3]},
}


@pytest.mark.parametrize("metric", list(DistanceMetric))
@pytest.mark.parametrize("vector", list(TABLE))
def test_the_table_of_the_format(vector: tuple[int, int], metric: DistanceMetric) -> None:
    routing = ClusterRouting(TABLE_CENTROIDS, metric)
    rows = np.array([vector], dtype=np.float32)
    expected = TABLE[vector][metric.value]
    assert routing.assign(rows).tolist() == expected[:1]
    assert routing.probe(rows)[0][0, :3].tolist() == expected


def canonical_order(vector: np.ndarray, centroids: np.ndarray, metric: DistanceMetric) -> list[int]:
    v, c = vector.astype(np.float64), centroids.astype(np.float64)
    if metric is DistanceMetric.L2:
        distances = np.square(c - v).sum(axis=1)
    elif metric is DistanceMetric.DOT_PRODUCT:
        distances = -(c * v).sum(axis=1)
    else:
        length = np.sqrt(np.square(v).sum())
        distances = 1 - (c * v).sum(axis=1) / (np.linalg.norm(c, axis=1) * length + 1e-10)
    return np.argsort(distances, kind="stable").tolist()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    metric=st.sampled_from(list(DistanceMetric)),
    dim=st.integers(1, 48),
    num_dbs=st.integers(1, 12),
    nudge=st.sampled_from([0.0, 1e-8, 1e-6, 1e-3]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_near_ties_are_decided_by_the_canonical_formula(
    seed: int, metric: DistanceMetric, dim: int, num_dbs: int, nudge: float, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(dim)
    centroids = (base + nudge * rng.standard_normal((num_dbs, dim))).astype(np.float32) * np.float32(scale)
    vectors = rng.standard_normal((20, dim)).astype(np.float32) * np.float32(scale)
    routing = ClusterRouting(centroids, metric)
    order, distances = routing.probe(vectors)
    assert order.tolist() == [canonical_order(v, centroids, metric) for v in vectors]
    assert (np.diff(distances, axis=1) >= 0).all()
    assert routing.assign(vectors).tolist() == order[:, 0].tolist()


def test_a_batch_routes_like_single_vectors() -> None:
    rng = np.random.default_rng(3)
    routing = ClusterRouting(rng.standard_normal((16, 64)).astype(np.float32), DistanceMetric.COSINE)
    vectors = rng.standard_normal((500, 64)).astype(np.float32)
    batch = routing.assign(vectors)
    assert [int(routing.assign(v[None])[0]) for v in vectors] == batch.tolist()
    assert routing.probe(vectors)[0][:, 0].tolist() == batch.tolist()


def test_training_is_deterministic_and_spherical() -> None:
    rng = np.random.default_rng(5)
    sample = rng.standard_normal((2000, 24)).astype(np.float32)
    first = train_centroids(sample, num_dbs=8, metric=DistanceMetric.COSINE, seed=1, max_iter=30)
    again = train_centroids(sample, num_dbs=8, metric=DistanceMetric.COSINE, seed=1, max_iter=30)
    assert np.array_equal(first.matrix, again.matrix)
    assert np.allclose(np.linalg.norm(first.matrix, axis=1), 1, atol=1e-6)
    assert first.figures["distinct"] == 8
    loose = train_centroids(sample, num_dbs=8, metric=DistanceMetric.L2, seed=1, max_iter=30)
    assert not np.allclose(np.linalg.norm(loose.matrix, axis=1), 1, atol=1e-3)


def test_equal_vectors_give_repeated_centroids_and_one_full_shard() -> None:
    sample = np.ones((50, 4), dtype=np.float32)
    trained = train_centroids(sample, num_dbs=3, metric=DistanceMetric.L2, seed=0, max_iter=10)
    assert trained.figures["distinct"] == 1
    assert set(ClusterRouting(trained.matrix, DistanceMetric.L2).assign(sample).tolist()) == {0}


def test_more_shards_than_vectors_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_dbs 5 is more than the 3 vectors"):
        train_centroids(np.eye(3, dtype=np.float32), num_dbs=5, metric=DistanceMetric.L2, seed=0, max_iter=5)


class TestClusterConforms(VectorRoutingConformance):
    def routings(self) -> Iterable[ClusterRouting]:
        rng = np.random.default_rng(9)
        for metric in DistanceMetric:
            yield ClusterRouting(rng.standard_normal((1, 3), dtype=np.float32), metric)
            yield ClusterRouting(TABLE_CENTROIDS, metric)
            yield ClusterRouting(rng.standard_normal((40, 24), dtype=np.float32), metric)


@pytest.mark.parametrize("metric", list(DistanceMetric))
def test_numbers_at_the_ends_of_float32(metric: DistanceMetric) -> None:
    big = float(np.finfo(np.float32).max)
    routing = ClusterRouting(np.array([[1, 1], [-1, 1], [0, 0]], dtype=np.float32), metric)
    vectors = np.array([[big, big], [-big, big], [1e-30, 1e-30], [-1e-30, 1e-30]], dtype=np.float32)
    order, _ = routing.probe(vectors)
    assert routing.assign(vectors).tolist() == order[:, 0].tolist()
    assert order.tolist() == [canonical_order(v, routing.centroids, metric) for v in vectors]


def test_stock_probes_are_the_first_probes() -> None:
    rng = np.random.default_rng(2)
    routing = ClusterRouting(rng.standard_normal((5, 8)).astype(np.float32), DistanceMetric.L2)
    vectors = rng.standard_normal((9, 8)).astype(np.float32)
    assert np.array_equal(routing.stock_probe(vectors, 3), routing.probe(vectors)[0][:, :3])
    assert routing.stock_probe(vectors, 7)[:, 5:].tolist() == [[-1, -1]] * 9


def test_dot_product_centroids_are_of_unit_length_and_balanced() -> None:
    rng = np.random.default_rng(4)
    directions = rng.standard_normal((8, 16))
    lengths = 10.0 ** rng.uniform(-1, 1, (4000, 1))
    data = ((directions[rng.integers(0, 8, 4000)] + 0.2 * rng.standard_normal((4000, 16))) * lengths).astype(np.float32)
    trained = train_centroids(data, num_dbs=8, metric=DistanceMetric.DOT_PRODUCT, seed=0, max_iter=50)
    assert np.allclose(np.linalg.norm(trained.matrix, axis=1), 1, atol=1e-6)
    counts = np.bincount(ClusterRouting(trained.matrix, DistanceMetric.DOT_PRODUCT).assign(data), minlength=8)
    assert counts.min() > 0
    assert counts.max() < 2.5 * counts.mean()
    # Centres that keep their length draw everything to the longest.
    long = train_centroids(data, num_dbs=8, metric=DistanceMetric.L2, seed=0, max_iter=50).matrix
    drawn = np.bincount(ClusterRouting(long, DistanceMetric.DOT_PRODUCT).assign(data), minlength=8)
    assert drawn.max() > counts.max()
