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


# Rounding to float16 changes a normal number by at most 2**-11 of it.
_FLOAT16_LOSS = 2.0**-10


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


def as_float16(vectors: Float32, metric: DistanceMetric) -> tuple[Float32, NDArray[np.bool_]]:
    """Vectors rounded to float16, and which of them float16 can stand for.

    Under cosine a vector of tiny numbers would lose its direction to rounding; such a vector, and one with numbers
    beyond float16, is never stored, so a query that is like that is no stored row.

    Args:
        vectors: float32, shape (n, dim).
        metric: declared metric.

    Returns:
        float32, shape (n, dim), infinite where float16 ends; and a mask of shape (n,).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = vectors.astype(np.float16).astype(np.float32)
        kept: NDArray[np.bool_] = np.asarray(np.isfinite(rounded).all(axis=1))
        if metric.normalises:
            change = rounded - vectors
            lost = np.einsum("ij,ij->i", change, change, dtype=np.float64)
            size = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
            kept = np.logical_and(kept, lost <= _FLOAT16_LOSS**2 * size)
    return rounded, kept
