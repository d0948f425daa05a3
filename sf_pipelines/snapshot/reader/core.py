"""What all readers share: the served snapshot, its replacement, and the running of calls."""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import (
    ObjectMissingError,
    ReaderClosedError,
    ReaderForkedError,
    SfPipelinesError,
    SnapshotKindError,
    SnapshotNotFoundError,
)
from sf_pipelines.snapshot.manifest.pointer import manifest_key as key_of_pointer
from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.reader.calls import Call, Steps, Tokens
from sf_pipelines.snapshot.reader.events import SILENT, EventField, EventName, Value, guarded
from sf_pipelines.snapshot.reader.finding import find_snapshot
from sf_pipelines.snapshot.reader.handles import Limits, ShardHandles
from sf_pipelines.snapshot.reader.options import ReaderSettings
from sf_pipelines.snapshot.reader.refreshing import BackgroundRefresh
from sf_pipelines.snapshot.reader.running import Runner
from sf_pipelines.snapshot.reader.state import SnapshotKind, SnapshotState, load_pointed, read_current
from sf_pipelines.snapshot.reader.types import RefreshOutcome
from sf_pipelines.snapshot.store import Store

_KINDS: dict[SnapshotKind, str] = {"vector": "vector-only snapshot", "unified": "unified snapshot (keys and vectors)"}
_READERS: dict[SnapshotKind, str] = {"vector": "ShardedVectorReader", "unified": "UnifiedShardedReader"}

ResultT = TypeVar("ResultT")


class Serving:
    """A snapshot and its opened shards, counted: closed after it was replaced and the last call on it ended.

    Attributes:
        state: the snapshot.
        handles: its shards.
        users: calls on it.
        retired: whether another one is served, or none.
    """

    def __init__(self, state: SnapshotState, handles: ShardHandles) -> None:
        self.state = state
        self.handles = handles
        self.users = 0
        self.retired = False


@dataclass(frozen=True)
class Trouble:
    """Why the reader does not serve what it should.

    Attributes:
        text: what happened.
        since: when, by ``time.monotonic``.
    """

    text: str
    since: float


