"""How a row finds its shard: the interface that the build, the gate and the readers use."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import plain_type
from sf_pipelines.snapshot.errors import SourceSchemaError
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
        """Fields for the manifest; references to stored matrices are added by the build."""


class VectorRouting(BaseRouting):
    """The vector decides; a query goes to the shards that most likely hold its neighbours.

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
        """All shards in the order to ask them, and their distances; the first is the shard of ``assign``.

        Returns:
            Shard ids and distances, both of shape (n, num_dbs).
        """

    @abstractmethod
    def stock_probe(self, vectors: Float32, num_probes: int) -> Int32:
        """The shards that a stock reader asks, in its order.

        Returns:
            Shape (n, num_probes); -1 where there are no more.
        """


@dataclass(frozen=True)
class Placement:
    """Shards of a batch of rows.

    Attributes:
        shards: shape (n,); -1 for a row without one.
        faults: why such a row has none, by row.
    """

    shards: Int32
    faults: dict[int, str] = field(default_factory=dict)


class RowRouting(BaseRouting):
    """Columns of the row decide; a query gives their values in ``routing_context``, or asks all shards.

    Attributes:
        columns: names of these columns.
    """

    columns: tuple[str, ...]

    @abstractmethod
    def place(self, rows: pa.RecordBatch) -> Placement:
        """Shard of each row, by the columns named in ``columns``; others are ignored.

        Raises:
            SourceSchemaError: a column is missing or of a type that cannot be used.
        """

    @abstractmethod
    def locate(self, context: Mapping[str, Any]) -> int:
        """Shard of the rows with these values.

        Raises:
            QueryError: a value is missing, unknown or of the wrong type; or this strategy does not route queries.
            NoShardError: no row can have these values.
        """

    @abstractmethod
    def check_schema(self, schema: pa.Schema) -> None:
        """Checks the columns that ``place`` will be given.

        Raises:
            SourceSchemaError: one is missing or of a type that cannot be used.
        """

    def _column_type(self, schema: pa.Schema, name: str) -> pa.DataType:
        found = schema.get_all_field_indices(name)
        if len(found) != 1:
            there = "there is none" if not found else f"there are {len(found)}"
            raise SourceSchemaError(
                f"{self.strategy} sharding needs one column {name!r}, but {there} ({', '.join(schema.names)})"
            )
        return plain_type(schema.field(found[0]).type, uuids=False)


Routing = VectorRouting | RowRouting


@dataclass(frozen=True)
class Trained:
    """Centroids or hyperplanes, learnt from the training sample.

    Attributes:
        kind: what the rows of ``matrix`` are.
        matrix: float32, one row per centroid or hyperplane.
        figures: how well it fits the sample.
    """

    kind: Literal["centroids", "hyperplanes"]
    matrix: Float32
    figures: dict[str, float | int]
