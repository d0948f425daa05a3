"""CLUSTER: a shard is the set of vectors nearest to its centroid.

Batches are ranked by one float32 matrix product. Its rounding error is bounded; wherever two centroids are closer
to each other than that bound, both distances are taken again by the canonical formula (float64, one fixed order of
additions), so an answer depends neither on the size of the batch nor on the BLAS at hand.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, Float64
from sf_pipelines.snapshot.routing.protocol import Int32

_EPS = float(np.finfo(np.float32).eps)
# The format's formula for cosine adds this to the product of the norms.
_COSINE_GUARD = 1e-10
# Vectors of one matrix product: bounds the memory of the distance table.
_BLOCK_CELLS = 8_000_000


class ClusterRouting:
    """Nearest-centroid routing.

    Attributes:
        centroids: float32, shape (num_dbs, dim); row i is shard i.
        metric: declared metric; centroids are compared by it.
    """

    strategy = "cluster"

    def __init__(self, centroids: Float32, metric: DistanceMetric) -> None:
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self.centroids.setflags(write=False)
        self.metric = metric
        self.num_dbs, self.dim = self.centroids.shape
        self._exact = self.centroids.astype(np.float64)
        self._norms = np.linalg.norm(self._exact, axis=1)

    def assign(self, vectors: Float32) -> Int32:
        """Shard of each vector: the first centroid at the smallest distance.

        Args:
            vectors: float32, shape (n, dim), as they are stored.

        Returns:
            Shape (n,).
        """
        out = np.empty(len(vectors), dtype=np.int32)
        step = max(1, _BLOCK_CELLS // self.num_dbs)
        for start in range(0, len(vectors), step):
            block = vectors[start : start + step]
            near, bound = self._approximate(block)
            # Only centroids that may be the nearest are looked at again; a lone one needs no second look.
            close = near <= (near.min(axis=1) + bound)[:, None]
            best = near.argmin(axis=1).astype(np.int32)
            unsure = np.flatnonzero(close.sum(axis=1) > 1)
            if len(unsure):
                rows, columns = np.nonzero(close[unsure])
                table = np.full((len(unsure), self.num_dbs), np.inf)
                table[rows, columns] = self._canonical(block, unsure[rows], columns)
                best[unsure] = table.argmin(axis=1)
            out[start : start + step] = best
        return out

    def probe(self, vectors: Float32) -> tuple[Int32, Float64]:
        """All shards by growing distance, equal distances by shard id.

        Args:
            vectors: float32, shape (n, dim).

        Returns:
            Shard ids and distances, both of shape (n, num_dbs).
        """
        near, bound = self._approximate(vectors)
        order = np.argsort(near, axis=1, kind="stable")
        ranked = np.take_along_axis(near, order, axis=1)
        tied = np.zeros(near.shape, dtype=bool)
        if self.num_dbs > 1:
            close = np.diff(ranked, axis=1) <= bound[:, None]
            tied[:, 1:] |= close
            tied[:, :-1] |= close
        rows, ranks = np.nonzero(tied)
        exact = near.astype(np.float64)
        if len(rows):
            columns = order[rows, ranks]
            exact[rows, columns] = self._canonical(vectors, rows, columns)
        order = np.argsort(exact, axis=1, kind="stable").astype(np.int32)
        return order, np.take_along_axis(exact, order, axis=1)

    def describe(self) -> dict[str, Any]:
        """The strategy's name; the reference to the centroids is added where they are stored."""
        return {"sharding_strategy": self.strategy}

    def _approximate(self, vectors: Float32) -> tuple[Float64, Float64]:
        """Distances from one float32 product, and how far apart two must be to be told apart for sure."""
        products = (vectors @ self.centroids.T).astype(np.float64)
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
        # |fl(x.y) - x.y| <= n eps |x||y| for any order of additions (Higham, Accuracy and Stability, 3.1).
        error = (self.dim + 8) * _EPS * lengths * self._norms.max(initial=0.0)
        if self.metric is DistanceMetric.DOT_PRODUCT:
            return -products, 2 * error
        if self.metric is DistanceMetric.L2:
            distances = np.square(self._norms)[None, :] - 2 * products + np.square(lengths)[:, None]
            return distances, 4 * error + 8 * _EPS * np.square(lengths)
        distances = 1.0 - products / (lengths[:, None] * self._norms[None, :] + _COSINE_GUARD)
        distances[lengths == 0] = 1.0
        # A short centroid's relative error is the same, so the bound is that of unit vectors.
        return distances, np.full(len(vectors), 4 * (self.dim + 8) * _EPS)

    def _canonical(self, vectors: Float32, rows: Any, columns: Any) -> Float64:
        """The format's formula in float64 for single pairs of a vector and a centroid."""
        out = np.empty(len(rows), dtype=np.float64)
        step = max(1, _BLOCK_CELLS // self.dim)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            v = vectors[rows[part]].astype(np.float64)
            c = self._exact[columns[part]]
            if self.metric is DistanceMetric.L2:
                out[part] = np.square(c - v).sum(axis=1)
                continue
            products = (c * v).sum(axis=1)
            if self.metric is DistanceMetric.DOT_PRODUCT:
                out[part] = -products
                continue
            lengths = np.sqrt(np.square(v).sum(axis=1))
            cosine = 1.0 - products / (self._norms[columns[part]] * lengths + _COSINE_GUARD)
            out[part] = np.where(lengths == 0, 1.0, cosine)
        return out


@dataclass(frozen=True)
class TrainedCentroids:
    """Centroids and how well they fit the sample.

    Attributes:
        centroids: float32, shape (num_dbs, dim); unit length for cosine and dot_product.
        inertia: mean squared distance of a sample vector to its nearest centre.
        distinct: number of different centroids; fewer than num_dbs means shards that stay empty.
        rounds: k-means rounds until it converged or stopped.
    """

    centroids: Float32
    inertia: float
    distinct: int
    rounds: int


def train_centroids(
    sample: Float32, *, num_dbs: int, metric: DistanceMetric, seed: int, max_iter: int
) -> TrainedCentroids:
    """k-means (Lloyd's rounds from a k-means++ start, scikit-learn) over a training sample.

    For cosine and dot_product the vectors and the centres are scaled to unit length (spherical k-means: Dhillon and
    Modha, Concept decompositions for large sparse text data, 2001), so a shard is a bundle of directions and no long
    centroid draws everything to itself.

    Args:
        sample: float32, shape (n, dim), n >= num_dbs.
        num_dbs: number of centroids.
        metric: declared metric.
        seed: of the k-means++ start.
        max_iter: most rounds.

    Raises:
        ConfigError: fewer sample vectors than shards.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if len(sample) < num_dbs:
        raise ConfigError(f"num_dbs {num_dbs} is more than the {len(sample)} vectors to train on; use fewer shards")
    unit = metric is not DistanceMetric.L2
    data = _unit_rows(sample) if unit else sample
    # One thread: with several, the order of additions and with it the centroids would vary from run to run.
    with threadpool_limits(1), warnings.catch_warnings():
        # Fewer distinct vectors than shards is legal; it is reported as `distinct`.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # Its stubs know only the string that n_init may be.
        one: Any = 1
        model: Any = KMeans(num_dbs, init="k-means++", n_init=one, max_iter=max_iter, tol=1e-4, random_state=seed)
        model.fit(data)
    centres = np.asarray(model.cluster_centers_, dtype=np.float32)
    centroids = _unit_rows(centres) if unit else centres
    return TrainedCentroids(
        centroids=centroids,
        inertia=float(model.inertia_) / len(sample),
        distinct=len(np.unique(centroids, axis=0)),
        rounds=int(model.n_iter_),
    )


def _unit_rows(rows: Float32) -> Float32:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
