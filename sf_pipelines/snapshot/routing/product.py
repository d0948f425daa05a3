"""Products of vectors with trained rows: quick in float32 with a known error, canonical in float64."""

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from sf_pipelines.snapshot.metric import Float32, Float64

EPS = float(np.finfo(np.float32).eps)
# The smallest product that float32 holds with full precision; below it, each may lose this much.
_TINY = float(np.finfo(np.float32).tiny)
# Float32 numbers that one block touches: bounds the memory, and is large enough for the product's threads to pay off.
_BLOCK_CELLS = 1 << 21
# Numbers of one float64 table of pairs: bounds the memory.
_PAIR_CELLS = 4_000_000

Floats = Float32 | Float64
Places = NDArray[np.intp] | NDArray[np.int64]


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of ``rows`` rows of which each touches ``width`` numbers."""
    step = max(256, _BLOCK_CELLS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def lengths_of(vectors: Float32) -> Float32:
    """Euclidean lengths, shape (n,), to about ``dim`` roundings of float32."""
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors))


def power_of(vectors: Float32) -> int:
    """Power of two of the largest number: divided by it, that is below 1 and at least a half."""
    return math.frexp(float(np.abs(vectors).max(initial=0.0)))[1]


def product_bound(vectors: Float32, longest: float) -> Float32:
    """How far the float32 product of each vector with any trained row may be from the true one.

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
    # A length whose square vanished may in truth be as long as the root of what vanished.
    floor = np.float32(np.sqrt(dim * _TINY))
    return (lengths_of(vectors) + floor) * factor + np.float32(4 * dim * _TINY)


def canonical_products(vectors: Floats, exact: Floats, rows: Places, columns: Places) -> Float64:
    """Products of single pairs in float64, added in one fixed order whatever the batch.

    Args:
        vectors: shape (n, dim).
        exact: shape (m, dim).
        rows: of ``vectors``, one per pair.
        columns: rows of ``exact``, one per pair.

    Returns:
        Shape (pairs,).
    """
    return _summed(vectors, exact, rows, columns, np.multiply)


def canonical_squares(vectors: Floats, exact: Floats, rows: Places, columns: Places) -> Float64:
    """Squared Euclidean distances of single pairs, as ``canonical_products``."""
    return _summed(vectors, exact, rows, columns, lambda a, b: np.square(b - a))


def _summed(
    vectors: Floats, exact: Floats, rows: Places, columns: Places, combine: Callable[[Float64, Float64], Float64]
) -> Float64:
    out = np.empty(len(rows), dtype=np.float64)
    step = max(1, _PAIR_CELLS // exact.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        pairs = combine(vectors[rows[part]].astype(np.float64), exact[columns[part]].astype(np.float64))
        out[part] = pairs.sum(axis=1)
    return out
