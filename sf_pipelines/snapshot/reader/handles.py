"""Opened shards of one snapshot: opened once, shared, counted, and closed when nobody uses them any more."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sf_pipelines.snapshot.errors import CountMismatchError, IntegrityError
from sf_pipelines.snapshot.index import backend_named
from sf_pipelines.snapshot.index.protocol import ShardIndex
from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.reader.state import ShardEntry, SnapshotState
from sf_pipelines.snapshot.store import Store


class _Handle:
    """An opened shard and the hold on its local copy."""

    def __init__(self, index: ShardIndex, held: ExitStack) -> None:
        self.index = index
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
    def borrow(self, db_id: int) -> Iterator[ShardIndex]:
        """An opened shard that stays open for as long as the block lasts.

        Raises:
            StoreError: its objects cannot be fetched.
            IntegrityError: they are not what the manifest says.
        """
        handle = self._take(db_id)
        try:
            yield handle.index
        finally:
            self._give_back(handle)

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
            handle.index.close()
            handle.held.close()

    def _surplus(self) -> list[_Handle]:
        idle = sorted((handle.last_use, db_id) for db_id, handle in self._handles.items() if not handle.users)
        memory = sum(handle.index.memory_bytes for handle in self._handles.values())
        out: list[_Handle] = []
        for _, db_id in idle:
            too_many = self._max_open is not None and len(self._handles) > self._max_open
            if not (self._closed or too_many or memory > self._max_memory):
                break
            handle = self._handles.pop(db_id)
            memory -= handle.index.memory_bytes
            out.append(handle)
        return out

    def _open(self, shard: ShardEntry) -> _Handle:
        if shard.key is None:
            raise ValueError(f"shard {shard.db_id} is empty and has nothing to open")
        where = self._store.url_of(shard.key)
        with ExitStack() as held:
            folder = held.enter_context(self._cache.checkout(self._store, shard.key, shard.objects))
            try:
                backend = backend_named(self.state.backend)
                index = backend.open(folder, metric=self.state.metric, dim=self.state.dim, scan_bytes=self._scan_bytes)
            except IntegrityError as error:
                raise IntegrityError(f"shard {shard.db_id} at {where} cannot be searched: {error}") from error
            held.callback(index.close)
            if index.rows != shard.rows:
                raise CountMismatchError(
                    f"shard {shard.db_id} at {where} has {index.rows} rows, the manifest says {shard.rows}"
                )
            return _Handle(index, held.pop_all())
