"""Pictures: valid, small, and drawn from the figures that they are given."""

import base64
import io

import dagster as dg
import numpy as np
import pytest
from matplotlib.image import imread

from sf_pipelines.orchestration import pictures
from sf_pipelines.snapshot.manifest.models import CurvePoint
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.routing.cluster import ClusterRouting
from sf_pipelines.snapshot.routing.projection import project
from sf_pipelines.snapshot.run.receipts import RoutedShard
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


CURVE = [CurvePoint(num_probes=n, recall=1 - 0.3 / n, lower=0.9 - 0.3 / n, rows_searched=n / 8) for n in (1, 2, 3)]


def is_red(picture: np.ndarray) -> np.ndarray:
    """Where a picture is red, edges of lines included."""
    return (picture[..., 0] > 0.7) & (picture[..., 1:3].max(axis=2) < 0.65)


def is_orange(picture: np.ndarray) -> np.ndarray:
    return (picture[..., 0] > 0.9) & (picture[..., 2] < 0.4) & (picture[..., 1] > 0.4) & (picture[..., 1] < 0.8)


@pytest.mark.parametrize("high", [False, True])
def test_recall_by_probes(high: bool) -> None:
    curve = [point.model_copy(update={"recall": 1.0, "lower": 1.0}) for point in CURVE] if high else CURVE
    found = pictures.recall_by_probes(curve, {1: 2.0, 3: 5.0}, 2, 0.95, 10)
    assert f"{1.0 if high else 0.85:.4f} at num_probes 2" in (found.md_str or "")
    picture, without = pixels(found), pixels(pictures.recall_by_probes(curve, {}, 2, 0.95, 10))
    # The line of min_recall goes across the picture, however good the recall is, and again in the legend.
    red = is_red(picture)
    assert red.sum(axis=1).max() > 200
    assert red[-60:].any()
    # So are both lines: the orange one is gone where no search was timed.
    assert is_orange(picture[-60:]).any()
    assert not is_orange(without).any()


@pytest.mark.parametrize("metric", list(DistanceMetric))
@pytest.mark.parametrize("num_dbs", [4, 40])
def test_projection(metric: DistanceMetric, num_dbs: int) -> None:
    sample = clustered(300, 12)
    found = project(sample, ClusterRouting(clustered(num_dbs, 12, seed=1), metric), metric)
    picture = pictures.projection(found)
    assert pixels(picture).std() > 0
    assert f"300 training vectors in {len(found.means)} shards" in (picture.md_str or "")
