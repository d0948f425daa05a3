"""The readers for asyncio: the same core as the blocking ones, awaited."""

from __future__ import annotations  # help() shows types by the names that are written here

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, Unpack

from numpy.typing import ArrayLike

from sf_pipelines.snapshot.index.key_value import Key
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.reader import lookup, searching
from sf_pipelines.snapshot.reader.calls import Terms
from sf_pipelines.snapshot.reader.core import ReaderCore
from sf_pipelines.snapshot.reader.facing import Facing, FacingKeys, FacingVectors
from sf_pipelines.snapshot.reader.options import ReaderOptions, ReaderSettings
from sf_pipelines.snapshot.reader.plan import Context, Wanted
from sf_pipelines.snapshot.reader.state import SnapshotKind
from sf_pipelines.snapshot.reader.types import RefreshOutcome, VectorSearchResponse

ResultT = TypeVar("ResultT")


class AsyncReader(Facing):
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
        opening = _in_thread(ReaderCore, root, settings, cls._kind)
        try:
            return cls(await asyncio.wrap_future(opening))
        except BaseException:
            # Cancelled, or the loop has ended: the thread may be at it still, and nobody else will close what it opens.
            opening.add_done_callback(_close_opened)
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
        wanted, terms = Wanted(num_probes, shard_ids, routing_context), Terms(timeout, partial)
        call = searching.search_one(self._core, query, top_k, wanted, terms, include_vectors=include_vectors)
        return await self._core.run_async(call)

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
        wanted, terms = Wanted(num_probes, shard_ids, routing_context), Terms(timeout, partial)
        call = searching.search(self._core, queries, top_k, wanted, terms, include_vectors=include_vectors)
        return await self._core.run_async(call)

    async def get_vectors(
        self,
        ids: Iterable[int | str],
        *,
        shard_ids: Sequence[int] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as of search
    ) -> dict[int | str, Float32 | None]:
        """The stored vector of each id; None for an id that no row has. See ``ShardedVectorReader.get_vectors``."""
        return await self._core.run_async(lookup.get_vectors(self._core, ids, shard_ids, Terms(timeout)))

    async def refresh(self) -> RefreshOutcome:
        """Serves what the pointer names now; see ``ShardedVectorReader.refresh``.

        A refresh that is cancelled goes on in its thread, and is complete or without effect.
        """
        return await asyncio.wrap_future(_in_thread(self._core.refresh))

    async def close(self) -> None:
        """Ends the reader. Calls that are under way finish."""
        self._core.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


class AsyncShardedVectorReader(FacingVectors, AsyncReader):
    """Searches a vector-only snapshot; ``ShardedVectorReader`` for asyncio. Opened by ``await ….open(root)``."""

    _kind = "vector"


class AsyncUnifiedShardedReader(FacingKeys, AsyncReader):
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
        return await self._core.run_async(lookup.get_one(self._core, key, routing_context, Terms(timeout)))

    async def multi_get(
        self,
        keys: Iterable[Key],
        *,
        routing_context: Context | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as of search
    ) -> dict[Key, bytes | None]:
        """The value of each key, None for a key that is not there. See ``UnifiedShardedReader.multi_get``."""
        return await self._core.run_async(lookup.get_many(self._core, keys, routing_context, Terms(timeout)))


def _in_thread(work: Callable[..., ResultT], *arguments: Any) -> Future[ResultT]:
    """Has a thread of its own do something that may take long."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="sf-pipelines-reader")
    try:
        return thread.submit(work, *arguments)
    finally:
        thread.shutdown(wait=False)


def _close_opened(opening: Future[ReaderCore]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
