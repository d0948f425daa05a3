"""Inner products of the vectors of shards with queries, on as many cores as are idle.

BLAS spreads a product over all cores by itself, which is best for one large product. For a few queries it is not: the
product takes as long as reading the vectors does, and where several threads search at once its own threads wait for
each other in busy loops (eight searching threads on two cores: 12 queries/s over three shards of 9.6 MB; 520 with
products that BLAS does not spread). So products with a few queries are cut into pieces, small enough to be left to one
core, which the threads of a pool share; a single query that has all cores to itself is left to BLAS.
"""

import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from sf_pipelines.snapshot.metric import Float32

# OpenBLAS leaves a product of up to so many multiplications to one thread.
_ONE_THREAD = 262_144
# Rows of such a product: with fewer it is the calls that take the time, more do not make it faster.
_LEAST_ROWS, _MOST_ROWS = 16, 128
# Numbers of the vectors in a piece: 2 MB, 0.2 ms for one query.
_PIECE = 500_000
_CORES = os.cpu_count() or 1
# One thread at a time lets BLAS spread a product: a second one would only wait busily for the first.
_spreading = threading.Lock()
# Nobody is in the middle of a product when this process forks: the child's copy would be locked for ever.
os.register_at_fork(before=_spreading.acquire, after_in_parent=_spreading.release, after_in_child=_spreading.release)

Piece = tuple[Float32, Float32, Float32]


def products(pairs: Sequence[tuple[Float32, Float32]], pool: Executor | None = None) -> list[Float32]:
    """The inner products of each pair of vectors and queries, up to float32 rounding in any order.

    Args:
        pairs: float32, shapes (rows, dim) and (n, dim).
        pool: threads that may help; None where all cores are busy. Nothing waits for one that does not begin.

    Returns:
        Shape (rows, n) each. With the large matrix first BLAS is up to twice as fast.
    """
    out: list[Float32] = []
    pieces: deque[Piece] = deque()
    for vectors, queries in pairs:
        keys = np.empty((len(vectors), len(queries)), dtype=np.float32)
        columns = np.ascontiguousarray(queries.T)
        out.append(keys)
        if not keys.size:
            continue
        if pool is not None and len(queries) == 1 and _spreading.acquire(blocking=False):
            # Where all cores are idle BLAS reads the vectors for a single query a third faster than our threads do.
            try:
                np.matmul(vectors, columns, out=keys)
            finally:
                _spreading.release()
        elif rows_of_piece(*columns.shape):
            step = max(1, _PIECE // vectors.shape[1])
            pieces += [(vectors[at : at + step], columns, keys[at : at + step]) for at in range(0, len(vectors), step)]
        else:
            with _spreading:
                np.matmul(vectors, columns, out=keys)
    helpers = [pool.submit(_multiply, pieces) for _ in range(min(_CORES, len(pieces)) - 1)] if pool else []
    _multiply(pieces)
    for helper in helpers:
        if not helper.cancel():
            helper.result()
    return out


def rows_of_piece(dim: int, queries: int) -> int:
    """Rows that BLAS multiplies with so many queries on one core; 0 where that is slower than on all of them."""
    if queries == 1:
        return _MOST_ROWS
    rows = min(_MOST_ROWS, _ONE_THREAD // max(1, dim * queries))
    return rows if rows >= _LEAST_ROWS else 0


def _multiply(pieces: deque[Piece]) -> None:
    """Takes pieces until there are no more."""
    while True:
        try:
            vectors, columns, keys = pieces.popleft()
        except IndexError:
            return
        dim, queries = columns.shape
        if queries == 1:
            np.vecdot(vectors, columns[:, 0], out=keys[:, 0])
            continue
        rows = rows_of_piece(dim, queries)
        end = len(vectors) // rows * rows
        np.matmul(vectors[:end].reshape(-1, rows, dim), columns, out=keys[:end].reshape(-1, rows, queries))
        np.matmul(vectors[end:], columns, out=keys[end:])
