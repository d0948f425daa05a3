"""What both faces of readers share: the served snapshot, its replacement, and the running of calls."""

import asyncio
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from contextvars import copy_context
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Self, TypeVar

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
from sf_pipelines.snapshot.reader.calls import Call, FanOut, Steps
from sf_pipelines.snapshot.reader.metrics import metrics_of
from sf_pipelines.snapshot.reader.options import ReaderSettings
from sf_pipelines.snapshot.reader.shards import OpenShards
from sf_pipelines.snapshot.reader.state import SnapshotKind, SnapshotState, find_snapshot, load_pointed, read_current
from sf_pipelines.snapshot.reader.types import Health, RefreshOutcome
from sf_pipelines.snapshot.store import Store

_KINDS: dict[SnapshotKind, str] = {"vector": "vector-only snapshot", "unified": "unified snapshot (keys and vectors)"}
_READERS: dict[SnapshotKind, str] = {"vector": "ShardedVectorReader", "unified": "UnifiedShardedReader"}
# Openers wait for the store more than they work; with many, some that hang leave others.
_OPENERS = 4
# Readers that were started together must not ask the store together for ever.
_JITTER = 0.1
_random = random.SystemRandom()
_log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


class Serving:
    """A snapshot and its open shards, counted: closed after it was replaced and the last call on it ended."""

    def __init__(self, state: SnapshotState, shards: OpenShards) -> None:
        self.state = state
        self.shards = shards
        self.users = 0
        self.retired = False


