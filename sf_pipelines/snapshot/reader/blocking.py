"""The blocking readers: they call the shared core and wait."""

from __future__ import annotations  # help() shows types by the names that are written here

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Self, Unpack

from numpy.typing import ArrayLike

from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.reader import lookup, searching
from sf_pipelines.snapshot.reader.calls import Terms
from sf_pipelines.snapshot.reader.core import ReaderCore
from sf_pipelines.snapshot.reader.facing import Facing
from sf_pipelines.snapshot.reader.options import ReaderOptions, ReaderSettings
from sf_pipelines.snapshot.reader.plan import Context, Wanted
from sf_pipelines.snapshot.reader.state import SnapshotKind
from sf_pipelines.snapshot.reader.types import RefreshOutcome, SearchArrays, VectorSearchResponse
from sf_pipelines.snapshot.routing.protocol import Int32


class BlockingReader(Facing):
    """Serves the snapshot that a root's current pointer names. Thread-safe.

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

    _kind: ClassVar[SnapshotKind]

    def __init__(self, root: str | Path, **options: Unpack[ReaderOptions]) -> None:
        self._core = ReaderCore(root, ReaderSettings(**options), self._kind)

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
            top_k: results wanted; where fewer come back, ``shortfall`` says why.
            num_probes: shards to ask, nearest first; None is the snapshot's own number, more than there are is all.
            shard_ids: ask exactly these shards.
            routing_context: a value for each column of the expression, as the rows have it.
            include_vectors: return the stored vectors too.
            timeout: seconds after which shards that have not answered count as failed; None waits.
            partial: answer without shards that fail, and name them in ``missing_shards``, in place of an error.
                Payloads of what was found in time are still fetched from shards that are open, so an answer may take a
                little longer than ``timeout``.

        Raises:
            QueryError: an argument is wrong, or the shards cannot be told.
            ReaderClosedError: the reader was closed.
            StoreError: a shard cannot be fetched.
            IntegrityError: a shard is damaged.
            DeadlineError: a shard did not answer in time.
            RateLimitError: the rate limiter would have taken longer than ``timeout``.
        """
        wanted, terms = Wanted(num_probes, shard_ids, routing_context), Terms(timeout, partial)
        call = searching.search_one(self._core, query, top_k, wanted, terms, include_vectors=include_vectors)
        return self._core.run(call)

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
        wanted, terms = Wanted(num_probes, shard_ids, routing_context), Terms(timeout, partial)
        call = searching.search(self._core, queries, top_k, wanted, terms, include_vectors=include_vectors)
        return self._core.run(call)

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
        return self._core.run(lookup.get_vectors(self._core, ids, shard_ids, Terms(timeout)))

    # Measuring.

    def search_arrays(
        self, queries: ArrayLike, top_k: int, *, num_probes: int | None = None, homes: Int32 | None = None
    ) -> SearchArrays:
        """Ids and scores of many queries as arrays, without payloads.

        Args:
            queries: shape (n, dim).
            top_k: results wanted; fewer come back where the searched shards have fewer rows.
            num_probes: shards to ask, nearest first, where the vector decides; None is the snapshot's own number.
            homes: for each query the shard that it is about, shape (n,), where neither the vector nor all shards
                are asked (EXPLICIT and CEL).

        Raises:
            QueryError: an argument is wrong, or means nothing for this snapshot.
            ReaderClosedError: the reader was closed.
            StoreError: a shard cannot be fetched.
            IntegrityError: a shard is damaged.
        """
        wanted = Wanted(num_probes=num_probes, homes=homes)
        return self._core.run(searching.search_arrays(self._core, queries, top_k, wanted))

    def probe_curve(self, queries: ArrayLike, top_k: int, *, homes: Int32 | None = None) -> list[SearchArrays]:
        """Answers for 1, 2, … shards per query, asking each shard only once for all queries; see ``search_arrays``.

        Returns:
            Where the vector decides, item ``i`` is ``search_arrays(queries, top_k, num_probes=i + 1)``; else the one
            item ``search_arrays(queries, top_k, homes=homes)``.
        """
        return self._core.run(searching.probe_curve(self._core, queries, top_k, homes))

    def stock_style(
        self, queries: ArrayLike, top_k: int, num_probes: int, *, homes: Int32 | None = None
    ) -> SearchArrays:
        """What a stock reader would answer: its probe order, default index options, the library's own distances.

        Args:
            queries: shape (n, dim).
            top_k: results wanted.
            num_probes: shards to ask; means nothing where the vector does not decide.
            homes: see ``search_arrays``.
        """
        return self._core.run(searching.stock_style(self._core, queries, top_k, num_probes, homes))

    def route_batch(self, queries: ArrayLike, *, homes: Int32 | None = None) -> Int32:
        """All shards that queries may ask, in the order of their turn, shape (n, shards).

        Where the vector decides and where a search asks all, these are all shards; with ``homes`` it is that one.
        """
        return searching.route_batch(self._core, queries, homes)

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
