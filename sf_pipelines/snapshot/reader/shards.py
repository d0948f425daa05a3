"""Open shards of one snapshot: opened once, shared, counted, and closed when nobody uses them any more."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from sf_pipelines.snapshot.errors import CountMismatchError, IntegrityError, ReaderClosedError
from sf_pipelines.snapshot.index import backend_in, backend_named
from sf_pipelines.snapshot.index.key_value import KeyValueShard
from sf_pipelines.snapshot.index.protocol import ShardIndex
from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.reader.metrics import Metrics
from sf_pipelines.snapshot.reader.options import ReaderSettings
from sf_pipelines.snapshot.reader.state import ShardEntry, SnapshotState
from sf_pipelines.snapshot.store import Store

PartT = TypeVar("PartT", ShardIndex, KeyValueShard)
AnswerT = TypeVar("AnswerT")

# Shards that are opened while one is being loaded.
_AHEAD = 8


def open_index(state: SnapshotState, folder: Path) -> ShardIndex:
    """The vector index of a shard's local copy, with the vectors in memory."""
    return _open_with(_backend_of(state, folder), state, folder, in_memory=True)


def _backend_of(state: SnapshotState, folder: Path) -> type[ShardIndex]:
    return backend_in(folder) if state.backend is None else backend_named(state.backend)


def _open_with(backend: type[ShardIndex], state: SnapshotState, folder: Path, *, in_memory: bool) -> ShardIndex:
    where = folder / backend.subfolder if state.kind == "unified" else folder
    return backend.open(where, metric=state.metric, dim=state.dim, in_memory=in_memory)


class OpenShard:
    """A shard's local copy. Its parts are opened when they are first asked for. Thread-safe.

    Args:
        state: its snapshot.
        entry: the shard.
        folder: the copy.
        url: its address, for errors.
        may_hold: whether so many bytes of vectors may be kept in memory; notes them in ``reserved``.
    """

    def __init__(
        self,
        state: SnapshotState,
        entry: ShardEntry,
        folder: Path,
        url: str,
        may_hold: "Callable[[OpenShard, int], bool]",
    ) -> None:
        self.entry = entry
        self.folder = folder
        self.reserved = 0
        self._state = state
        self._name = f"shard {entry.db_id} at {url}"
        self._may_hold = may_hold
        self._lock = threading.Lock()
        self._index: ShardIndex | None = None
        self._keys: KeyValueShard | None = None
        self._closed = False

    @property
    def index(self) -> ShardIndex:
        """The vector index; an ``IntegrityError`` where it cannot be read or its rows are not those of the manifest."""
        index = self._index
        if index is None:
            with self._lock:
                index = self._index = self._index or self._opened_index()
        return index

    @property
    def keys(self) -> KeyValueShard:
        """The keys and values, in a unified snapshot."""
        keys = self._keys
        if keys is None:
            with self._lock:
                keys = self._keys = self._keys or self._opened(lambda: KeyValueShard(self.folder), self._check_keys)
        return keys

    def warm(self) -> None:
        """Opens every part that there is, and loads what is kept in memory."""
        self.index.warm()
        if self._state.kind == "unified":
            _ = self.keys

    @property
    def memory_bytes(self) -> int:
        """About how much memory it holds at present, or is about to."""
        index = self._index
        return max(self.reserved, 0 if index is None else index.memory_bytes)

    @property
    def in_memory(self) -> bool:
        """Whether a search is a scan of vectors that are held already."""
        index = self._index
        return index is not None and index.in_memory

    @property
    def has_keys(self) -> bool:
        """Whether the keys and values are open already."""
        return self._keys is not None

    def close(self) -> None:
        """Closes what was opened."""
        with self._lock:
            self._closed = True
            for part in (self._index, self._keys):
                if part is not None:
                    part.close()

    def _opened_index(self) -> ShardIndex:
        with ExitStack() as on_failure:
            # What cannot be opened takes no room from others.
            on_failure.callback(setattr, self, "reserved", 0)
            index = self._opened(self._open_index, self._check_vectors)
            on_failure.pop_all()
        return index

    def _open_index(self) -> ShardIndex:
        backend = _backend_of(self._state, self.folder)
        size = self.entry.rows * self._state.dim * 4
        in_memory = size <= backend.scan_bytes and self._may_hold(self, size)
        return _open_with(backend, self._state, self.folder, in_memory=in_memory)

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
                raise CountMismatchError(f"{self._name} has {part.rows} {fault}, the manifest says {self.entry.rows}")
            on_failure.pop_all()
        return part

    def _check_vectors(self, rows: int) -> str | None:
        # Others count what they wrote into the table of keys, and a record need not come with a vector.
        strict = self._state.kind == "vector" or self._state.is_ours
        return "rows" if strict and rows != self.entry.rows else None

    def _check_keys(self, rows: int) -> str | None:
        # Others count a key again each time that it is written; the table holds it once.
        wrong = rows != self.entry.rows if self._state.is_ours else rows > self.entry.rows
        return "keys" if wrong else None


