"""The blocking readers, and what both faces share."""

from __future__ import annotations  # help() shows types by the names that are written here

from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Self, Unpack

from numpy.typing import ArrayLike

from sf_pipelines.snapshot.index.key_value import Key
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.reader import lookup, search, state
from sf_pipelines.snapshot.reader.calls import Call
from sf_pipelines.snapshot.reader.core import ReaderCore
from sf_pipelines.snapshot.reader.options import ReaderOptions, ReaderSettings
from sf_pipelines.snapshot.reader.plan import Context, ShardChoice
from sf_pipelines.snapshot.reader.state import SnapshotKind, SnapshotState
from sf_pipelines.snapshot.reader.types import (
    Explanation,
    Health,
    RefreshOutcome,
    SearchArrays,
    ShardDetail,
    SnapshotInfo,
    UnifiedVectorMeta,
    VectorSearchResponse,
)
from sf_pipelines.snapshot.routing.protocol import Int32
from sf_pipelines.snapshot.store import Store


class ReaderBase:
    """What all readers answer without waiting."""

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
            QueryError: an argument is wrong, or nothing says which shards to ask.
            ReaderClosedError: the reader was closed.
        """
        return search.explain(self._core, query, ShardChoice(num_probes, shard_ids, routing_context))

    def health(self, staleness_threshold: timedelta | float | None = None) -> Health:
        """State of the reader; answers after it was closed, too.

        Args:
            staleness_threshold: age (or seconds) of the snapshot from which it counts as degraded.

        Raises:
            ReaderForkedError: the reader belongs to the process that this one was forked from.
        """
        return self._core.health(staleness_threshold)

    def snapshot_info(self) -> SnapshotInfo:
        """The snapshot that is served.

        Raises:
            ReaderClosedError: the reader was closed.
        """
        with self._core.serving() as serving:
            return state.snapshot_info(serving.state, self._core.store)

    def shard_details(self) -> list[ShardDetail]:
        """Every shard, empty ones included.

        Raises:
            ReaderClosedError: the reader was closed.
        """
        with self._core.serving() as serving:
            return state.shard_details(serving.state, self._core.store)


class VectorReaderBase(ReaderBase):
    """Of readers of vector-only snapshots."""

    def route_vector(self, query: ArrayLike, num_probes: int | None = None) -> list[int]:
        """Shards that a query would ask, in order.

        Raises:
            QueryError: an argument is wrong, or the shards of this snapshot do not follow from the vector.
            ReaderClosedError: the reader was closed.
        """
        return search.route(self._core, query, ShardChoice(num_probes))


class KeyReaderBase(ReaderBase):
    """Of readers of unified snapshots."""

    def route_key(self, key: Key, routing_context: Context | None = None) -> int:
        """Shard that holds a key, if any does.

        Raises:
            QueryError: the key is of the wrong type, or nothing says its shard.
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
        with self._core.serving() as serving:
            return state.vector_meta(serving.state)