class ReaderCore:
    """The served snapshot under a lock, and calls on its shards.

    Args:
        root: of the snapshot.
        settings: of the reader.
        kind: of the snapshots that are served.

    Attributes:
        store: opened on the root.
        kind: of the snapshots that are served.
        events: told what happens; never raises.
        closed: whether it was closed.
        fallback: what should be served and why it is not, where an older snapshot is.
        failure: why the last refresh failed; None after a good one.

    Raises:
        SnapshotNotFoundError: nothing is published under the root.
        SnapshotKindError: the snapshot is of another kind.
        IntegrityError: manifest, routing artifacts or preloaded shards are damaged.
        StoreError: the store cannot be read.
    """

    def __init__(self, root: str | Path, settings: ReaderSettings, kind: SnapshotKind) -> None:
        started = time.perf_counter()
        self._settings = settings
        self._process = os.getpid()
        self.kind: SnapshotKind = kind
        self.events = guarded(settings.events)
        self.store = open_root(root, settings.s3)
        self._cache = ShardCache(settings.cache_dir, settings.cache_bytes)
        self._limits = Limits(settings.max_cached_shards, settings.memory_budget, settings.exact_scan)
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._calls = 0
        self.closed = False
        self.failure: Trouble | None = None
        found = find_snapshot(self.store, settings.manifest_key, settings.fallback, kind)
        self.fallback = None if found.instead_of is None else Trouble(found.instead_of, time.monotonic())
        self._runner = Runner(settings.max_concurrency, settings.rate_limiter)
        with ExitStack() as on_failure:
            on_failure.callback(self._runner.shut_down)
            self._serving = self._make(found.state, range(len(found.state.shards)) if settings.preload else ())
            on_failure.pop_all()
        every = settings.refresh_interval
        self._background = None if every is None else BackgroundRefresh(self, every)
        self._tell(EventName.INITIALIZED, {EventField.SHARDS: len(found.state.shards)}, started)

    # The served snapshot.

    @contextmanager
    def serving(self) -> Iterator[Serving]:
        """The snapshot that is served now; it stays open for as long as the block lasts.

        Raises:
            ReaderClosedError: the reader was closed.
            ReaderForkedError: it was opened by the process that this one was forked from.
        """
        self.check_process()
        with self._lock:
            self._check_open()
            serving = self._serving
            serving.users += 1
            self._calls += 1
        try:
            yield serving
        finally:
            with self._lock:
                serving.users -= 1
                self._calls -= 1
                done = serving.retired and not serving.users
                last = self.closed and not self._calls
            if done:
                serving.handles.close()
            if last:
                self._runner.shut_down()

    def check_process(self) -> None:
        """Refuses the use of what belongs to another process.

        Raises:
            ReaderForkedError: see ``serving``.
        """
        # Before any lock, and before any listener: what another thread held during the fork is never freed here.
        if os.getpid() != self._process:
            raise ReaderForkedError(
                f"the reader of {self.store.url} was opened by process {self._process}, and process {os.getpid()} was "
                "forked from that: its threads are not here. Start processes by spawn or forkserver and open a reader "
                "in each, or fork before anything is read"
            )

    @property
    def state(self) -> SnapshotState:
        """The snapshot that is served, or was when the reader was closed."""
        return self._serving.state

    @property
    def served(self) -> Serving:
        """The same with its shards, for a look; to use them see ``serving``."""
        return self._serving

    # Calls.

    def run(self, call: Call[ResultT]) -> ResultT:
        """Runs a call by this thread; errors as of the call."""
        self.check_process()
        with call.terms.reported(self.events, call.event, self.kind):
            return self._runner.run(call)

    async def run_async(self, call: Call[ResultT]) -> ResultT:
        """Runs a call without blocking the event loop; errors as of the call."""
        self.check_process()
        with call.terms.reported(self.events, call.event, self.kind):
            return await self._runner.run_async(call)

    @property
    def idle_threads(self) -> Executor | None:
        """Threads that may help with a product; None where other calls need the cores as well."""
        return self._runner.threads if self._calls == 1 else None

    @property
    def is_limited(self) -> bool:
        """Whether there is a rate limiter."""
        return self._runner.limiter is not None

    def admitted(self, count: int) -> Steps[None]:
        """The part of a call that waits for the rate limiter.

        Args:
            count: queries or keys.

        Raises:
            ReaderClosedError: the reader was closed.
            RateLimitError: it would take longer than the caller's timeout.
        """
        with self._lock:
            self._check_open()
        if self._runner.limiter is not None and count:
            yield Tokens(count)

    # Replacing it.

    def refresh(self) -> RefreshOutcome:
        """Serves what the pointer names now.

        The new snapshot is loaded, checked and warmed before it is swapped in; when that fails, the old one keeps
        serving.

        Raises:
            ReaderClosedError: the reader was closed.
            ReaderForkedError: see ``serving``.
        """
        self.check_process()
        started = time.perf_counter()
        with self._refreshing, self.serving() as old:
            try:
                outcome = self._refreshed(old)
            except SfPipelinesError as error:
                if isinstance(error, ReaderClosedError):
                    raise
                self.note_failure(error)
                outcome = RefreshOutcome("failed", old.state.manifest.run_id, error)
            except Exception as error:
                # Not of the tree: the caller hears of it, and so does whoever asks for health.
                self.note_failure(error)
                raise
        facts: dict[str, Value] = {EventField.STATUS: outcome.status}
        if outcome.error is not None:
            facts[EventField.ERROR] = outcome.error.kind
        self._tell(EventName.REFRESHED, facts, started)
        return outcome

    def note_failure(self, error: BaseException) -> None:
        """Has ``health`` tell why a refresh failed."""
        self.failure = Trouble(f"{type(error).__name__}: {error}", time.monotonic())

    def close(self) -> None:
        """Ends serving. Calls that are under way finish; the shards are closed after the last one."""
        if os.getpid() != self._process:
            # What is held belongs to the other process, and so may the locks.
            self.closed = True
            return
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._serving.retired = True
            idle, last = not self._serving.users, not self._calls
        if self._background is not None:
            self._background.stop()
        if idle:
            self._serving.handles.close()
        if last:
            self._runner.shut_down()
        self._tell(EventName.CLOSED, {})

    def _refreshed(self, old: Serving) -> RefreshOutcome:
        run_id = old.state.manifest.run_id
        if self._settings.manifest_key is not None:
            return RefreshOutcome("unchanged", run_id)
        pointer = read_current(self.store)
        same_digest = pointer.manifest_digest in {None, old.state.manifest_digest}
        if key_of_pointer(pointer) == old.state.manifest_key and same_digest:
            with self._lock:
                # The pointer may have been elsewhere in between: its age counts from when it came back.
                self._serving.state = replace(old.state, published_at=pointer.updated_at)
            self.failure = self.fallback = None
            return RefreshOutcome("unchanged", run_id)
        state = load_pointed(self.store, pointer)
        every = range(len(state.shards))
        self._swap(
            self._make(state, every if self._settings.preload else sorted({*every} & {*old.handles.open_shards}))
        )
        self.failure = self.fallback = None
        return RefreshOutcome("updated", state.manifest.run_id)

    def _make(self, state: SnapshotState, warm: Iterable[int]) -> Serving:
        if state.kind != self.kind:
            raise SnapshotKindError(
                f"manifest {self.store.url_of(state.manifest_key)} is of a {_KINDS[state.kind]}; open it with "
                f"{_READERS[state.kind]}"
            )
        handles = ShardHandles(
            state, self.store, self._cache, limits=self._limits, openers=self._runner.openers, events=self.events
        )
        with ExitStack() as on_failure:
            on_failure.callback(handles.close)
            handles.warm(warm)
            on_failure.pop_all()
        return Serving(state, handles)

    def _swap(self, fresh: Serving) -> None:
        with self._lock:
            closed = self.closed
            if not closed:
                # The caller still uses the old one, so it is closed when the caller lets go of it.
                self._serving.retired = True
                self._serving = fresh
        if closed:
            fresh.handles.close()
            raise ReaderClosedError(f"the reader of {self.store.url} was closed while it was refreshed")

    def _check_open(self) -> None:
        if self.closed:
            raise ReaderClosedError(f"the reader of {self.store.url} was closed; open another one")

    def _tell(self, name: EventName, facts: dict[str, Value], started: float | None = None) -> None:
        if self.events is SILENT:
            return
        about: dict[str, Value] = {EventField.KIND: self.kind, EventField.RUN_ID: self.state.manifest.run_id}
        if started is not None:
            about[EventField.LATENCY_MS] = (time.perf_counter() - started) * 1000
        self.events.emit(name, {**about, **facts})


def open_root(root: str | Path | Store, s3: S3Options | None) -> Store:
    """The store below a root that something should have been published under; one that is open is taken as it is.

    Raises:
        SnapshotNotFoundError: there is no such folder.
    """
    if isinstance(root, Store):
        return root
    try:
        return Store.open(root, s3)
    except ObjectMissingError as error:
        raise SnapshotNotFoundError(f"nothing has been published under {root}: {error}") from error
