"""The blocking reader of unified snapshots: values by key, and rows by vector."""

from collections.abc import Iterable, Sequence

from numpy.typing import ArrayLike

from sf_pipelines.snapshot.index.key_value import Key
from sf_pipelines.snapshot.reader import describing, lookup, searching
from sf_pipelines.snapshot.reader.blocking import BlockingReader
from sf_pipelines.snapshot.reader.plan import Context, Wanted, one
from sf_pipelines.snapshot.reader.types import UnifiedVectorMeta, VectorSearchResponse


class UnifiedShardedReader(BlockingReader):
    """Looks up keys in, and searches, a unified snapshot: the one that a root's current pointer names. Thread-safe.

    Shards are read from verified local copies. Opening a shard for the first time fetches it; a shard that is not
    what the manifest recorded is an error that names the object, never an answer. For the arguments see ``__init__``.

    Keys are whole numbers, or str or bytes (a str is its UTF-8), as ``snapshot_info().key_encoding`` says. A hit's
    ``id`` is its key; of bytes, their hex digits.
    """

    _kind = "unified"

    # By key.

    def get(self, key: Key, *, routing_context: Context | None = None) -> bytes | None:
        """The value of a key; None where the key is not there.

        Args:
            key: int, str or bytes, as the snapshot's keys are.
            routing_context: in a snapshot sharded by an expression (CEL) over more than the key: a value for each of
                its columns. ``key`` may be left out.

        Raises:
            QueryError: the key is of the wrong type, or its shard cannot be told.
            ReaderClosedError: the reader was closed.
            StoreError: the shard cannot be fetched.
            IntegrityError: the shard is damaged.
        """
        return lookup.get_many(self._core, [key], routing_context)[key]

    def multi_get(self, keys: Iterable[Key], *, routing_context: Context | None = None) -> dict[Key, bytes | None]:
        """The value of each key, None for a key that is not there; every shard is asked once. See ``get``.

        ``routing_context`` is one for all keys.
        """
        return lookup.get_many(self._core, keys, routing_context)

    def route_key(self, key: Key, routing_context: Context | None = None) -> int:
        """Shard that holds a key, if any does; see ``get``."""
        return lookup.route_key(self._core, key, routing_context)

    # By vector.

    def search(
        self,
        query: ArrayLike,
        top_k: int = 10,
        *,
        shard_ids: Sequence[int] | None = None,
        routing_context: Context | None = None,
        include_vectors: bool = False,
    ) -> VectorSearchResponse:
        """The nearest rows of one query.

        Which shards are asked: ``shard_ids`` where they are given; in a snapshot sharded by an expression (CEL) the one
        of ``routing_context`` where that is given; else all.

        Args:
            query: shape (dim,).
            top_k: results wanted; fewer come back where the searched shards have fewer rows.
            shard_ids: ask exactly these shards.
            routing_context: a value for each column of the expression, as the rows have it.
            include_vectors: return the stored vectors too.

        Raises:
            QueryError: an argument is wrong, or the shards cannot be told.
            ReaderClosedError: the reader was closed.
            StoreError: a shard cannot be fetched.
            IntegrityError: a shard is damaged.
        """
        wanted = Wanted(None, shard_ids, routing_context)
        return searching.search(self._core, one(query), top_k, wanted, include_vectors=include_vectors)[0]

    def batch_search(
        self,
        queries: ArrayLike,
        top_k: int = 10,
        *,
        shard_ids: Sequence[int] | None = None,
        routing_context: Context | Sequence[Context] | None = None,
        include_vectors: bool = False,
    ) -> list[VectorSearchResponse]:
        """The nearest rows of many queries, shape (n, dim); the same answers as one by one. See ``search``.

        ``routing_context`` is one for all queries, or one for each.
        """
        wanted = Wanted(None, shard_ids, routing_context)
        return searching.search(self._core, queries, top_k, wanted, include_vectors=include_vectors)

    @property
    def vector_meta(self) -> UnifiedVectorMeta:
        """How the vectors are indexed."""
        return describing.vector_meta(self._core)
