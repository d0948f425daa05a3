"""Opened shards of one snapshot: opened once, shared, counted, and closed when nobody uses them any more."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from sf_pipelines.snapshot.errors import CountMismatchError, IntegrityError, ReaderClosedError
from sf_pipelines.snapshot.index import backend_in, backend_named
from sf_pipelines.snapshot.index.key_value import KeyValueShard
from sf_pipelines.snapshot.index.protocol import SCAN_BYTES, ShardIndex
from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.reader.state import ShardEntry, SnapshotState
from sf_pipelines.snapshot.store import Store

PartT = TypeVar("PartT", ShardIndex, KeyValueShard)


def open_index(state: SnapshotState, folder: Path, *, scan_bytes: int = SCAN_BYTES) -> ShardIndex:
    """The vector index of a shard's local copy.

    Args:
        state: its snapshot.
        folder: the copy.
        scan_bytes: see ``IndexBackend.open``.

    Raises:
        IntegrityError: it is no readable shard of this snapshot.
    """
    backend = backend_in(folder) if state.backend is None else backend_named(state.backend)
    where = folder / backend.subfolder if state.kind == "unified" else folder
    return backend.open(where, metric=state.metric, dim=state.dim, scan_bytes=scan_bytes)


class OpenShard:
    """A shard's local copy. Its parts are opened when they are first asked for. Thread-safe.

    Args:
        state: its snapshot.
        entry: the shard.
        folder: the copy.
        where: its address, for errors.
        scan_bytes: see ``IndexBackend.open``.
    """

    def __init__(self, state: SnapshotState, entry: ShardEntry, folder: Path, where: str, scan_bytes: int) -> None:
        self._state = state
        self._entry = entry
        self._folder = folder
        self._name = f"shard {entry.db_id} at {where}"
        self._scan_bytes = scan_bytes
        self._lock = threading.Lock()
        self._index: ShardIndex | None = None
        self._keys: KeyValueShard | None = None
        self._closed = False

    @property
    def index(self) -> ShardIndex:
        """The vector index.

        Raises:
            IntegrityError: it cannot be read.
            CountMismatchError: it has other rows than the manifest says.
        """
        index = self._index
        if index is None:
            with self._lock:
                index = self._index = self._index or self._opened(self._open_index, self._check_vectors)
        return index

    @property
    def keys(self) -> KeyValueShard:
        """The keys and values, in a unified snapshot; errors as of ``index``."""
        keys = self._keys
        if keys is None:
            with self._lock:
                keys = self._keys = self._keys or self._opened(lambda: KeyValueShard(self._folder), self._check_keys)
        return keys

    def open_all(self) -> None:
        """Opens every part that a snapshot of this kind has; errors as of ``index``."""
        _ = self.index
        if self._state.kind == "unified":
            _ = self.keys

    @property
    def memory_bytes(self) -> int:
        """About how much memory it holds at present."""
        index = self._index
        return 0 if index is None else index.memory_bytes

    @property
    def in_memory(self) -> bool:
        """Whether a search is a scan of vectors that are held already."""
        index = self._index
        return index is not None and index.in_memory

    def close(self) -> None:
        """Closes what was opened."""
        with self._lock:
            self._closed = True
            for part in (self._index, self._keys):
                if part is not None:
                    part.close()

    def _open_index(self) -> ShardIndex:
        return open_index(self._state, self._folder, scan_bytes=self._scan_bytes)

    def _opened(self, opener: Callable[[], PartT], check: Callable[[int], str | None]) -> PartT:
        if self._closed:
            raise ReaderClosedError(f"{self._name} was closed")
        try:
            part = opener()
        except IntegrityError as error:
            raise IntegrityError(f"{self._name} cannot be read: {error}") from error
        with ExitStack() as on_failure:
            on_failure.callback(part.close)
            if fault := check(part.rows):
                raise CountMismatchError(f"{self._name} has {part.rows} {fault}, the manifest says {self._entry.rows}")
            on_failure.pop_all()
        return part

    def _check_vectors(self, rows: int) -> str | None:
        # Others count what they wrote into the table of keys, and a record need not come with a vector.
        strict = self._state.kind == "vector" or self._state.is_ours
        return "rows" if strict and rows != self._entry.rows else None

    def _check_keys(self, rows: int) -> str | None:
        # Others count a key again each time that it is written; the table holds it once.
        wrong = rows != self._entry.rows if self._state.is_ours else rows > self._entry.rows
        return "keys" if wrong else None


class _Handle:
    """An opened shard and the hold on its local copy."""

    def __init__(self, shard: OpenShard, held: ExitStack) -> None:
        self.shard = shard
        self.held = held
        self.users = 0
        self.last_use = time.monotonic()


class ShardHandles:
    """Opened shards of one snapshot. Thread-safe.

    Args:
        state: the snapshot.
        store: where it is.
        cache: local copies.
        max_open: shards kept open while nobody uses them; None is all.
        max_memory: bytes that open shards may hold in memory before those that nobody uses are closed.
        scan_bytes: see ``IndexBackend.open``.
    """

    def __init__(
        self,
        state: SnapshotState,
        store: Store,
        cache: ShardCache,
        *,
        max_open: int | None,
        max_memory: int,
        scan_bytes: int,
    ) -> None:
        self.state = state
        self._store = store
        self._cache = cache
        self._max_open = max_open
        self._max_memory = max_memory
        self._scan_bytes = scan_bytes
        self._lock = threading.Lock()
        self._opening = [threading.Lock() for _ in state.shards]
        self._handles: dict[int, _Handle] = {}
        self._closed = False

    @contextmanager
    def borrow(self, db_id: int) -> Iterator[OpenShard]:
        """An opened shard that stays open for as long as the block lasts.

        Raises:
            StoreError: its objects cannot be fetched.
            IntegrityError: they are not what the manifest says.
        """
        handle = self._take(db_id)
        try:
            yield handle.shard
        finally:
            self._give_back(handle)

    def is_open(self, db_id: int) -> bool:
        """Whether a shard is open already."""
        return db_id in self._handles

    def in_memory(self, db_id: int) -> bool:
        """Whether a search of a shard is a scan of vectors that are held already."""
        handle = self._handles.get(db_id)
        return handle is not None and handle.shard.in_memory

    @property
    def open_shards(self) -> list[int]:
        """Numbers of the shards that are open."""
        with self._lock:
            return sorted(self._handles)

    def close(self) -> None:
        """Closes what nobody uses now, and the rest when it is given back."""
        with self._lock:
            self._closed = True
        self._close_surplus()

    def _take(self, db_id: int) -> _Handle:
        if (handle := self._known(db_id)) is not None:
            return handle
        # One thread opens, the others wait for it. A failure is not remembered: the next one tries again.
        with self._opening[db_id]:
            if (handle := self._known(db_id)) is not None:
                return handle
            handle = self._open(self.state.shards[db_id])
            with self._lock:
                handle.users += 1
                self._handles[db_id] = handle
            return handle

    def _known(self, db_id: int) -> _Handle | None:
        with self._lock:
            handle = self._handles.get(db_id)
            if handle is not None:
                handle.users += 1
            return handle

    def _give_back(self, handle: _Handle) -> None:
        with self._lock:
            handle.users -= 1
            handle.last_use = time.monotonic()
        self._close_surplus()

    def _close_surplus(self) -> None:
        with self._lock:
            surplus = self._surplus()
        for handle in surplus:
            handle.held.close()

    def _surplus(self) -> list[_Handle]:
        idle = sorted((handle.last_use, db_id) for db_id, handle in self._handles.items() if not handle.users)
        memory = sum(handle.shard.memory_bytes for handle in self._handles.values())
        out: list[_Handle] = []
        for _, db_id in idle:
            too_many = self._max_open is not None and len(self._handles) > self._max_open
            if not (self._closed or too_many or memory > self._max_memory):
                break
            handle = self._handles.pop(db_id)
            memory -= handle.shard.memory_bytes
            out.append(handle)
        return out

    def _open(self, shard: ShardEntry) -> _Handle:
        if shard.key is None:
            raise ValueError(f"shard {shard.db_id} is empty and has nothing to open")
        with ExitStack() as held:
            folder = held.enter_context(self._cache.checkout(self._store, shard.key, shard.objects))
            opened = OpenShard(self.state, shard, folder, self._store.url_of(shard.key), self._scan_bytes)
            held.callback(opened.close)
            return _Handle(opened, held.pop_all())
