"""Projection onto a plane, against its definition."""

import numpy as np
import pytest

from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.routing.cluster import ClusterRouting
from sf_pipelines.snapshot.routing.projection import project
from sf_pipelines_tests.tables import clustered

CENTROIDS = clustered(4, 12, seed=3)


@pytest.mark.parametrize("metric", DistanceMetric)
def test_the_plane_shows_most_of_the_variance(metric: DistanceMetric) -> None:
    sample = clustered(500, 12)
    found = project(sample, ClusterRouting(CENTROIDS, metric), metric)
    seen = sample.astype(np.float64)
    if metric is not DistanceMetric.L2:
        seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(seen.T)))[::-1]
    assert found.points.var(axis=0, ddof=1) == pytest.approx(eigenvalues[:2])
    assert found.kept == pytest.approx(eigenvalues[:2].sum() / eigenvalues.sum())
    assert found.shards.tolist() == ClusterRouting(CENTROIDS, metric).assign(sample).tolist()


@pytest.mark.parametrize("metric", DistanceMetric)
def test_what_stands_for_a_shard_lies_amid_its_vectors(metric: DistanceMetric) -> None:
    """Wide clusters: under cosine their centroids, of length 1, lie well outside of them."""
    sample = np.random.default_rng(2).standard_normal((900, 6)).astype(np.float32) + np.float32(0.5)
    routing = ClusterRouting(np.eye(6, dtype=np.float32)[:3], metric)
    found = project(sample, routing, metric)
    homes = routing.assign(sample)
    assert sorted(found.means) == np.unique(homes).tolist()
    for shard, mean in found.means.items():
        mine = found.points[homes == shard]
        assert mean == pytest.approx(mine.mean(axis=0))
        assert np.linalg.norm(mine - mean, axis=1).min() < 0.2 * np.linalg.norm(mine - mean, axis=1).max()


def test_an_empty_shard_is_not_shown() -> None:
    centroids = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], dtype=np.float32)
    rows = np.array([[2.0, 0.1], [3.0, 0.2], [0.1, 5.0]], dtype=np.float32)
    found = project(rows, ClusterRouting(centroids, DistanceMetric.COSINE), DistanceMetric.COSINE)
    assert sorted(found.means) == [0, 1]


@pytest.mark.parametrize("sample", [np.ones((7, 1)), np.ones((3, 12)), clustered(1, 12), clustered(2, 12)])
def test_any_sample_has_a_plane(sample: np.ndarray) -> None:
    rows = sample.astype(np.float32)
    routing = ClusterRouting(np.ones((2, rows.shape[1]), dtype=np.float32), DistanceMetric.L2)
    found = project(rows, routing, DistanceMetric.L2)
    assert found.points.shape == (len(rows), 2)
    assert np.isfinite(found.points).all()
    assert 0 <= found.kept <= 1 + 1e-9


def test_no_more_rows_are_shown_than_wanted() -> None:
    sample = clustered(900, 12)
    routing = ClusterRouting(CENTROIDS, DistanceMetric.COSINE)
    assert len(project(sample, routing, DistanceMetric.COSINE, most=100).points) == 100
