"""CLUSTER: a shard is the set of vectors nearest to its centroid.

One float32 matrix product ranks a batch. Centroids whose distances differ by less than its error bound are compared
again by the canonical formula (float64, one fixed order of additions), so that an answer depends neither on the size of
the batch nor on the BLAS library.
"""

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.metric import (
    EPS,
    DistanceMetric,
    Float32,
    Float64,
    Positions,
    blocks,
    canonical_products,
    canonical_squares,
    lengths_of,
    power_of,
    product_bound,
)
from sf_pipelines.snapshot.routing.protocol import Int32, Trained, VectorRouting

_EPS64 = float(np.finfo(np.float64).eps)
# The format's formula for cosine adds this to the product of the norms.
_COSINE_EPSILON = 1e-10


class ClusterRouting(VectorRouting):
    """Nearest-centroid routing.

    Attributes:
        centroids: float32, shape (num_dbs, dim); row i is shard i. Also called ``matrix``.
        metric: declared metric; centroids are compared by it.
    """

    strategy = "cluster"

    def __init__(self, centroids: Float32, metric: DistanceMetric) -> None:
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self.centroids.setflags(write=False)
        self.matrix = self.centroids
        self.metric = metric
        self.num_dbs, self.dim = self.centroids.shape
        self._exact = self.centroids.astype(np.float64)
        self._norms = np.linalg.norm(self._exact, axis=1)
        self._quick = self.centroids
        if metric is DistanceMetric.COSINE:
            units = self._exact / np.where(self._norms > 0, self._norms, 1.0)[:, None]
            self._quick = units.astype(np.float32)
        with np.errstate(over="ignore"):
            self._half_squares = (np.square(self._norms) / 2).astype(np.float32)

    def assign(self, vectors: Float32) -> Int32:
        """Shard of each vector: the first centroid at the smallest distance."""
        out = np.empty(len(vectors), dtype=np.int32)
        for part in blocks(len(vectors), self.dim + self.num_dbs):
            block = vectors[part]
            # Overflow leaves infinities or NaN, which are never nearer for certain: such rows are decided again.
            with np.errstate(over="ignore", invalid="ignore"):
                scores = block @ self._quick.T
                if self.metric is DistanceMetric.L2:
                    scores -= self._half_squares
                best = scores.argmax(axis=1).astype(np.int32)
                rows = np.arange(len(block))
                # Only rows with more than one candidate for the nearest are decided again.
                least = scores[rows, best] - self._quick_bound(block)
                scores[rows, best] = -np.inf
                unsure = np.flatnonzero(~(scores.max(axis=1) < least))
                if len(unsure):
                    scores[rows, best] = np.inf
                    best[unsure] = self._decided(block[unsure], ~(scores[unsure] < least[unsure, None]))
            out[part] = best
        return out

    def probe(self, vectors: Float32) -> tuple[Int32, Float64]:
        """All shards by growing distance, equal distances by shard id."""
        approximate, bound = self._approximate(vectors)
        order = np.argsort(approximate, axis=1, kind="stable")
        ranked = np.take_along_axis(approximate, order, axis=1)
        tied = np.zeros(approximate.shape, dtype=bool)
        if self.num_dbs > 1:
            close = np.diff(ranked, axis=1) <= bound[:, None]
            tied[:, 1:] |= close
            tied[:, :-1] |= close
        rows, ranks = np.nonzero(tied)
        exact = approximate.astype(np.float64)
        if len(rows):
            columns = order[rows, ranks]
            exact[rows, columns] = self._canonical(vectors, rows, columns)
        order = np.argsort(exact, axis=1, kind="stable").astype(np.int32)
        return order, np.take_along_axis(exact, order, axis=1)

    def stock_probe(self, vectors: Float32, num_probes: int) -> Int32:
        out = np.full((len(vectors), num_probes), -1, dtype=np.int32)
        out[:, : self.num_dbs] = self.probe(vectors)[0][:, :num_probes]
        return out

    def describe(self) -> dict[str, Any]:
        return {"sharding_strategy": self.strategy}

    def _quick_bound(self, vectors: Float32) -> Float32:
        """Lead in ``assign``'s float32 scores from which a centroid is nearest for certain."""
        longest = float(self._norms.max())
        if self.metric is DistanceMetric.COSINE:
            # Products with unit rows: the formula's epsilon moves them by less than its share of the shortest centroid.
            shortest = float(self._norms.min(initial=np.inf, where=self._norms > 0))
            return 2 * product_bound(vectors, 1.0) + np.float32(2 * _COSINE_EPSILON / shortest)
        bound = 2 * product_bound(vectors, longest)
        if self.metric is DistanceMetric.L2:
            bound += np.float32(4 * EPS * longest) * (lengths_of(vectors) + np.float32(longest))
        return bound

    def _decided(self, vectors: Float32, close: NDArray[np.bool_]) -> Int32:
        """First nearest centroid among those in ``close``, by the canonical formula."""
        rows, columns = np.nonzero(close)
        table = np.full(close.shape, np.inf)
        table[rows, columns] = self._canonical(vectors, rows, columns)
        return table.argmin(axis=1).astype(np.int32)

    def _approximate(self, vectors: Float32) -> tuple[Float64, Float64]:
        """Distances from one float64 product, and the difference from which their order is certain."""
        rows = vectors.astype(np.float64)
        products = rows @ self._exact.T
        lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        longest = self._norms.max()
        # |fl(x.y) - x.y| <= n eps |x||y| for any order of additions (Higham, Accuracy and Stability, 3.1).
        error = (self.dim + 8) * _EPS64 * lengths * longest
        if self.metric is DistanceMetric.DOT_PRODUCT:
            return -products, 2 * error
        if self.metric is DistanceMetric.L2:
            distances = np.square(self._norms)[None, :] - 2 * products + np.square(lengths)[:, None]
            return distances, 4 * error + (self.dim + 8) * _EPS64 * (np.square(lengths) + longest**2)
        distances = 1.0 - products / (lengths[:, None] * self._norms[None, :] + _COSINE_EPSILON)
        distances[lengths == 0] = 1.0
        # A short centroid's relative error is the same, so the bound is that of unit vectors.
        return distances, np.full(len(vectors), 4 * (self.dim + 8) * _EPS64)

    def _canonical(self, vectors: Float32, rows: Positions, columns: Positions) -> Float64:
        """The format's formula in float64 for single pairs of a vector and a centroid."""
        if self.metric is DistanceMetric.L2:
            return canonical_squares(vectors, self._exact, rows, columns)
        products = canonical_products(vectors, self._exact, rows, columns)
        if self.metric is DistanceMetric.DOT_PRODUCT:
            return -products
        lengths = np.sqrt(canonical_products(vectors, vectors, rows, rows))
        cosine = 1.0 - products / (self._norms[columns] * lengths + _COSINE_EPSILON)
        return np.where(lengths == 0, 1.0, cosine)