class BlockingReader(ReaderBase):
    """What both blocking readers do; see ``ShardedVectorReader``."""

    _kind: ClassVar[SnapshotKind]

    def __init__(self, root: str | Path, **options: Unpack[ReaderOptions]) -> None:
        self._core = ReaderCore.open(root, ReaderSettings(**options), self._kind)

    def search(
        self,
        query: ArrayLike,
        top_k: int = 10,
        *,
        num_probes: int | None = None,
        shard_ids: Sequence[int] | None = None,
        routing_context: Context | None = None,
        include_vectors: bool = False,
        timeout: float | None = None,
        partial: bool = False,
    ) -> VectorSearchResponse:
        """The nearest rows of one query.

        Which shards are asked: ``shard_ids`` where they are given; in a snapshot sharded by an expression (CEL) the one
        of ``routing_context``; where the vector decides (CLUSTER, LSH) the ``num_probes`` shards nearest to the query;
        in a unified snapshot all. Where rows named their shards themselves (EXPLICIT), ``shard_ids`` must be given.

        Args:
            query: shape (dim,).
            top_k: results to return; where fewer come back, ``shortfall`` says why.
            num_probes: shards to ask, nearest first; None is the snapshot's own number, more than there are is all.
            shard_ids: ask exactly these shards.
            routing_context: a value for each column of the expression, as the rows have it.
            include_vectors: return the stored vectors too.
            timeout: seconds after which shards that have not answered count as failed; None waits.
            partial: answer without shards that fail, and name them in ``missing_shards``, in place of an error.
                Payloads of what was found in time are still fetched from shards that are open, so an answer may take a
                little longer than ``timeout``.

        Raises:
            QueryError: an argument is wrong, or nothing says which shards to ask.
            ReaderClosedError: the reader was closed.
            StoreError: a shard cannot be fetched.
            IntegrityError: a shard is damaged.
            DeadlineError: a shard did not answer in time.
            RateLimitError: the rate limiter would have taken longer than ``timeout``.
        """
        call, choice = Call("search", timeout, partial), ShardChoice(num_probes, shard_ids, routing_context)
        steps = search.search_one(self._core, call, query, top_k, choice, include_vectors=include_vectors)
        return self._core.run(call, steps)

    def batch_search(
        self,
        queries: ArrayLike,
        top_k: int = 10,
        *,
        num_probes: int | None = None,
        shard_ids: Sequence[int] | None = None,
        routing_context: Context | Sequence[Context] | None = None,
        include_vectors: bool = False,
        timeout: float | None = None,
        partial: bool = False,
    ) -> list[VectorSearchResponse]:
        """The nearest rows of many queries, shape (n, dim); the same answers as one by one. See ``search``.

        ``routing_context`` is one for all queries, or one for each.
        """
        call, choice = Call("search", timeout, partial), ShardChoice(num_probes, shard_ids, routing_context)
        steps = search.search(self._core, call, queries, top_k, choice, include_vectors=include_vectors)
        return self._core.run(call, steps)

    def get_vectors(
        self, ids: Iterable[int | str], *, shard_ids: Sequence[int] | None = None, timeout: float | None = None
    ) -> dict[int | str, Float32 | None]:
        """The stored vector of each id; None for an id that no row has.

        For "more like this": search with the vector of a row. Where the id is the key that rows are sharded by, the
        shard of each is asked; in other snapshots nothing says which shard has an id, so the ids of every shard are
        scanned, each shard being opened for it.

        Args:
            ids: as searches return them.
            shard_ids: look only there.
            timeout: seconds until the answer must be there; None waits.

        Raises:
            QueryError: an id is of the wrong type, or a shard is unknown.
            ReaderClosedError: the reader was closed.
            StoreError: a shard cannot be fetched.
            IntegrityError: a shard is damaged.
            DeadlineError: a shard did not answer in time.
            RateLimitError: the rate limiter would have taken longer than ``timeout``.

        Example:
            >>> vector = reader.get_vectors([17])[17]
            >>> reader.search(vector, top_k=11).results[1:]
        """
        return self._core.run(call := Call(None, timeout), lookup.get_vectors(self._core, call, ids, shard_ids))

    # Measuring.

    def search_arrays(
        self, queries: ArrayLike, top_k: int, *, num_probes: int | None = None, shard_of: Int32 | None = None
    ) -> SearchArrays:
        """Ids and scores of many queries as arrays, without payloads.

        Args:
            queries: shape (n, dim).
            top_k: results to return; fewer come back where the searched shards have fewer rows.
            num_probes: shards to ask, nearest first, where the vector decides; None is the snapshot's own number.
            shard_of: for each query the shard that it is about, shape (n,), where neither the vector nor all shards
                are asked (EXPLICIT and CEL).

        Raises:
            QueryError: an argument is wrong, or means nothing for this snapshot.
            ReaderClosedError: the reader was closed.
            StoreError: a shard cannot be fetched.
            IntegrityError: a shard is damaged.
        """
        choice = ShardChoice(num_probes=num_probes, shard_of=shard_of)
        return self._core.run(call := Call(None), search.search_arrays(self._core, call, queries, top_k, choice))

    def probe_curve(self, queries: ArrayLike, top_k: int, *, shard_of: Int32 | None = None) -> list[SearchArrays]:
        """Answers for 1, 2, … shards per query, asking each shard only once for all queries; see ``search_arrays``.

        Returns:
            Where the vector decides, item ``i`` is ``search_arrays(queries, top_k, num_probes=i + 1)``; else the one
            item ``search_arrays(queries, top_k, shard_of=shard_of)``.
        """
        return self._core.run(call := Call(None), search.probe_curve(self._core, call, queries, top_k, shard_of))

    def stock_style(
        self, queries: ArrayLike, top_k: int, num_probes: int, *, shard_of: Int32 | None = None
    ) -> SearchArrays:
        """What a stock reader would answer: its probe order, default index options, the library's own distances.

        Args:
            queries: shape (n, dim).
            top_k: results to return.
            num_probes: shards to ask; means nothing where the vector does not decide.
            shard_of: see ``search_arrays``.
        """
        call = Call(None)
        return self._core.run(call, search.stock_style(self._core, call, queries, top_k, num_probes, shard_of))

    def route_batch(self, queries: ArrayLike, *, shard_of: Int32 | None = None) -> Int32:
        """All shards that queries may ask, in the order of their turn, shape (n, shards).

        Where the vector decides and where a search asks all, these are all shards; with ``shard_of`` it is that one.
        """
        return search.route_batch(self._core, queries, shard_of)

    # The snapshot.

    def refresh(self) -> RefreshOutcome:
        """Serves what the pointer names now; see ``RefreshOutcome``. A failure leaves the old snapshot serving.

        Raises:
            ReaderClosedError: the reader was closed.
        """
        return self._core.refresh()

    def close(self) -> None:
        """Ends the reader. Calls that are under way finish."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ShardedVectorReader(VectorReaderBase, BlockingReader):
    """Searches a vector-only snapshot: the one that a root's current pointer names. Thread-safe.

    Shards are read from verified local copies. Opening a shard for the first time fetches it; a shard that is not
    what the manifest recorded is an error that names the object, never an answer.

    Args:
        root: ``s3://bucket/prefix`` or a folder.
        options: see ``ReaderSettings``.

    Raises:
        ConfigError: an option is wrong.
        SnapshotNotFoundError: nothing is published under the root.
        SnapshotKindError: the snapshot is of another kind; names the reader for it.
        IntegrityError: manifest or routing artifacts are damaged.
        StoreError: the store cannot be read.
    """

    _kind = "vector"


class UnifiedShardedReader(KeyReaderBase, BlockingReader):
    """Looks up keys in, and searches, a unified snapshot; opened as ``ShardedVectorReader``. Thread-safe.

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
            QueryError: the key is of the wrong type, or nothing says its shard.
            ReaderClosedError: the reader was closed.
            StoreError: the shard cannot be fetched.
            IntegrityError: the shard is damaged.
            DeadlineError: the shard did not answer in time.
            RateLimitError: the rate limiter would have taken longer than ``timeout``.
        """
        return self._core.run(call := Call("get", timeout), lookup.get_one(self._core, call, key, routing_context))

    def multi_get(
        self, keys: Iterable[Key], *, routing_context: Context | None = None, timeout: float | None = None
    ) -> dict[Key, bytes | None]:
        """The value of each key, None for a key that is not there; every shard is asked once. See ``get``.

        ``routing_context`` is one for all keys.
        """
        call = Call("multi_get", timeout)
        return self._core.run(call, lookup.get_many(self._core, call, keys, routing_context))


def open_reader(root: str | Path, **options: Unpack[ReaderOptions]) -> ShardedVectorReader | UnifiedShardedReader:
    """A reader of the kind of the snapshot that is current; arguments and errors as of ``ShardedVectorReader``."""
    return _reader_on(ReaderCore.open(root, ReaderSettings(**options), None))


def reader_of(
    snapshot: SnapshotState, store: Store, **options: Unpack[ReaderOptions]
) -> ShardedVectorReader | UnifiedShardedReader:
    """A reader on a state in memory, which need not be published; it is served for good."""
    settings = ReaderSettings(**{"manifest_key": snapshot.manifest_key, **options})
    return _reader_on(ReaderCore(store, settings, snapshot, kind=snapshot.kind))


def _reader_on(core: ReaderCore) -> ShardedVectorReader | UnifiedShardedReader:
    kind = ShardedVectorReader if core.kind == "vector" else UnifiedShardedReader
    reader = kind.__new__(kind)
    reader._core = core  # noqa: SLF001 - made here in place of its constructor, which would look for the pointer
    return reader
