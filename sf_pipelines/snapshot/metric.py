"""The distance of a snapshot, in one definition for every index, backend and reader.

A score is a distance, lower is better:

* ``cosine``: ``1 - cos(x, y)``, between 0 and 2;
* ``l2``: squared Euclidean, ``sum((x - y)**2)``;
* ``dot_product``: ``1 - x·y`` (may be negative).
"""

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


class DistanceMetric(StrEnum):
    """How far two vectors are from each other; accepts its string."""

    COSINE = "cosine"
    L2 = "l2"
    DOT_PRODUCT = "dot_product"

    @property
    def normalises(self) -> bool:
        """Whether a vector's length is ignored, so that a zero vector has no direction and is refused."""
        return self is DistanceMetric.COSINE


def pair_distances(queries: Float32, rows: Float32, metric: DistanceMetric) -> Float64:
    """Exact distance of each query to the row beside it, both of shape (n, dim)."""
    q, r = queries.astype(np.float64), rows.astype(np.float64)
    if metric is DistanceMetric.L2:
        q -= r
        return np.einsum("ij,ij->i", q, q)
    products = np.einsum("ij,ij->i", q, r)
    if metric is DistanceMetric.COSINE:
        # The root of the product, not the product of the roots: a vector is then at exactly 0 from itself.
        norms = np.sqrt(np.einsum("ij,ij->i", q, q) * np.einsum("ij,ij->i", r, r))
        products = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    return 1.0 - products