def _is_gone(shard: OpenShard) -> bool:
    """Whether files of a shard's local copy were removed: another process emptied the cache, whatever it locks."""
    objects = shard.entry.objects
    if objects is None:
        return not shard.folder.is_dir() or not any(shard.folder.iterdir())
    return not all((shard.folder / item.path).exists() for item in objects)


class Handle:
    """An opened shard and the hold on its local copy. Its counts belong to ``OpenShards``.

    A damaged one is given to nobody else. For the next caller the copy is checked, and fetched again if it is to blame.
    """

    def __init__(self, shard: OpenShard, held: ExitStack) -> None:
        self.shard = shard
        self.held = held
        self.damaged = False
        self.users = 0
        self.last_use = time.monotonic()
        self.counted = 0


class OpenShards:
    """Open shards of one snapshot. Thread-safe.

    Args:
        state: the snapshot.
        store: where it is.
        cache: local copies.
        settings: limits of what stays open.
        openers: threads that open shards.
        metrics: of the reader.
    """

    def __init__(
        self,
        state: SnapshotState,
        store: Store,
        cache: ShardCache,
        settings: ReaderSettings,
        openers: Executor,
        metrics: Metrics,
    ) -> None:
        self.state = state
        self._store = store
        self._cache = cache
        self._settings = settings
        self._openers = openers
        self._metrics = metrics
        self._kind = {"kind": state.kind}
        self._lock = threading.Lock()
        self._handles: dict[int, Handle] = {}
        # Those who wait for shards that are being opened; an entry goes with the last of them.
        self._waiting: dict[int, list[Future[Handle]]] = {}
        # Bytes that shards held when they were closed.
        self._grown: dict[int, int] = {}
        self._crowded = False
        self._closed = False

    def acquire(self, db_id: int) -> "Future[Handle]":
        """An opened shard, as soon as there is one; to be given back.

        Concurrent requests for a closed shard share one open. A failure is not remembered: the next one tries again.
        """
        future: Future[Handle] = Future()
        with self._lock:
            handle = self._handles.get(db_id)
            waiting = self._waiting.get(db_id)
            if handle is not None:
                handle.users += 1
            elif waiting is not None:
                waiting.append(future)
            else:
                self._waiting[db_id] = [future]
        if handle is not None:
            future.set_result(handle)
        elif waiting is None:
            self._start_opening(db_id)
        return future

    def take_open(self, db_id: int, matches: Callable[[OpenShard], bool]) -> Handle | None:
        """A shard that is open already and matches, to be given back; else None."""
        with self._lock:
            handle = self._handles.get(db_id)
            if handle is None or not matches(handle.shard):
                return None
            handle.users += 1
            return handle

    def give_back(self, handle: Handle) -> None:
        """Ends the use of a shard. It is closed when it is one too many and nobody else uses it."""
        with self._lock:
            handle.users -= 1
            handle.last_use = time.monotonic()
            # Looking through all shards costs more than most searches: only where something may have changed.
            crowded = self._crowded or self._closed or handle.shard.memory_bytes != handle.counted
            db_id = handle.shard.entry.db_id
            if handle.damaged and self._handles.get(db_id) is handle:
                del self._handles[db_id]
            given_up = handle.damaged and not handle.users
        if given_up:
            handle.held.close()
        if crowded:
            self._close_surplus()

    def abandon(self, future: "Future[Handle]") -> None:
        """Lets go of a shard that was asked for, whether it came or not."""
        if not future.cancel():
            future.add_done_callback(self._give_back_late)

    def using(self, handle: Handle, work: Callable[[OpenShard], AnswerT]) -> AnswerT:
        """Works on an opened shard and gives it back; once more on a fresh copy if the cache was emptied."""
        try:
            with self._until_given_back(handle):
                return work(handle.shard)
        except (IntegrityError, OSError):
            if not _is_gone(handle.shard):
                raise
        entry = handle.shard.entry
        fresh = self._open(entry)
        fresh.users = 1
        with self._lock:
            # One too many is closed when it is given back.
            fresh.damaged = self._handles.setdefault(entry.db_id, fresh) is not fresh
        with self._until_given_back(fresh):
            return work(fresh.shard)

    @contextmanager
    def borrow(self, db_id: int) -> Iterator[OpenShard]:
        """An opened shard that stays open for as long as the block lasts."""
        future = self.acquire(db_id)
        try:
            handle = future.result()
        except BaseException:
            # Interrupted while the shard was being opened: it may come still.
            self.abandon(future)
            raise
        with self._until_given_back(handle):
            yield handle.shard

    def warm(self, shards: Iterable[int]) -> None:
        """Opens shards and loads what is kept in memory; empty ones are left out."""
        todo = deque(db_id for db_id in shards if self.state.shards[db_id].key is not None)
        opening: deque[Future[Handle]] = deque()
        try:
            while todo or opening:
                while todo and len(opening) < _AHEAD:
                    opening.append(self.acquire(todo.popleft()))
                handle = opening[0].result()
                opening.popleft()
                self.using(handle, OpenShard.warm)
        finally:
            for future in opening:
                self.abandon(future)

    @property
    def open_shards(self) -> list[int]:
        """Numbers of the shards that are open."""
        with self._lock:
            return sorted(self._handles)

    @property
    def in_memory(self) -> frozenset[int]:
        """Numbers of the shards that are searched by a scan of vectors in memory."""
        with self._lock:
            return frozenset(db_id for db_id, handle in self._handles.items() if handle.shard.in_memory)

    @property
    def memory_bytes(self) -> int:
        """About how much memory all open shards hold."""
        with self._lock:
            return self._held()

    def close(self) -> None:
        """Closes what nobody uses now, and the rest when it is given back."""
        with self._lock:
            self._closed = True
        self._close_surplus()

    @contextmanager
    def _until_given_back(self, handle: Handle) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, OSError):
            handle.damaged = True
            if handle.shard.entry.objects is None:
                # Nobody recorded what the copy should be: it is as likely wrong as what is stored.
                self._cache.distrust(handle.shard.folder)
            raise
        finally:
            self.give_back(handle)

    def _start_opening(self, db_id: int) -> None:
        try:
            opening = self._openers.submit(self._open, self.state.shards[db_id])
        except RuntimeError:
            # The threads were shut down: the reader was closed in the meantime.
            self._answer(db_id, ReaderClosedError(f"the reader of {self._store.url} was closed; open another one"))
        else:
            opening.add_done_callback(lambda opened: self._answer(db_id, opened.exception() or opened.result()))

    def _answer(self, db_id: int, found: Handle | BaseException) -> None:
        """Gives a shard, or the error, to all who wait for it."""
        with self._lock:
            # Who gave up is left out; who gives up from here on gives the shard back.
            waiting = [future for future in self._waiting.pop(db_id) if future.set_running_or_notify_cancel()]
            if isinstance(found, Handle):
                found.users = len(waiting)
                self._handles[db_id] = found
        for future in waiting:
            if isinstance(found, Handle):
                future.set_result(found)
            else:
                future.set_exception(found)
        self._close_surplus()

    def _give_back_late(self, future: "Future[Handle]") -> None:
        if not future.cancelled() and future.exception() is None:
            self.give_back(future.result())

    def _close_surplus(self) -> None:
        with self._lock:
            surplus = self._surplus()
        for handle in surplus:
            handle.held.close()

    def _surplus(self) -> list[Handle]:
        idle = sorted((handle.last_use, db_id) for db_id, handle in self._handles.items() if not handle.users)
        for handle in self._handles.values():
            handle.counted = handle.shard.memory_bytes
        memory = sum(handle.counted for handle in self._handles.values())
        out: list[Handle] = []
        for _, db_id in idle:
            if not self._too_many(memory):
                break
            handle = self._handles.pop(db_id)
            memory -= handle.counted
            self._grown[db_id] = max(handle.counted, self._grown.get(db_id, 0))
            out.append(handle)
        self._crowded = self._too_many(memory)
        return out

    def _held(self) -> int:
        return sum(handle.shard.memory_bytes for handle in self._handles.values())

    def _too_many(self, memory: int) -> bool:
        most = self._settings.max_cached_shards
        return self._closed or memory > self._settings.memory_budget or (most is not None and len(self._handles) > most)

    def _may_hold(self, shard: OpenShard, size: int) -> bool:
        """Whether vectors of this size fit beside what is held: no other shard is closed for them."""
        with self._lock:
            shard.reserved = 0
            # With ids and payloads it may have held more when it was open before, and had to be closed for it.
            needed = max(size, self._grown.get(shard.entry.db_id, 0))
            if self._settings.exact_scan and self._held() + needed <= self._settings.memory_budget:
                shard.reserved = needed
            return shard.reserved > 0

    def _open(self, shard: ShardEntry) -> Handle:
        if shard.key is None:
            raise ValueError(f"shard {shard.db_id} is empty and has nothing to open")
        started = time.perf_counter()
        with ExitStack() as held:
            folder = held.enter_context(self._cache.checkout(self._store, shard.key, shard.objects))
            opened = OpenShard(self.state, shard, folder, self._store.url_of(shard.key), self._may_hold)
            held.callback(self._metrics.shard_closed.add, 1, self._kind)
            held.callback(opened.close)
            self._metrics.shard_opened.add(1, self._kind)
            self._metrics.shard_open_latency.record((time.perf_counter() - started) * 1000, self._kind)
            return Handle(opened, held.pop_all())
