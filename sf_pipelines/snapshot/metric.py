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

# Rows x queries of one exact block: 4 million float64 are 32 MB.
_BLOCK = 4_000_000


class DistanceMetric(StrEnum):
    """How far two vectors are from each other; accepts its string."""

    COSINE = "cosine"
    L2 = "l2"
    DOT_PRODUCT = "dot_product"

    @property
    def normalises(self) -> bool:
        """Whether a vector's length is ignored, so that a zero vector has no direction and is refused."""
        return self is DistanceMetric.COSINE


def exact_distances(queries: Float32, rows: Float32, metric: DistanceMetric) -> Float64:
    """Distance of each query to its own candidates, in float64.

    Args:
        queries: shape (n, dim).
        rows: shape (n, candidates, dim), or (candidates, dim) for candidates that all queries share.
        metric: the declared metric.

    Returns:
        Shape (n, candidates).
    """
    q = queries.astype(np.float64)
    if rows.ndim == 2:
        return _shared_distances(q, rows.astype(np.float64), metric)
    out = np.empty(rows.shape[:2], dtype=np.float64)
    step = max(1, _BLOCK // max(1, rows.shape[1] * rows.shape[2]))
    for start in range(0, len(q), step):
        part = slice(start, start + step)
        r = rows[part].astype(np.float64)
        if metric is DistanceMetric.L2:
            out[part] = np.square(r - q[part, None, :]).sum(axis=2)
            continue
        dots = np.matmul(r, q[part, :, None])[:, :, 0]
        if metric is DistanceMetric.COSINE:
            squares = np.einsum("ij,ij->i", q[part], q[part])[:, None] * np.einsum("ijk,ijk->ij", r, r)
            norms = np.sqrt(squares)
            dots = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
        out[part] = 1.0 - dots
    return out


def _shared_distances(q: Float64, r: Float64, metric: DistanceMetric) -> Float64:
    if metric is DistanceMetric.L2:
        # Not the expanded square: it cancels badly exactly where neighbours are close.
        out = np.empty((len(q), len(r)), dtype=np.float64)
        step = max(1, _BLOCK // max(1, r.size))
        for start in range(0, len(q), step):
            part = slice(start, start + step)
            out[part] = np.square(r[None, :, :] - q[part, None, :]).sum(axis=2)
        return out
    dots = q @ r.T
    if metric is DistanceMetric.COSINE:
        norms = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(r, axis=1)[None, :]
        dots = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
    return 1.0 - dots
