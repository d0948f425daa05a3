"""The blocking readers of each kind of snapshot."""

from __future__ import annotations  # help() shows types by the names that are written here

from collections.abc import Iterable

from sf_pipelines.snapshot.index.key_value import Key
from sf_pipelines.snapshot.reader import lookup
from sf_pipelines.snapshot.reader.blocking import BlockingReader
from sf_pipelines.snapshot.reader.calls import Terms
from sf_pipelines.snapshot.reader.facing import FacingKeys, FacingVectors
from sf_pipelines.snapshot.reader.plan import Context


class ShardedVectorReader(FacingVectors, BlockingReader):
    """Searches a vector-only snapshot: the one that a root's current pointer names. Thread-safe.

    Shards are searched from verified local copies. Opening a shard for the first time fetches it; a shard that is not
    what the manifest recorded is an error that names the object, never an answer.
    """

    _kind = "vector"


class UnifiedShardedReader(FacingKeys, BlockingReader):
    """Looks up keys in, and searches, a unified snapshot: the one that a root's current pointer names. Thread-safe.

    Shards are read from verified local copies. Opening a shard for the first time fetches it; a shard that is not
    what the manifest recorded is an error that names the object, never an answer.

    Keys are whole numbers, or str or bytes (a str is its UTF-8), as ``snapshot_info().key_encoding`` says. A hit's
    ``id`` is its key; of bytes, their hex digits.
    """

    _kind = "unified"

    def get(self, key: Key, *, routing_context: Context | None = None, timeout: float | None = None) -> bytes | None:
        """The value of a key; None where the key is not there.

        Args:
            key: int, str or bytes, as the snapshot's keys are.
            routing_context: in a snapshot sharded by an expression (CEL) over more than the key: a value for each of
                its columns. ``key`` may be left out.
            timeout: seconds until the answer must be there; None waits.

        Raises:
            QueryError: the key is of the wrong type, or its shard cannot be told.
            ReaderClosedError: the reader was closed.
            StoreError: the shard cannot be fetched.
            IntegrityError: the shard is damaged.
            DeadlineError: the shard did not answer in time.
            RateLimitError: the rate limiter would have taken longer than ``timeout``.
        """
        return self._core.run(lookup.get_one(self._core, key, routing_context, Terms(timeout)))

    def multi_get(
        self, keys: Iterable[Key], *, routing_context: Context | None = None, timeout: float | None = None
    ) -> dict[Key, bytes | None]:
        """The value of each key, None for a key that is not there; every shard is asked once. See ``get``.

        ``routing_context`` is one for all keys.
        """
        return self._core.run(lookup.get_many(self._core, keys, routing_context, Terms(timeout)))
