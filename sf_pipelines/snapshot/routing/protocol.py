"""What the build, the gate and the readers ask of a way to shard rows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.metric import Float32, Float64

Int32 = NDArray[np.int32]


class BaseRouting(ABC):
    """A way to shard. Immutable and thread-safe.

    Attributes:
        strategy: its name in the manifest.
        num_dbs: number of shards.
    """

    strategy: ClassVar[str]
    num_dbs: int

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the manifest says of it; addresses of stored matrices are added where they are known."""


class VectorRouting(BaseRouting):
    """The vector decides; a query is sent to the shards where its neighbours most likely are.

    Attributes:
        matrix: what was trained: float32, one row per centroid or hyperplane.
        dim: numbers in a vector.
    """

    matrix: Float32
    dim: int

    @abstractmethod
    def assign(self, vectors: Float32) -> Int32:
        """Shard of each vector.

        Args:
            vectors: float32, shape (n, dim), as they are stored.

        Returns:
            Shape (n,).
        """

    @abstractmethod
    def probe(self, vectors: Float32) -> tuple[Int32, Float64]:
        """All shards in the order in which to ask them, and how far away each is.

        A vector's first probe is the shard that ``assign`` gives it.

        Returns:
            Shard ids and distances, both of shape (n, num_dbs).
        """

    @abstractmethod
    def stock_probe(self, vectors: Float32, num_probes: int) -> Int32:
        """The shards that a stock reader asks, in its order.

        Returns:
            Shape (n, num_probes); -1 where it finds no more.
        """


@dataclass(frozen=True)
class Placement:
    """Shards of a batch of rows.

    Attributes:
        shards: shape (n,); -1 for a row that has none.
        faults: why, by row, for each of these.
    """

    shards: Int32
    faults: dict[int, str] = field(default_factory=dict)


class RowRouting(BaseRouting):
    """Columns of the row decide; a query says which values it is about, or asks all shards.

    Attributes:
        columns: names of the values that decide, as in a query's ``routing_context``.
    """

    columns: tuple[str, ...]

    @abstractmethod
    def place(self, rows: pa.RecordBatch) -> Placement:
        """Shard of each row.

        Args:
            rows: the columns named by ``columns``; others are ignored.
        """

    @abstractmethod
    def locate(self, context: Mapping[str, Any]) -> int:
        """Shard of the rows with these values.

        Raises:
            QueryError: a value is missing, unknown or of the wrong type, or names no shard; or this strategy
                does not route queries.
        """

    @abstractmethod
    def check_schema(self, schema: pa.Schema) -> None:
        """Looks at the types of the columns that ``place`` will be given.

        Raises:
            SourceSchemaError: one cannot be used.
        """


# Either the vector decides, or other columns of the row do.
Routing = VectorRouting | RowRouting