class ReaderCore:
    """The served snapshot under a lock, and calls on its shards.

    Args:
        store: opened on the root.
        settings: of the reader.
        state: the snapshot to begin with.
        kind: of the snapshots that are served.
        fallback: what the pointer names and why that is not served; None where it is.
    """

    def __init__(
        self,
        store: Store,
        settings: ReaderSettings,
        state: SnapshotState,
        *,
        kind: SnapshotKind,
        fallback: str | None = None,
    ) -> None:
        self._settings = settings
        self._process = os.getpid()
        self.kind: SnapshotKind = kind
        self.rate_limiter = settings.rate_limiter
        self.metrics = metrics_of(settings.meter_provider)
        self.store = store
        self._cache = ShardCache(settings.cache_dir, settings.cache_bytes)
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._calls = 0
        self.closed = False
        self._fallback = fallback
        # Why the last refresh failed, and when.
        self._failure: tuple[str, float] | None = None
        workers = settings.max_concurrency
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="sf-pipelines-search")
        self._openers = ThreadPoolExecutor(_OPENERS * workers, thread_name_prefix="sf-pipelines-open")
        with ExitStack() as on_failure:
            on_failure.callback(self._shut_down)
            self._serving = self._make(state, range(len(state.shards)) if settings.preload else ())
            on_failure.pop_all()
        # Not an event: its end may come from the garbage collector, in the thread that is just waiting on it.
        self._stopped: SimpleQueue[None] = SimpleQueue()
        if settings.refresh_interval is not None:
            self._refresh_in_background(settings.refresh_interval)
        self.metrics.opened.add(1, {"kind": kind})

    @classmethod
    def open(cls, root: str | Path, settings: ReaderSettings, kind: SnapshotKind | None) -> Self:
        """Opens the snapshot that a root's pointer, or the settings, name; of whatever kind where that is None."""
        store = open_root(root, settings.s3)
        state, fallback = find_snapshot(store, settings.manifest_key, settings.fallback, kind)
        return cls(store, settings, state, kind=kind or state.kind, fallback=fallback)

    # The served snapshot.

    @contextmanager
    def serving(self) -> Iterator[Serving]:
        """The snapshot that is served now; it stays open for as long as the block lasts."""
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
                serving.shards.close()
            if last:
                self._shut_down()

    def check_process(self) -> None:
        """Refuses the use of what belongs to another process."""
        # Before any lock: what another thread held during the fork is never freed here.
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

    def health(self, staleness_threshold: timedelta | float | None) -> Health:
        """State of the reader; answers after it was closed, too."""
        self.check_process()
        serving, failure = self._serving, self._failure
        state = serving.state
        age = (datetime.now(UTC) - (state.published_at or state.manifest.created_at)).total_seconds()
        limit = staleness_threshold
        if isinstance(limit, timedelta):
            limit = limit.total_seconds()
        degraded = (limit is not None and age > limit) or failure is not None or self._fallback is not None
        return Health(
            status="unhealthy" if self.closed else "degraded" if degraded else "healthy",
            manifest_ref=self.store.url_of(state.manifest_key),
            manifest_age_seconds=age,
            num_shards=state.manifest.num_dbs,
            is_closed=self.closed,
            last_error=None if failure is None else failure[0],
            last_error_age_seconds=None if failure is None else time.monotonic() - failure[1],
            fallback=self._fallback,
            open_shards=serving.shards.open_shards,
            memory_bytes=serving.shards.memory_bytes,
        )

    # Calls.

    def run(self, call: Call, steps: Steps[ResultT]) -> ResultT:
        """Runs a call by this thread, which may have others do parts of it."""
        self.check_process()
        with self._measured(call), closing(steps):
            ended, step = _advance(steps, None)
            while not ended:
                reply: Any = None
                if isinstance(step, FanOut):
                    try:
                        step.start(self._threads, self._settings.max_concurrency)
                        with suppress(TimeoutError):
                            step.done.result(call.left)
                    finally:
                        step.stop()
                    reply = step.outcomes
                elif self.rate_limiter is not None:
                    self.rate_limiter.acquire(step, timeout=call.left)
                ended, step = _advance(steps, reply)
            return step

    async def run_async(self, call: Call, steps: Steps[ResultT]) -> ResultT:
        """Runs a call without blocking the event loop; cancelling the task lets go of everything it holds."""
        self.check_process()
        with self._measured(call):
            ended, step = await self._advance_async(steps, None)
            while not ended:
                reply: Any = None
                with ExitStack() as on_failure:
                    on_failure.callback(steps.close)
                    if isinstance(step, FanOut):
                        try:
                            step.start(self._threads, self._settings.max_concurrency)
                            await asyncio.wait([asyncio.wrap_future(step.done)], timeout=call.left)
                        finally:
                            step.stop()
                        reply = step.outcomes
                    elif self.rate_limiter is not None:
                        await self.rate_limiter.acquire_async(step, timeout=call.left)
                    on_failure.pop_all()
                ended, step = await self._advance_async(steps, reply)
            return step

    async def _advance_async(self, steps: Steps[Any], reply: Any) -> tuple[bool, Any]:
        """One part of a call, on a thread: it plans, scans what is in memory and merges."""
        try:
            # With the caller's context variables (of tracing, for one).
            future = self._threads.submit(copy_context().run, _advance, steps, reply)
        except RuntimeError as error:
            steps.close()
            raise ReaderClosedError("the reader was closed during a call; open another one") from error
        try:
            return await asyncio.wrap_future(future)
        except BaseException:
            future.cancel()
            # The thread may be in the middle of it. Whatever it holds is let go as soon as it stops.
            future.add_done_callback(lambda _: steps.close())
            raise

    def _measured(self, call: Call) -> AbstractContextManager[None]:
        if call.operation is None:
            return nullcontext()
        return self.metrics.timed(call.operation, self.kind, call.missing)

    @property
    def idle_threads(self) -> Executor | None:
        """Threads that may help with a product; None where other calls need the cores as well."""
        return self._threads if self._calls == 1 else None

    def admitted(self, count: int) -> Steps[None]:
        """The part of a call that waits for the rate limiter: a token for each query or key."""
        with self._lock:
            self._check_open()
        if self.rate_limiter is not None and count:
            yield count

    # Replacing it.

    def refresh(self) -> RefreshOutcome:
        """Serves what the pointer names now.

        The new snapshot is loaded, checked and warmed before it is swapped in; when that fails, the old one keeps
        serving.
        """
        self.check_process()
        started = time.perf_counter()
        with self._refreshing, self.serving() as old:
            try:
                outcome = self._refreshed(old)
            except ReaderClosedError:
                raise
            except SfPipelinesError as error:
                self._note_failure(error)
                outcome = RefreshOutcome("failed", old.state.manifest.run_id, error)
            except BaseException as error:
                # A fault of ours: the caller sees it, and ``health`` says so.
                self._note_failure(error)
                raise
        error = outcome.error.kind if outcome.error else None
        self.metrics.ended("refresh", self.kind, outcome.status, started, error=error)
        return outcome

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
        self._stopped.put(None)
        if idle:
            self._serving.shards.close()
        if last:
            self._shut_down()
        self.metrics.closed.add(1, {"kind": self.kind})

    def _note_failure(self, error: BaseException) -> None:
        self._failure = f"{type(error).__name__}: {error}", time.monotonic()

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
            self._failure = self._fallback = None
            return RefreshOutcome("unchanged", run_id)
        state = load_pointed(self.store, pointer)
        every = range(len(state.shards))
        self._swap(self._make(state, every if self._settings.preload else sorted({*every} & {*old.shards.open_shards})))
        self._failure = self._fallback = None
        return RefreshOutcome("updated", state.manifest.run_id)

    def _make(self, state: SnapshotState, warm: Iterable[int]) -> Serving:
        if state.kind != self.kind:
            raise SnapshotKindError(
                f"manifest {self.store.url_of(state.manifest_key)} is of a {_KINDS[state.kind]}; open it with "
                f"{_READERS[state.kind]}"
            )
        shards = OpenShards(state, self.store, self._cache, self._settings, self._openers, self.metrics)
        with ExitStack() as on_failure:
            on_failure.callback(shards.close)
            shards.warm(warm)
            on_failure.pop_all()
        return Serving(state, shards)

    def _swap(self, fresh: Serving) -> None:
        with self._lock:
            closed = self.closed
            if not closed:
                # The caller still uses the old one, so it is closed when the caller lets go of it.
                self._serving.retired = True
                self._serving = fresh
        if closed:
            fresh.shards.close()
            raise ReaderClosedError(f"the reader of {self.store.url} was closed while it was refreshed")

    def _refresh_in_background(self, interval: float) -> None:
        """A thread, for async readers too: it outlives the event loop that the reader was opened in."""
        stopped = self._stopped
        # The thread must not keep alive a reader that nobody else holds.
        known = weakref.ref(self, lambda _: stopped.put(None))
        threading.Thread(
            target=_keep_refreshing, args=(known, stopped, interval), name="sf-pipelines-refresh", daemon=True
        ).start()

    def _check_open(self) -> None:
        if self.closed:
            raise ReaderClosedError(f"the reader of {self.store.url} was closed; open another one")

    def _shut_down(self) -> None:
        """Lets the threads end when they have done what they were given."""
        self._threads.shutdown(wait=False)
        self._openers.shutdown(wait=False)


