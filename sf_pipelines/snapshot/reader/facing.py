"""What all readers say without waiting: of themselves and of the snapshot that they serve."""

from __future__ import annotations  # help() shows types by the names that are written here

from collections.abc import Sequence
from datetime import timedelta

from numpy.typing import ArrayLike

from sf_pipelines.snapshot.index.key_value import Key
from sf_pipelines.snapshot.reader import describing, lookup, searching
from sf_pipelines.snapshot.reader.core import ReaderCore
from sf_pipelines.snapshot.reader.plan import Context, Wanted, one
from sf_pipelines.snapshot.reader.types import Explanation, Health, ShardDetail, SnapshotInfo, UnifiedVectorMeta


class Facing:
    """Of every reader."""

    _core: ReaderCore

    def explain(
        self,
        query: ArrayLike,
        *,
        num_probes: int | None = None,
        shard_ids: Sequence[int] | None = None,
        routing_context: Context | None = None,
    ) -> Explanation:
        """What ``search`` with these arguments would do: the shards, how far they are, the recall that was measured.

        Raises:
            QueryError: an argument is wrong, or the shards cannot be told.
            ReaderClosedError: the reader was closed.
        """
        return describing.explain(self._core, query, Wanted(num_probes, shard_ids, routing_context))

    def health(self, staleness_threshold: timedelta | float | None = None) -> Health:
        """State of the reader; answers after it was closed, too.

        Args:
            staleness_threshold: age (or seconds) of the snapshot from which it counts as degraded.

        Raises:
            ReaderForkedError: the reader belongs to the process that this one was forked from.
        """
        return describing.health(self._core, staleness_threshold)

    def snapshot_info(self) -> SnapshotInfo:
        """The snapshot that is served.

        Raises:
            ReaderClosedError: the reader was closed.
        """
        return describing.snapshot_info(self._core)

    def shard_details(self) -> list[ShardDetail]:
        """Every shard, empty ones included.

        Raises:
            ReaderClosedError: the reader was closed.
        """
        return describing.shard_details(self._core)


class FacingVectors(Facing):
    """Of readers of vector-only snapshots."""

    def route_vector(self, query: ArrayLike, num_probes: int | None = None) -> list[int]:
        """Shards that a query would ask, in order.

        Raises:
            QueryError: an argument is wrong, or the shards of this snapshot do not follow from the vector.
            ReaderClosedError: the reader was closed.
        """
        return searching.route(self._core, one(query), Wanted(num_probes))[0]


class FacingKeys(Facing):
    """Of readers of unified snapshots."""

    def route_key(self, key: Key, routing_context: Context | None = None) -> int:
        """Shard that holds a key, if any does.

        Raises:
            QueryError: the key is of the wrong type, or its shard cannot be told.
            NoShardError: no shard can hold it.
            ReaderClosedError: the reader was closed.
        """
        return lookup.route_key(self._core, key, routing_context)

    @property
    def vector_meta(self) -> UnifiedVectorMeta:
        """How the vectors are indexed.

        Raises:
            ReaderClosedError: the reader was closed.
        """
        return describing.vector_meta(self._core)
