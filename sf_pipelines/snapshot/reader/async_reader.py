"""The readers for asyncio: the same core as the blocking ones, awaited."""

from __future__ import annotations  # help() shows types by the names that are written here

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar, Self, Unpack

from numpy.typing import ArrayLike

from sf_pipelines.snapshot.index.key_value import Key
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.reader import lookup, search
from sf_pipelines.snapshot.reader.calls import Call
from sf_pipelines.snapshot.reader.core import ReaderCore, in_thread
from sf_pipelines.snapshot.reader.options import ReaderOptions, ReaderSettings
from sf_pipelines.snapshot.reader.plan import Context, ShardChoice
from sf_pipelines.snapshot.reader.reader import KeyReaderBase, ReaderBase, VectorReaderBase
from sf_pipelines.snapshot.reader.state import SnapshotKind
from sf_pipelines.snapshot.reader.types import RefreshOutcome, VectorSearchResponse


class AsyncReader(ReaderBase):
    """Serves the snapshot that a root's current pointer names, without blocking the event loop. Task- and thread-safe.

    What it does is what the blocking reader does, in the same words; see there. It belongs to no event loop: one reader
    may serve several, one after the other or in several threads. Cancelling a call lets go of everything that it holds.
    """

    _kind: ClassVar[SnapshotKind]

    def __init__(self, core: ReaderCore) -> None:
        """Made by ``open``."""
        self._core = core

    @classmethod
    async def open(cls, root: str | Path, **options: Unpack[ReaderOptions]) -> Self:
        """Opens the current snapshot.

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
        settings = ReaderSettings(**options)
        future = in_thread(ReaderCore.open, root, settings, cls._kind)
        try:
            return cls(await asyncio.wrap_future(future))
        except BaseException:
            # Cancelled, or the loop has ended: the thread may be at it still, and nobody else will close what it opens.
            future.add_done_callback(_close_opened)
            raise

    async def search(
        self,
        query: ArrayLike,
        top_k: int = 10,
        *,
        num_probes: int | None = None,
        shard_ids: Sequence[int] | None = None,
        routing_context: Context | None = None,
        include_vectors: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - ends the wait for shards, and can give a partial answer
        partial: bool = False,
    ) -> VectorSearchResponse:
        """The nearest rows of one query; see ``ShardedVectorReader.search``."""
        call, choice = Call("search", timeout, partial), ShardChoice(num_probes, shard_ids, routing_context)
        steps = search.search_one(self._core, call, query, top_k, choice, include_vectors=include_vectors)
        return await self._core.run_async(call, steps)

    async def batch_search(
        self,
        queries: ArrayLike,
        top_k: int = 10,
        *,
        num_probes: int | None = None,
        shard_ids: Sequence[int] | None = None,
        routing_context: Context | Sequence[Context] | None = None,
        include_vectors: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - as of search
        partial: bool = False,
    ) -> list[VectorSearchResponse]:
        """The nearest rows of many queries, shape (n, dim); see ``ShardedVectorReader.batch_search``."""
        call, choice = Call("search", timeout, partial), ShardChoice(num_probes, shard_ids, routing_context)
        steps = search.search(self._core, call, queries, top_k, choice, include_vectors=include_vectors)
        return await self._core.run_async(call, steps)

    async def get_vectors(
        self,
        ids: Iterable[int | str],
        *,
        shard_ids: Sequence[int] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as of search
    ) -> dict[int | str, Float32 | None]:
        """The stored vector of each id; None for an id that no row has. See ``ShardedVectorReader.get_vectors``."""
        call = Call(None, timeout)
        return await self._core.run_async(call, lookup.get_vectors(self._core, call, ids, shard_ids))

    async def refresh(self) -> RefreshOutcome:
        """Serves what the pointer names now; see ``ShardedVectorReader.refresh``.

        A refresh that is cancelled goes on in its thread, and is complete or without effect.
        """
        return await asyncio.wrap_future(in_thread(self._core.refresh))

    async def close(self) -> None:
        """Ends the reader. Calls that are under way finish."""
        self._core.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


class AsyncShardedVectorReader(VectorReaderBase, AsyncReader):
    """Searches a vector-only snapshot; ``ShardedVectorReader`` for asyncio. Opened by ``await ….open(root)``."""

    _kind = "vector"


class AsyncUnifiedShardedReader(KeyReaderBase, AsyncReader):
    """Looks up keys in, and searches, a unified snapshot; ``UnifiedShardedReader`` for asyncio."""

    _kind = "unified"

    async def get(
        self,
        key: Key,
        *,
        routing_context: Context | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as of search
    ) -> bytes | None:
        """The value of a key; None where the key is not there. See ``UnifiedShardedReader.get``."""
        call = Call("get", timeout)
        return await self._core.run_async(call, lookup.get_one(self._core, call, key, routing_context))

    async def multi_get(
        self,
        keys: Iterable[Key],
        *,
        routing_context: Context | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as of search
    ) -> dict[Key, bytes | None]:
        """The value of each key, None for a key that is not there. See ``UnifiedShardedReader.multi_get``."""
        call = Call("multi_get", timeout)
        return await self._core.run_async(call, lookup.get_many(self._core, call, keys, routing_context))


def _close_opened(future: Future[ReaderCore]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()
