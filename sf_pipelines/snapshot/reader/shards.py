"""Open shards of one snapshot: opened once, shared, counted, and closed when nobody uses them any more."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from itertools import islice
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
        held: what is let go when it is closed: the copy.
    """

    def __init__(
        self,
        state: SnapshotState,
        entry: ShardEntry,
        folder: Path,
        url: str,
        may_hold: "Callable[[OpenShard, int], bool]",
        held: ExitStack,
    ) -> None:
        self.entry = entry
        self.folder = folder
        self.reserved = 0
        # These belong to ``OpenShards``. A damaged shard is given to nobody else: for the next caller the copy is
        # checked, and fetched again if it is to blame.
        self.users = 0
        self.damaged = False
        self.counted_bytes = 0
        self._state = state
        self._name = f"shard {entry.db_id} at {url}"
        self._may_hold = may_hold
        self._held = held
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
                index = self._index = self._index or self._open_index()
        return index

    @property
    def keys(self) -> KeyValueShard:
        """The keys and values, in a unified snapshot."""
        keys = self._keys
        if keys is None:
            with self._lock:
                keys = self._keys = self._keys or self._open_keys()
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

    @property
    def is_gone(self) -> bool:
        """Whether files of the copy were removed: another process emptied the cache, whatever it locks."""
        if self.entry.objects is None:
            return not self.folder.is_dir() or not any(self.folder.iterdir())
        return not all((self.folder / item.path).exists() for item in self.entry.objects)

    def close(self) -> None:
        """Closes what was opened and lets go of the copy."""
        with self._held, self._lock:
            self._closed = True
            for part in (self._index, self._keys):
                if part is not None:
                    part.close()

    def _open_index(self) -> ShardIndex:
        backend = _backend_of(self._state, self.folder)
        size = self.entry.rows * self._state.dim * 4
        in_memory = size <= backend.scan_bytes and self._may_hold(self, size)
        # Others count what they wrote into the table of keys, and a record need not come with a vector.
        counted = self._state.kind == "vector" or self._state.is_ours
        try:
            return self._checked(
                lambda: _open_with(backend, self._state, self.folder, in_memory=in_memory),
                lambda rows: not counted or rows == self.entry.rows,
                "rows",
            )
        except BaseException:
            # What cannot be opened takes no room from others.
            self.reserved = 0
            raise

    def _open_keys(self) -> KeyValueShard:
        # Others count a key again each time that it is written; the table holds it once.
        return self._checked(
            lambda: KeyValueShard(self.folder),
            lambda rows: rows == self.entry.rows if self._state.is_ours else rows <= self.entry.rows,
            "keys",
        )

    def _checked(self, opener: Callable[[], PartT], is_right: Callable[[int], bool], counted: str) -> PartT:
        if self._closed:
            raise ReaderClosedError(f"{self._name} was closed")
        try:
            part = opener()
        except IntegrityError as error:
            raise IntegrityError(f"{self._name} cannot be read: {error}") from error
        with ExitStack() as on_failure:
            on_failure.callback(part.close)
            if not is_right(rows := part.rows):
                raise CountMismatchError(f"{self._name} has {rows} {counted}, the manifest says {self.entry.rows}")
            on_failure.pop_all()
        return part


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
        self._lock = threading.Lock()
        # The one that was not used for the longest time comes first.
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        # Those who wait for shards that are being opened.
        self._waiting: dict[int, list[Future[OpenShard]]] = {}
        # Bytes that shards held when they were closed.
        self._closed_bytes: dict[int, int] = {}
        self._crowded = False
        self._closed = False

    def acquire(self, db_id: int) -> "Future[OpenShard]":
        """An opened shard, as soon as there is one; to be given back.

        Concurrent requests for a closed shard share one open. A failure is not remembered: the next one tries again.
        """
        future: Future[OpenShard] = Future()
        with self._lock:
            shard = self._open.get(db_id)
            if shard is not None:
                shard.users += 1
            else:
                waiting = self._waiting.setdefault(db_id, [])
                waiting.append(future)
                if len(waiting) > 1:
                    return future
        if shard is not None:
            future.set_result(shard)
            return future
        try:
            opening = self._openers.submit(self._open_shard, db_id)
        except RuntimeError:
            # The threads were shut down: the reader was closed in the meantime.
            self._answer(db_id, ReaderClosedError(f"the reader of {self._store.url} was closed; open another one"))
        else:
            opening.add_done_callback(lambda opened: self._answer(db_id, opened.exception() or opened.result()))
        return future

    def take_open(self, db_id: int, matches: Callable[[OpenShard], bool] | None = None) -> OpenShard | None:
        """A shard that is open already and matches, to be given back; else None."""
        with self._lock:
            shard = self._open.get(db_id)
            if shard is None or (matches is not None and not matches(shard)):
                return None
            shard.users += 1
            return shard

    def give_back(self, shard: OpenShard) -> None:
        """Ends the use of a shard. It is closed when it is one too many and nobody else uses it."""
        db_id = shard.entry.db_id
        with self._lock:
            shard.users -= 1
            if self._open.get(db_id) is shard:
                self._open.move_to_end(db_id)
                if shard.damaged:
                    del self._open[db_id]
            given_up = shard.damaged and not shard.users
            # Looking through all shards costs more than most searches: only where something may have changed.
            changed = self._crowded or self._closed or shard.memory_bytes != shard.counted_bytes
        if given_up:
            shard.close()
        if changed:
            self._close_surplus()

    def give_back_later(self, future: "Future[OpenShard]") -> None:
        """Lets go of a shard that was asked for, when it comes."""

        def give_back(come: "Future[OpenShard]") -> None:
            if come.exception() is None:
                self.give_back(come.result())

        future.add_done_callback(give_back)

    def using(self, shard: OpenShard, work: Callable[[OpenShard], AnswerT]) -> AnswerT:
        """Works on an opened shard and gives it back; once more on a fresh copy if the cache was emptied."""
        try:
            with self._until_given_back(shard):
                return work(shard)
        except (IntegrityError, OSError):
            if not shard.is_gone:
                raise
        with self.borrow(shard.entry.db_id) as fresh:
            return work(fresh)

    @contextmanager
    def borrow(self, db_id: int) -> Iterator[OpenShard]:
        """An opened shard that stays open for as long as the block lasts."""
        future = self.acquire(db_id)
        try:
            shard = future.result()
        except BaseException:
            # Interrupted while the shard was being opened: it may come still.
            self.give_back_later(future)
            raise
        with self._until_given_back(shard):
            yield shard

    def warm(self, db_ids: Iterable[int]) -> None:
        """Opens shards and loads what is kept in memory; empty ones are left out."""
        to_open = (self.acquire(db_id) for db_id in db_ids if self.state.shards[db_id].key is not None)
        opening = deque(islice(to_open, _AHEAD))
        try:
            while opening:
                shard = opening[0].result()
                opening.popleft()
                opening.extend(islice(to_open, 1))
                self.using(shard, OpenShard.warm)
        finally:
            for future in opening:
                self.give_back_later(future)

    @property
    def open_shards(self) -> list[int]:
        """Numbers of the shards that are open."""
        with self._lock:
            return sorted(self._open)

    @property
    def in_memory(self) -> frozenset[int]:
        """Numbers of the shards that are searched by a scan of vectors in memory."""
        with self._lock:
            return frozenset(db_id for db_id, shard in self._open.items() if shard.in_memory)

    @property
    def memory_bytes(self) -> int:
        """About how much memory all open shards hold."""
        with self._lock:
            return self._held_bytes()

    def close(self) -> None:
        """Closes what nobody uses now, and the rest when it is given back."""
        with self._lock:
            self._closed = True
        self._close_surplus()

    @contextmanager
    def _until_given_back(self, shard: OpenShard) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, OSError):
            shard.damaged = True
            if shard.entry.objects is None:
                # Nobody recorded what the copy should be: it is as likely wrong as what is stored.
                self._cache.distrust(shard.folder)
            raise
        finally:
            self.give_back(shard)

    def _open_shard(self, db_id: int) -> OpenShard:
        entry, kind = self.state.shards[db_id], {"kind": self.state.kind}
        if entry.key is None:
            raise ValueError(f"shard {db_id} is empty and has nothing to open")
        started = time.perf_counter()
        held = ExitStack()
        folder = held.enter_context(self._cache.checkout(self._store, entry.key, entry.objects))
        held.callback(self._metrics.shard_closed.add, 1, kind)
        self._metrics.shard_opened.add(1, kind)
        self._metrics.shard_open_latency.record((time.perf_counter() - started) * 1000, kind)
        return OpenShard(self.state, entry, folder, self._store.url_of(entry.key), self._may_hold, held)

    def _answer(self, db_id: int, found: OpenShard | BaseException) -> None:
        """Gives a shard, or the error, to all who wait for it."""
        with self._lock:
            waiting = self._waiting.pop(db_id)
            if isinstance(found, OpenShard):
                found.users = len(waiting)
                self._open[db_id] = found
        for future in waiting:
            if isinstance(found, OpenShard):
                future.set_result(found)
            else:
                future.set_exception(found)
        self._close_surplus()

    def _close_surplus(self) -> None:
        """Closes shards that nobody uses, longest unused first, until the rest is within the limits."""
        surplus: list[OpenShard] = []
        with self._lock:
            for shard in self._open.values():
                shard.counted_bytes = shard.memory_bytes
            memory = sum(shard.counted_bytes for shard in self._open.values())
            for shard in [shard for shard in self._open.values() if not shard.users]:
                if not self._too_many(memory):
                    break
                db_id, size = shard.entry.db_id, shard.counted_bytes
                del self._open[db_id]
                memory -= size
                self._closed_bytes[db_id] = max(size, self._closed_bytes.get(db_id, 0))
                surplus.append(shard)
            self._crowded = self._too_many(memory)
        for shard in surplus:
            shard.close()

    def _too_many(self, memory: int) -> bool:
        most = self._settings.max_cached_shards
        return self._closed or memory > self._settings.memory_budget or (most is not None and len(self._open) > most)

    def _held_bytes(self) -> int:
        return sum(shard.memory_bytes for shard in self._open.values())

    def _may_hold(self, shard: OpenShard, size: int) -> bool:
        """Whether vectors of this size fit beside what is held: no other shard is closed for them."""
        with self._lock:
            shard.reserved = 0
            # With ids and payloads it may have held more when it was open before, and had to be closed for it.
            needed = max(size, self._closed_bytes.get(shard.entry.db_id, 0))
            if self._settings.exact_scan and self._held_bytes() + needed <= self._settings.memory_budget:
                shard.reserved = needed
            return shard.reserved > 0
