"""Vectors on a plane, for people to look at."""

from dataclasses import dataclass

import numpy as np

from sf_pipelines.snapshot.metric import DistanceMetric, Float32, Float64
from sf_pipelines.snapshot.routing.protocol import Int32, VectorRouting


@dataclass(frozen=True)
class Projection:
    """A sample on the plane that shows most of its spread.

    Attributes:
        points: of the sample, shape (n, 2).
        shards: shard of each, shape (n,).
        means: of the points of each shard, by shard. Not the centroids: under cosine these have length 1, and so lie
            outside of the cloud of their own vectors.
        kept: share of the sample's variance that the plane shows, 0 to 1.
    """

    points: Float64
    shards: Int32
    means: dict[int, Float64]
    kept: float


def project(sample: Float32, routing: VectorRouting, metric: DistanceMetric, *, most: int = 2000) -> Projection:
    """Principal components of a sample (Pearson, On lines and planes of closest fit, 1901).

    Vectors are taken as the routing sees them: by their direction, except under l2.

    Args:
        sample: float32, shape (n, dim).
        routing: trained.
        metric: declared metric.
        most: rows that are shown: evenly spaced ones.
    """
    rows = sample[np.unique(np.linspace(0, len(sample) - 1, min(most, len(sample))).astype(np.int64))]
    shards = routing.assign(rows)
    seen = _seen(rows, metric)
    middle = seen.mean(axis=0)
    _, spread, axes = np.linalg.svd(seen - middle, full_matrices=False)
    plane = np.zeros((2, rows.shape[1]))
    plane[: len(axes[:2])] = axes[:2]
    total = float(np.square(spread).sum())
    points = (seen - middle) @ plane.T
    return Projection(
        points=points,
        shards=shards,
        means={shard: points[shards == shard].mean(axis=0) for shard in np.unique(shards).tolist()},
        kept=float(np.square(spread[:2]).sum()) / total if total > 0 else 1.0,
    )


def _seen(rows: Float32, metric: DistanceMetric) -> Float64:
    wide = rows.astype(np.float64)
    if metric is DistanceMetric.L2:
        return wide
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0)
