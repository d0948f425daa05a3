"""Projection onto a plane, against its definition."""

import numpy as np
import pytest

from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.projection import project
from sf_pipelines.snapshot.routing.cluster import ClusterRouting
from sf_pipelines_tests.tables import clustered

CENTROIDS = clustered(4, 12, seed=3)


@pytest.mark.parametrize("metric", DistanceMetric)
def test_the_plane_shows_most_of_the_variance(metric: DistanceMetric) -> None:
    sample = clustered(500, 12)
    found = project(sample, ClusterRouting(CENTROIDS, metric), metric, centroids=True)
    seen = sample.astype(np.float64)
    if metric is not DistanceMetric.L2:
        seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(seen.T)))[::-1]
    assert found.points.var(axis=0, ddof=1) == pytest.approx(eigenvalues[:2])
    assert found.kept == pytest.approx(eigenvalues[:2].sum() / eigenvalues.sum())
    assert found.shards.tolist() == ClusterRouting(CENTROIDS, metric).assign(sample).tolist()


def test_a_centroid_lies_among_its_vectors() -> None:
    """It is put on the same plane as they are."""
    sample = clustered(400, 12, clusters=4, seed=5)
    homes = ClusterRouting(CENTROIDS, DistanceMetric.L2).assign(sample)
    centres = np.stack([sample[homes == shard].mean(axis=0) for shard in range(4)])
    found = project(sample, ClusterRouting(centres, DistanceMetric.L2), DistanceMetric.L2, centroids=True)
    assert found.centroids is not None
    for shard in range(4):
        mine = found.points[homes == shard]
        assert found.centroids[shard] == pytest.approx(mine.mean(axis=0), abs=1e-4)


@pytest.mark.parametrize("sample", [np.ones((7, 1)), np.ones((3, 12)), clustered(1, 12), clustered(2, 12)])
def test_any_sample_has_a_plane(sample: np.ndarray) -> None:
    rows = sample.astype(np.float32)
    routing = ClusterRouting(np.ones((2, rows.shape[1]), dtype=np.float32), DistanceMetric.L2)
    found = project(rows, routing, DistanceMetric.L2, centroids=False)
    assert found.points.shape == (len(rows), 2)
    assert np.isfinite(found.points).all()
    assert 0 <= found.kept <= 1 + 1e-9


def test_no_more_rows_are_shown_than_wanted() -> None:
    sample = clustered(900, 12)
    routing = ClusterRouting(CENTROIDS, DistanceMetric.COSINE)
    assert len(project(sample, routing, DistanceMetric.COSINE, centroids=True, most=100).points) == 100
