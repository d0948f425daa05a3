"""The blocking reader of vector-only snapshots."""

from collections.abc import Sequence

from numpy.typing import ArrayLike

from sf_pipelines.snapshot.reader import searching
from sf_pipelines.snapshot.reader.blocking import BlockingReader
from sf_pipelines.snapshot.reader.plan import Context, Wanted, one
from sf_pipelines.snapshot.reader.types import VectorSearchResponse


class ShardedVectorReader(BlockingReader):
    """Searches a vector-only snapshot: the one that a root's current pointer names. Thread-safe.

    Shards are searched from verified local copies. Opening a shard for the first time fetches it; a shard that is not
    what the manifest recorded is an error that names the object, never an answer. For the arguments see ``__init__``.
    """

    _kind = "vector"

    def search(
        self,
        query: ArrayLike,
        top_k: int = 10,
        *,
        num_probes: int | None = None,
        shard_ids: Sequence[int] | None = None,
        routing_context: Context | None = None,
        include_vectors: bool = False,
    ) -> VectorSearchResponse:
        """The nearest rows of one query.

        Which shards are asked: ``shard_ids`` where they are given; in a snapshot sharded by an expression (CEL) the one
        of ``routing_context``; else the ``num_probes`` shards nearest to the query. Where rows named their shards
        themselves (EXPLICIT), ``shard_ids`` must be given.

        Args:
            query: shape (dim,).
            top_k: results wanted; fewer come back where the searched shards have fewer rows.
            num_probes: shards to ask, nearest first; None is the snapshot's own number, more than there are is all.
            shard_ids: ask exactly these shards.
            routing_context: a value for each column of the expression, as the rows have it.
            include_vectors: return the stored vectors too.

        Raises:
            QueryError: an argument is wrong, or the shards cannot be told.
            ReaderClosedError: the reader was closed.
            StoreError: a shard cannot be fetched.
            IntegrityError: a shard is damaged.
        """
        wanted = Wanted(num_probes, shard_ids, routing_context)
        return searching.search(self._core, one(query), top_k, wanted, include_vectors=include_vectors)[0]

    def batch_search(
        self,
        queries: ArrayLike,
        top_k: int = 10,
        *,
        num_probes: int | None = None,
        shard_ids: Sequence[int] | None = None,
        routing_context: Context | Sequence[Context] | None = None,
        include_vectors: bool = False,
    ) -> list[VectorSearchResponse]:
        """The nearest rows of many queries, shape (n, dim); the same answers as one by one. See ``search``.

        ``routing_context`` is one for all queries, or one for each.
        """
        wanted = Wanted(num_probes, shard_ids, routing_context)
        return searching.search(self._core, queries, top_k, wanted, include_vectors=include_vectors)

    def route_vector(self, query: ArrayLike, num_probes: int | None = None) -> list[int]:
        """Shards that a query would ask, in order.

        Raises:
            QueryError: an argument is wrong, or the shards of this snapshot do not follow from the vector.
        """
        return searching.route(self._core, one(query), Wanted(num_probes))[0]
