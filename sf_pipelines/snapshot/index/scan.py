"""Exact search over a shard's vectors held in memory.

A float32 matrix product gives every row a rough key; only rows that by a proven bound on its error may belong to the
nearest are scored in float64. Candidates of several shards are compared by their keys first.
"""

import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from sf_pipelines.snapshot.index.ranking import (
    IdArray,
    Ids,
    Int64,
    ShardHits,
    first_k,
    id_ranks,
    id_values,
    is_numbers,
    most_repeats,
    take_ids,
)
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, Float64, pair_distances

_EPS = float(np.finfo(np.float32).eps)
_EPS64 = float(np.finfo(np.float64).eps)
# The smallest normal float32: what a product below it loses, if such numbers are taken for 0.
_TINY = float(np.finfo(np.float32).tiny)
# Beyond these lengths float32 has no room for squares, products or inverse lengths: every pair is decided in float64.
_SHORTEST, _LONGEST, _LARGEST_PRODUCT = 2.0**-60, 2.0**60, 2.0**96
# Lengths that differ by less than this part are one for the rough keys: their bound is wider than that by far.
_SAME_LENGTH = 1e-6
# Numbers of one block of candidates: 4 million float64 are 32 MB.
_BLOCK = 4_000_000
# Numbers of the vectors scored at a time: 100,000 float64 are 0.8 MB, which stays in the cache.
_SCORED = 100_000
# Blocks of rows whose best keys bound the k-th best, and so many for each hit: then few of the k best share a block.
_BLOCKS, _BLOCKS_PER_HIT = 256, 8
# Candidates of a query and hit from which they are decided at once, so that equal rows do not fill the memory.
_CROWD = 16
# For a few queries a product takes as long as reading the vectors does, and where several threads search, those of BLAS
# wait for each other in busy loops (12 queries/s instead of 520). So these products are cut into pieces that BLAS
# leaves to one core, and a pool's threads share them. OpenBLAS does so up to this many multiplications.
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
# Query, position and key of each candidate, and the best keys of each query.
Keyed = tuple[Int64, Int64, Float32, Float32]


@dataclass(frozen=True)
class ScanCandidates:
    """Rows of a scan that may belong to the nearest of a batch of queries; nothing that may is missing.

    Attributes:
        scan: that they are from.
        query: query of each candidate, ascending.
        position: of each candidate in the scan.
        key: rough key of each candidate; larger is nearer. Keys of one query can be compared between the shards of a
            snapshot. Infinite where float32 is too coarse.
        bound: most that a key may be off, shape (n,).
        best: keys of different rows among the best of each query, shape (n, min(k, rows)).
    """

    scan: "MemoryScan"
    query: Int64
    position: Int64
    key: Float32
    bound: Float64
    best: Float32


