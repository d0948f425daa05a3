"""What the build, the gate and the readers ask of a way to shard vectors."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sf_pipelines.snapshot.metric import Float32, Float64

Int32 = NDArray[np.int32]


class Routing(Protocol):
    """Which shard holds a vector, and which shards to ask for a query. Thread-safe, immutable."""

    strategy: str
    num_dbs: int

    def assign(self, vectors: Float32) -> Int32:
        """Shard of each vector, shape (n, dim) to (n,)."""
        ...

    def probe(self, vectors: Float32) -> tuple[Int32, Float64]:
        """All shards in the order in which to ask them, and their distances.

        A vector's first probe is the shard that ``assign`` gives it.

        Returns:
            Shard ids and distances, both of shape (n, num_dbs).
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Fields of the manifest's ``custom.vector`` that say how vectors are sharded."""
        ...
