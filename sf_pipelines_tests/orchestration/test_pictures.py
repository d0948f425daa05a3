"""Pictures: valid, small, and drawn from the figures that they are given."""

import base64
import io

import dagster as dg
import numpy as np
import pytest
from matplotlib.image import imread

from sf_pipelines.orchestration import pictures
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.projection import project
from sf_pipelines.snapshot.receipts import CurvePoint, RoutedShard
from sf_pipelines.snapshot.routing.cluster import ClusterRouting
from sf_pipelines_tests.tables import clustered


def pixels(found: dg.MarkdownMetadataValue) -> np.ndarray:
    """The picture itself; what the UI gets must be small enough for an event log."""
    text = found.md_str or ""
    assert len(text) < 120_000
    head, data = text.split("(data:image/png;base64,")
    assert head.startswith("![")
    return imread(io.BytesIO(base64.b64decode(data.removesuffix(")"))))


def shards(rows: list[int]) -> list[RoutedShard]:
    return [RoutedShard(db_id=n, rows=count, digest="") for n, count in enumerate(rows)]


@pytest.mark.parametrize("rows", [[5], [3, 0, 9], [0, 0], list(range(1000))], ids=len)
def test_shard_sizes(rows: list[int]) -> None:
    assert pixels(pictures.shard_sizes(shards(rows))).std() > 0


def test_a_larger_shard_has_a_taller_bar() -> None:
    def blue(rows: list[int]) -> float:
        picture = pixels(pictures.shard_sizes(shards(rows)))
        return float(((picture[..., 2] > 0.5) & (picture[..., 0] < 0.3)).sum())

    assert blue([9, 9, 9, 9]) > blue([9, 1, 1, 1]) * 1.5


def test_recall_by_probes() -> None:
    curve = [CurvePoint(num_probes=n, recall=1 - 0.3 / n, lower=0.9 - 0.3 / n, rows_searched=n / 8) for n in (1, 2, 3)]
    found = pictures.recall_by_probes(curve, {1: 2.0, 3: 5.0}, 2, 0.95, 10)
    assert "0.8500 at the chosen 2" in (found.md_str or "")
    with_latency, without = pixels(found), pixels(pictures.recall_by_probes(curve, {}, 2, 0.95, 10))
    assert (with_latency.shape != without.shape) or (with_latency != without).any()


@pytest.mark.parametrize("centroids", [True, False])
def test_projection(centroids: bool) -> None:
    sample = clustered(300, 12)
    routing = ClusterRouting(clustered(40, 12, seed=1), DistanceMetric.COSINE)
    found = project(sample, routing, DistanceMetric.COSINE, centroids=centroids)
    assert pixels(pictures.projection(found)).std() > 0