def open_root(root: str | Path | Store, s3: S3Options | None) -> Store:
    """The store below a root that something should have been published under; one that is open is taken as it is."""
    if isinstance(root, Store):
        return root
    try:
        return Store.open(root, s3)
    except ObjectMissingError as error:
        raise SnapshotNotFoundError(f"nothing has been published under {root}: {error}") from error


def in_thread(work: Callable[..., ResultT], *arguments: Any) -> Future[ResultT]:
    """Has a thread of its own do something that may take long."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="sf-pipelines-reader")
    try:
        return thread.submit(work, *arguments)
    finally:
        thread.shutdown(wait=False)


def _advance(steps: Steps[Any], reply: Any) -> tuple[bool, Any]:
    """Goes on with a call until it needs an answer or ends: whether it has ended, and what it needs or returns."""
    try:
        return False, steps.send(reply)
    except StopIteration as end:
        return True, end.value


def _keep_refreshing(known: "weakref.ref[ReaderCore]", stopped: "SimpleQueue[None]", interval: float) -> None:
    while True:
        with suppress(Empty):
            pause = interval * _random.uniform(1 - _JITTER, 1 + _JITTER)
            return stopped.get(timeout=min(pause, threading.TIMEOUT_MAX))
        core = known()
        if core is None or core.closed:
            return None
        _refresh(core)
        del core


def _refresh(core: ReaderCore) -> None:
    """Refreshes, and logs a failure. Keeps no outcome: its error's traceback would keep a forgotten reader alive."""
    try:
        outcome = core.refresh()
    except ReaderClosedError:
        # The thread sees that before its next look.
        return
    except Exception:  # noqa: BLE001 - the thread must go on; the log says what happened
        _log.exception("The refresh of %s failed; the old snapshot is still served", core.store.url)
        return
    if outcome.error is not None:
        # As text, for a handler may keep what it is given.
        fault = f"{type(outcome.error).__name__}: {outcome.error}"
        _log.warning("The refresh of %s failed; snapshot %s is still served: %s", core.store.url, outcome.run_id, fault)