class MemoryScan:
    """All vectors of a shard, ranked by a float32 matrix product and decided in float64. Thread-safe.

    A row with a number that is not finite, which other writers may have stored, is left out: it is in no answer.

    Attributes:
        ids: numpy array of int64 or of objects, int and str mixed; or Arrow array of string.
        rows: row references, ascending.
        vectors: float32, shape (rows, dim).
        metric: declared metric.
        repeats: most rows of one id; more than 1 only in shards of other writers.
        nbytes: memory held; asked after every search, so it is counted once.

    Args:
        lengths: ``lengths_of`` the vectors, where they are known; not finite where the vector is not.
    """

    def __init__(
        self, ids: Ids, rows: Int64, vectors: Float32, metric: DistanceMetric, lengths: Float64 | None = None
    ) -> None:
        lengths = lengths_of(vectors) if lengths is None else lengths
        finite = np.isfinite(lengths)
        if not finite.all():
            ids, rows = take_ids(ids, np.flatnonzero(finite)), rows[finite]
            vectors, lengths = vectors[finite], lengths[finite]
        # Numbers as numpy, of which positions are taken faster.
        self.ids = id_values(ids) if is_numbers(ids) else ids
        self.rows = rows
        self.vectors = vectors
        self.metric = metric
        # Where ids repeat, enough rows are taken for the merge to drop the repeats.
        self.repeats = most_repeats(ids)
        self.nbytes: int = vectors.nbytes + rows.nbytes + ids.nbytes
        self._ranks: Int64 | None = None
        self._set_lengths(lengths)

    def _set_lengths(self, lengths: Float64) -> None:
        """What makes keys of products, and says how far off they may be."""
        self._longest = float(lengths.max(initial=0.0))
        shortest = float(lengths.min(initial=self._longest))
        # One number for all of them is quicker, and unit vectors differ in no more than rounding.
        self._spread = (self._longest - shortest) / self._longest if self._longest else 0.0
        if self._spread <= _SAME_LENGTH:
            lengths = lengths[:1]
        positive = np.where(lengths == 0, 1.0, lengths)
        cosine = self.metric is DistanceMetric.COSINE
        least = float(positive.min(initial=1.0)) if cosine else self._longest or 1.0
        self._by_pairs = self._longest > _LONGEST or least < _SHORTEST
        self._most_inverse = 1.0 / least
        scale = 1.0 / np.maximum(positive, _SHORTEST) if cosine else np.square(np.minimum(lengths, _LONGEST)) / 2
        self._scale = scale.astype(np.float32)

    def search(self, queries: Float32, k: int) -> ShardHits:
        """The true nearest rows; see ``ShardIndex.search``. Of a repeated id there may be several."""
        found = self.candidates(queries, k)
        distances = self.distances(queries, found.query, found.position)
        shape = found.best.shape
        best = first_k(found.query, distances, self.ranks[found.position], *shape)
        position = found.position[best]
        return ShardHits.of(
            found.query[best], self.rows[position], take_ids(self.ids, position), distances[best], shape
        )

    def candidates(
        self,
        queries: Float32,
        k: int,
        *,
        pool: Executor | None = None,
        lengths: Float64 | None = None,
        keys: Float32 | None = None,
    ) -> ScanCandidates:
        """Candidates for the k nearest rows, so many more as ids are repeated.

        Whatever is within twice the bound of the k-th best key is one, so neither the size of the batch nor the order
        of equal rows can change an answer.

        Args:
            queries: finite float32, shape (n, dim).
            k: hits wanted.
            pool: see ``products``.
            lengths: ``lengths_of`` the queries, where they are known.
            keys: ``products`` of the vectors with these queries, where they are known; they are overwritten.
        """
        rows = len(self.rows)
        k = min(k * self.repeats, rows)
        lengths = lengths_of(queries) if lengths is None else lengths
        bound = self._bound(lengths)
        by_pairs = self.too_large(lengths)
        if not k or not len(queries):
            none = np.empty(0, dtype=np.int64)
            return ScanCandidates(self, none, none, np.empty(0, "f4"), bound, np.empty((len(queries), k), "f4"))
        step = max(1, _BLOCK // rows) if keys is None else len(queries)
        parts: list[Keyed] = []
        for at in range(0, len(queries), step):
            part = queries[at : at + step]
            if by_pairs:
                query, position, key, best = self._all_pairs(part, k)
            else:
                table = products([(self.vectors, part)], pool)[0] if keys is None else keys
                query, position, key, best = self._by_keys(part, table, bound[at : at + step], k)
            parts.append((query + at if at else query, position, key, best))
        joined = parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts, strict=True)]
        query, position, key, best = joined
        return ScanCandidates(self, query, position, key, bound, best)

    def distances(self, queries: Float32, query: Int64, position: Int64) -> Float64:
        """The exact distance of each pair of a query and a position; it depends on nothing else."""
        step = max(1, _SCORED // self.vectors.shape[1])
        if len(query) <= step:
            return pair_distances(queries[query], self.vectors[position], self.metric)
        out = np.empty(len(query), dtype=np.float64)
        for at in range(0, len(query), step):
            part = slice(at, at + step)
            out[part] = pair_distances(queries[query[part]], self.vectors[position[part]], self.metric)
        return out

    def ids_at(self, positions: Int64) -> IdArray:
        """Ids at these positions: int64, or objects."""
        return id_values(take_ids(self.ids, positions))

    @property
    def ranks(self) -> Int64:
        """Numbers that sort as the ids of the rows do; those of texts are made when they are first asked for."""
        ranks = self._ranks
        if ranks is None:
            ranks = self._ranks = id_ranks(self.ids)
            self.nbytes += 0 if ranks is self.ids else ranks.nbytes
        return ranks

    def too_large(self, lengths: Float64) -> bool:
        """Whether float32 is too coarse to rank the rows for queries of these lengths."""
        return self._by_pairs or float(lengths.max(initial=0.0)) * max(1.0, self._longest) > _LARGEST_PRODUCT

    def _bound(self, lengths: Float64) -> Float64:
        """Most that the key of a row may be off, for queries of these lengths.

        |fl(x.y) - x.y| <= n eps |x||y| for any order of additions (Higham, Accuracy and Stability, 3.1), and n times
        the smallest number for what is lost below it.
        """
        roundings = self.vectors.shape[1] + 8
        lost = roundings * _TINY
        same = self._spread if self._spread <= _SAME_LENGTH else 0.0
        if self.metric is DistanceMetric.COSINE:
            return (roundings * _EPS + same) * lengths + lost * (1 + self._most_inverse)
        bound = roundings * _EPS * self._longest * lengths + lost * (1 + self._longest)
        if self.metric is DistanceMetric.L2:
            # The last number: distances of a query far away are rounded to the same number, and decided by id.
            far = roundings * _EPS64 * np.square(lengths + self._longest)
            return bound + (4 * _EPS + same) * self._longest**2 + far
        return bound

    def _by_keys(self, queries: Float32, keys: Float32, bound: Float64, k: int) -> Keyed:
        """Rows whose key is within twice the bound of the k-th best."""
        n, factor, offset = len(queries), np.float32(1), np.float32(0)
        if self.metric is DistanceMetric.COSINE:
            if len(self._scale) == 1:
                factor = self._scale[0]
            else:
                keys *= self._scale[:, None]
        elif self.metric is DistanceMetric.L2:
            if len(self._scale) == 1:
                offset = self._scale[0]
            else:
                keys -= self._scale[:, None]
        best = _best_keys(keys, k)
        # In float32, rounded down: a float64 threshold would widen the whole table.
        with np.errstate(over="ignore"):
            threshold = (best[:, 0] - 2 * bound / factor).astype(np.float32)
        least = np.nextafter(threshold, np.float32(-np.inf))
        # Of a table with one axis numpy finds what is not zero twenty times faster.
        flat = np.flatnonzero(keys >= least)
        if len(flat) > _CROWD * k * n:
            query, position = self._decided(queries, flat, k)
        elif n == 1:
            query, position = np.zeros(len(flat), dtype=np.int64), flat
        else:
            position, query = np.divmod(flat, n)
            order = np.argsort(query, kind="stable")
            query, position = query[order], position[order]
        return query, position, keys[position, query] * factor - offset, best * factor - offset

    def _all_pairs(self, queries: Float32, k: int) -> Keyed:
        """The same where float32 is too coarse: the k nearest themselves."""
        query, position = self._decided(queries, np.arange(len(queries) * len(self.rows)), k)
        keys = np.full(len(query), np.inf, dtype=np.float32)
        return query, position, keys, np.full((len(queries), k), -np.inf, dtype=np.float32)

    def _decided(self, queries: Float32, flat: Int64, k: int) -> tuple[Int64, Int64]:
        """Query and position of the k nearest among cells of the table (rows, queries)."""
        position, query = np.divmod(flat, len(queries))
        distances = self.distances(queries, query, position)
        best = first_k(query, distances, self.ranks[position], len(queries), k)
        return query[best], position[best]


def _best_keys(keys: Float32, k: int) -> Float32:
    """Keys of k different rows for each query, as good as cheaply found, the least of them first.

    The best of a block of rows is a row: the k-th largest of such bests is a lower bound of the k-th best key, and a
    tight one where the blocks are many. Finding it costs one pass over the keys, a partition of all of them eight.

    Args:
        keys: shape (rows, n).
        k: at most ``rows``.

    Returns:
        Shape (n, k), not ordered but for the first.
    """
    rows, n = keys.shape
    blocks = max(_BLOCKS, _BLOCKS_PER_HIT * k)
    width = rows // blocks
    if width < 2:
        maxima = keys
        blocks = rows
    else:
        maxima = keys[: width * blocks].reshape(width, blocks * n).max(axis=0).reshape(blocks, n)
        rest = rows - width * blocks
        np.maximum(maxima[:rest], keys[width * blocks :], out=maxima[:rest])
    return np.partition(np.ascontiguousarray(maxima.T), blocks - k, axis=1)[:, blocks - k :]


def scan_all(
    queries: Float32, jobs: Sequence[tuple[MemoryScan, Int64]], k: int, pool: Executor | None = None
) -> list[ScanCandidates]:
    """``MemoryScan.candidates`` of several scans, on as many cores as help.

    Args:
        queries: of all of them, finite float32, shape (n, dim).
        jobs: scan, with the queries that ask it; their numbers ascend.
        k: hits wanted.
        pool: see ``products``.
    """
    lengths = lengths_of(queries)

    def part_of(which: Int64) -> Float32:
        return queries if len(which) == len(queries) else queries[which]

    if sum(len(scan.rows) * len(which) for scan, which in jobs) > _BLOCK:
        # Shard by shard, so that no more than one has its queries copied at a time.
        return [scan.candidates(part_of(which), k, pool=pool, lengths=lengths[which]) for scan, which in jobs]
    asked = [(scan, part_of(which), lengths[which]) for scan, which in jobs]
    ready = [place for place, (scan, _, size) in enumerate(asked) if not scan.too_large(size)]
    tables = products([(asked[place][0].vectors, asked[place][1]) for place in ready], pool)
    keys = dict(zip(ready, tables, strict=True))
    return [
        scan.candidates(part, k, lengths=size, keys=keys.get(place)) for place, (scan, part, size) in enumerate(asked)
    ]


def exact_distances(queries: Float32, parts: Sequence[tuple[MemoryScan, Int64, Int64]]) -> Float64:
    """The exact distances of pairs from several scans of one metric, one after the other.

    Args:
        queries: shape (n, dim).
        parts: scan, with query and position of each pair.
    """
    pairs = sum(len(query) for _, query, _ in parts)
    if len(parts) < 2 or pairs * queries.shape[1] > _SCORED:
        distances = [scan.distances(queries, query, position) for scan, query, position in parts]
        return np.concatenate(distances) if distances else np.empty(0)
    # Few pairs, as of a single query: calls cost more than the work.
    vectors = np.concatenate([scan.vectors[position] for scan, _, position in parts])
    query = np.concatenate([query for _, query, _ in parts])
    return pair_distances(queries[query], vectors, parts[0][0].metric)


def lengths_of(vectors: Float32) -> Float64:
    """Euclidean length of each vector, in float64: finite wherever the vector is."""
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))


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
