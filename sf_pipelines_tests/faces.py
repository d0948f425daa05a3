"""Both faces of the readers, called in one way, so that a test is written once."""

import asyncio
import inspect
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sf_pipelines import AsyncShardedVectorReader, AsyncUnifiedShardedReader, ShardedVectorReader, UnifiedShardedReader

Face = Literal["sync", "async"]
FACES: tuple[Face, ...] = ("sync", "async")


class Awaited:
    """An asyncio reader whose calls block. Thread-safe: each call is a task of one event loop."""

    def __init__(self, kind: type[Any], root: str | Path, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._reader = self._wait(kind.open(root, **options))
        except BaseException:
            self._end()
            raise

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._reader, name)
        if not inspect.iscoroutinefunction(found):
            return found
        return lambda *arguments, **options: self._wait(found(*arguments, **options))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wait(self._reader.close())
        self._end()

    def _wait(self, what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def vector_reader(face: Face, root: str | Path, **options: Any) -> Any:
    """A reader of a vector-only snapshot."""
    return (
        ShardedVectorReader(root, **options) if face == "sync" else Awaited(AsyncShardedVectorReader, root, **options)
    )


def unified_reader(face: Face, root: str | Path, **options: Any) -> Any:
    """A reader of a unified snapshot."""
    if face == "sync":
        return UnifiedShardedReader(root, **options)
    return Awaited(AsyncUnifiedShardedReader, root, **options)
