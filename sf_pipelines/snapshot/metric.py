"""The distance of a snapshot, in one definition for every index, backend and reader.

A score is what people see, lower is better:

* ``cosine``: ``1 - cos(x, y)``, between 0 and 2;
* ``l2``: squared Euclidean, ``sum((x - y)**2)``;
* ``dot_product``: ``1 - x·y`` (may be negative).

Rows are ranked and compared by their *distance*: the score before anything is rounded off it. Beside 1 a small product
vanishes, and 1 less a cosine near 1 has lost what tells nearly parallel vectors apart. So the distance of
``dot_product`` is ``-x·y``, the score less 1, and that of ``cosine`` comes from the difference of the unit vectors.
"""

import math
from collections.abc import Callable, Iterator
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Floats = Float32 | Float64
Positions = NDArray[np.intp] | NDArray[np.int64]

EPS = float(np.finfo(np.float32).eps)
# Smallest product that float32 holds with full precision; below it, each product may lose this much.
_TINY = float(np.finfo(np.float32).tiny)
# Float32 numbers that one block touches: bounds the memory, and is large enough for BLAS threads to pay off.
_BLOCK_CELLS = 1 << 21
# Numbers in one float64 table of pairs: bounds the memory.
_PAIR_CELLS = 4_000_000
# Rounding to float16 changes a normal number by at most 2**-11 of it.
_FLOAT16_LOSS = 2.0**-10
# Cosine distance of vectors of one direction whose unit vectors differ by rounding. Those of two float32 vectors of
# different directions differ by more.
_PARALLEL = (4 * float(np.finfo(np.float64).eps)) ** 2 / 2


class DistanceMetric(StrEnum):
    """How far two vectors are from each other; accepts its string."""

    COSINE = "cosine"
    L2 = "l2"
    DOT_PRODUCT = "dot_product"

    @property
    def normalises(self) -> bool:
        """Whether a vector's length is ignored, so that a zero vector has no direction and is refused."""
        return self is DistanceMetric.COSINE

    @property
    def score_of_zero(self) -> float:
        """What is added to a distance to make it a score."""
        return 1.0 if self is DistanceMetric.DOT_PRODUCT else 0.0


def pair_distances(queries: Float32, rows: Float32, metric: DistanceMetric) -> Float64:
    """Exact distance of each query to the row beside it, both of shape (n, dim); see the module for the scores."""
    q, r = queries.astype(np.float64), rows.astype(np.float64)
    # Zero has no direction, and a vector of another writer may hold infinity: then the distance is no number.
    with np.errstate(invalid="ignore"):
        if metric is DistanceMetric.DOT_PRODUCT:
            return -np.vecdot(q, r)
        if metric is DistanceMetric.L2:
            q -= r
            return np.vecdot(q, q)
        squares = np.vecdot(q, q), np.vecdot(r, r)
        q /= np.sqrt(squares[0])[:, None]
        r /= np.sqrt(squares[1])[:, None]
        q -= r
        distances = np.vecdot(q, q) / 2
    distances[distances <= _PARALLEL] = 0.0
    return np.where((squares[0] == 0) | (squares[1] == 0), 1.0, distances)


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


# Products with centroids or hyperplanes: fast in float32 with a known error, canonical in float64.


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices over ``rows`` rows, each row touching ``width`` numbers."""
    step = max(256, _BLOCK_CELLS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def lengths_of(vectors: Float32) -> Float32:
    """Euclidean lengths, shape (n,), to about ``dim`` roundings of float32."""
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors))


def power_of(vectors: Float32) -> int:
    """Exponent of two that scales the largest number into [0.5, 1)."""
    return math.frexp(float(np.abs(vectors).max(initial=0.0)))[1]


def product_bound(vectors: Float32, longest: float) -> Float32:
    """Largest error of the float32 product of each vector with any trained row.

    ``|fl(x.y) - x.y| <= n eps |x||y|`` for any order of additions (Higham, Accuracy and Stability, 3.1), with room for
    the rounding of the lengths themselves, and for numbers too small for full precision.

    Args:
        vectors: float32, shape (n, dim).
        longest: length of the longest trained row.

    Returns:
        Shape (n,).
    """
    dim = vectors.shape[1]
    factor = np.float32((dim + 8) * EPS * (1 + dim * EPS) * longest * 1.01)
    # A length whose square underflowed may be as large as the root of what was lost.
    floor = np.float32(np.sqrt(dim * _TINY))
    return (lengths_of(vectors) + floor) * factor + np.float32(4 * dim * _TINY)


def canonical_products(vectors: Floats, exact: Floats, rows: Positions, columns: Positions) -> Float64:
    """Products of single pairs in float64, added in one fixed order whatever the batch.

    Args:
        vectors: shape (n, dim).
        exact: shape (m, dim).
        rows: rows of ``vectors``, one per pair.
        columns: rows of ``exact``, one per pair.

    Returns:
        Shape (pairs,).
    """
    return _summed(vectors, exact, rows, columns, np.multiply)


def canonical_squares(vectors: Floats, exact: Floats, rows: Positions, columns: Positions) -> Float64:
    """Squared Euclidean distances of single pairs; arguments as in ``canonical_products``."""
    return _summed(vectors, exact, rows, columns, lambda a, b: np.square(b - a))


def _summed(
    vectors: Floats,
    exact: Floats,
    rows: Positions,
    columns: Positions,
    combine: Callable[[Float64, Float64], Float64],
) -> Float64:
    out = np.empty(len(rows), dtype=np.float64)
    step = max(1, _PAIR_CELLS // exact.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        pairs = combine(vectors[rows[part]].astype(np.float64), exact[columns[part]].astype(np.float64))
        out[part] = pairs.sum(axis=1)
    return out
