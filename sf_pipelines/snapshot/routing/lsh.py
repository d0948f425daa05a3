"""LSH: a shard is made of cells between hyperplanes through the origin.

Bit ``i`` of a vector's code is its side of hyperplane ``i`` (row 0 is the least significant bit); its shard is the code
modulo the number of shards. One float32 matrix product decides a batch; a vector nearer to a hyperplane than the
product's error bound is decided again in float64 with one fixed order of additions.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.metric import Float32, Float64, blocks, canonical_products, product_bound
from sf_pipelines.snapshot.routing.protocol import Int32, VectorRouting

# A cell's number is a 64-bit integer; some bits stay free.
MOST_BITS = 62

Bits = NDArray[np.bool_]
Int64 = NDArray[np.int64]


class LshRouting(VectorRouting):
    """Routing by the signs of projections.

    Attributes:
        hyperplanes: float32, shape (num_hash_bits, dim): their normals.
        num_dbs: number of shards.
        num_hash_bits: number of hyperplanes.
        stock_order: whether ``probe`` starts with the shards that a stock reader asks, in its order.

    Raises:
        ConfigError: no hyperplane, or more than 62.
    """

    strategy = "lsh"

    def __init__(self, hyperplanes: Float32, num_dbs: int, stock_order: bool = False) -> None:
        self.hyperplanes = np.array(hyperplanes, dtype=np.float32, order="C", ndmin=2)
        self.hyperplanes.setflags(write=False)
        self.matrix = self.hyperplanes
        self.num_dbs = num_dbs
        self.stock_order = stock_order
        self.num_hash_bits, self.dim = self.hyperplanes.shape
        if not 1 <= self.num_hash_bits <= MOST_BITS:
            raise ConfigError(f"lsh has {self.num_hash_bits} hyperplanes; use 1 to {MOST_BITS}")
        self._exact = self.hyperplanes.astype(np.float64)
        self._norms = np.sqrt(np.square(self._exact).sum(axis=1))

    def assign(self, vectors: Float32) -> Int32:
        return (self.codes(vectors) % self.num_dbs).astype(np.int32)

    def codes(self, vectors: Float32) -> Int64:
        """Cell of each vector, 0 to ``2**num_hash_bits - 1``; a vector on a hyperplane, or zero, has that bit 0."""
        codes = np.empty(len(vectors), dtype=np.int64)
        for part in blocks(len(vectors), self.dim + self.num_hash_bits):
            block = vectors[part]
            # Overflow makes the bound infinite or the product NaN: both are decided again.
            with np.errstate(over="ignore", invalid="ignore"):
                products = block @ self.hyperplanes.T
                bound = product_bound(block, self._norms.max())
                rows, planes = np.nonzero(~(np.abs(products) > bound[:, None]))
            if len(rows):
                exact = canonical_products(block, self._exact, rows, planes)
                # Only the sign counts, and a small number must not become zero in float32.
                products[rows, planes] = np.sign(exact)
            codes[part] = _packed(products > 0)
        return codes

    def probe(self, vectors: Float32) -> tuple[Int32, Float64]:
        """All shards by the distance of their nearest cell.

        A cell's distance is the sum of the squared distances to the hyperplanes between it and the vector (the
        query-directed probing sequence of Lv et al., Multi-probe LSH, VLDB 2007). Bit after bit, the cheapest way to
        each remainder of the code gives the distances of all shards at once, without listing cells. The vector's own
        shard comes first, at 0; shards that no code reaches come last, at infinity. With ``stock_order`` the shards
        that a stock reader asks come first, in its order.

        Returns:
            Shard ids and distances, both of shape (n, num_dbs); without ``stock_order`` the distances grow.
        """
        projections = self._projections(vectors)
        bits = projections > 0
        costs = np.square(np.divide(projections, self._norms, out=np.zeros_like(projections), where=self._norms > 0))
        distances = np.full((len(vectors), self.num_dbs), np.inf)
        distances[:, 0] = 0.0
        for bit in range(self.num_hash_bits):
            side, cost = bits[:, bit, None], costs[:, bit, None]
            unset = distances + np.where(side, cost, 0.0)
            as_set = np.roll(distances, (1 << bit) % self.num_dbs, axis=1) + np.where(side, 0.0, cost)
            distances = np.minimum(unset, as_set)
        rank = distances.copy()
        first = self._stock_probe(bits, self.num_dbs if self.stock_order else 1)
        rows, places = np.nonzero(first >= 0)
        rank[rows, first[rows, places]] = places - float(self.num_dbs)
        order = np.argsort(rank, axis=1, kind="stable").astype(np.int32)
        return order, np.take_along_axis(distances, order, axis=1)

    def stock_probe(self, vectors: Float32, num_probes: int) -> Int32:
        """The vector's own shard, then those with one bit of its code flipped, from the first bit on."""
        return self._stock_probe(self._projections(vectors) > 0, num_probes)

    def describe(self) -> dict[str, Any]:
        return {"sharding_strategy": self.strategy, "num_hash_bits": self.num_hash_bits}

    def _projections(self, vectors: Float32) -> Float64:
        """Canonical products with all hyperplanes, shape (n, num_hash_bits)."""
        out = np.empty((len(vectors), self.num_hash_bits), dtype=np.float64)
        rows = np.arange(len(vectors))
        for plane in range(self.num_hash_bits):
            out[:, plane] = canonical_products(vectors, self._exact, rows, np.full(len(vectors), plane))
        return out

    def _stock_probe(self, bits: Bits, num_probes: int) -> Int32:
        codes = _packed(bits)
        flips = np.concatenate([[0], 1 << np.arange(self.num_hash_bits, dtype=np.int64)])
        shards = (codes[:, None] ^ flips[None, :]) % self.num_dbs
        seen = np.zeros(shards.shape, dtype=bool)
        for place in range(1, shards.shape[1]):
            seen[:, place] = (shards[:, :place] == shards[:, place, None]).any(axis=1)
        order = np.argsort(seen, axis=1, kind="stable")[:, :num_probes]
        found = np.where(np.take_along_axis(seen, order, axis=1), -1, np.take_along_axis(shards, order, axis=1))
        out = np.full((len(bits), num_probes), -1, dtype=np.int32)
        out[:, : found.shape[1]] = found
        return out


def _packed(bits: Bits) -> Int64:
    """Rows of bits as whole numbers, the first bit least significant."""
    octets = np.packbits(bits, axis=1, bitorder="little")
    wide = np.zeros((len(bits), 8), dtype=np.uint8)
    wide[:, : octets.shape[1]] = octets
    return wide.view("<i8").ravel()