def train_centroids(sample: Float32, *, num_dbs: int, metric: DistanceMetric, seed: int, max_iter: int) -> Trained:
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

    Returns:
        Centroids, shape (num_dbs, dim), of unit length for cosine and dot_product. Figures: ``inertia``, mean squared
        distance of a sample vector to its nearest centre; ``distinct``, number of different centroids (fewer than
        num_dbs means shards that stay empty); ``rounds`` of k-means.

    Raises:
        ConfigError: fewer sample vectors than shards.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if len(sample) < num_dbs:
        raise ConfigError(f"num_dbs {num_dbs} is more than the {len(sample)} vectors to train on; use fewer shards")
    unit = metric is not DistanceMetric.L2
    # A power of two changes no digit; numbers near 1 leave float32 room for the squares that k-means adds up.
    power = 0 if unit else power_of(sample)
    data = _unit_rows(sample) if unit else np.ldexp(sample, -power)
    # One thread: with several, the order of additions, and so the centroids, would vary from run to run.
    with threadpool_limits(1), warnings.catch_warnings():
        # Fewer distinct vectors than shards are legal, and reported as `distinct`.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # Its stubs know only the string that n_init may be.
        one: Any = 1
        model: Any = KMeans(num_dbs, init="k-means++", n_init=one, max_iter=max_iter, tol=1e-4, random_state=seed)
        model.fit(data)
    centres = np.asarray(model.cluster_centers_, dtype=np.float32)
    centroids = _unit_rows(centres) if unit else np.ldexp(centres, power)
    figures = {
        "inertia": math.ldexp(float(model.inertia_) / len(sample), 2 * power),
        "distinct": len(np.unique(centroids, axis=0)),
        "rounds": int(model.n_iter_),
    }
    return Trained("centroids", centroids, figures)


def _unit_rows(rows: Float32) -> Float32:
    wide = rows.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0).astype(np.float32)
