"""What all readers share: the served snapshot, its replacement, and the fan-out over shards."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import (
    ObjectMissingError,
    ReaderClosedError,
    SfPipelinesError,
    SnapshotKindError,
    SnapshotNotFoundError,
)
from sf_pipelines.snapshot.index.protocol import SCAN_BYTES, ShardHits, ShardIndex
from sf_pipelines.snapshot.manifest.pointer import manifest_key as key_of_pointer
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.reader.cache import DEFAULT_BYTES, ShardCache
from sf_pipelines.snapshot.reader.handles import ShardHandles
from sf_pipelines.snapshot.reader.merge import Candidates, ShardAnswer
from sf_pipelines.snapshot.reader.plan import Plan, positive
from sf_pipelines.snapshot.reader.state import SnapshotKind, SnapshotState, load_pointed, load_state, read_current
from sf_pipelines.snapshot.reader.types import RefreshOutcome
from sf_pipelines.snapshot.store import Store

DEFAULT_MEMORY = 2 * 1024**3
_THREADS = 4
_KINDS: dict[SnapshotKind, str] = {"vector": "vector-only snapshot", "unified": "unified snapshot (keys and vectors)"}
_READERS: dict[SnapshotKind, str] = {"vector": "ShardedVectorReader", "unified": "UnifiedShardedReader"}

JobT = TypeVar("JobT")
AnswerT = TypeVar("AnswerT")
Ask = Callable[[ShardIndex, Float32, int], ShardHits]


def exactly(index: ShardIndex, queries: Float32, k: int) -> ShardHits:
    """Nearest rows with exact scores."""
    return index.search(queries, k)


def as_stock(index: ShardIndex, queries: Float32, k: int) -> ShardHits:
    """What a stock reader gets."""
    return index.search_raw(queries, k)


class Serving:
    """A snapshot and its opened shards, counted: closed after it was replaced and the last search on it ended."""

    def __init__(self, state: SnapshotState, handles: ShardHandles) -> None:
        self.state = state
        self.handles = handles
        self.users = 0
        self.retired = False


class ReaderCore:
    """The served snapshot under a lock, and searches over its shards.

    Args:
        root: of the snapshot.
        s3: credentials and endpoint; None takes the environment's.
        cache_dir: folder for verified local copies; None is the default.
        cache_bytes: size that the folder is held to.
        manifest_key: serve exactly this manifest, whatever the pointer says.
        max_cached_shards: shards kept open; None is all.
        max_memory: bytes that open shards may hold.
        scan_bytes: see ``IndexBackend.open``.
        preload: open every shard before a snapshot is served.
        kind: of the snapshots that are served.

    Raises:
        SnapshotNotFoundError: nothing is published under the root.
        SnapshotKindError: the snapshot is of another kind.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        s3: S3Options | None,
        cache_dir: Path | None,
        cache_bytes: int = DEFAULT_BYTES,
        manifest_key: str | None,
        max_cached_shards: int | None,
        max_memory: int = DEFAULT_MEMORY,
        scan_bytes: int = SCAN_BYTES,
        preload: bool,
        kind: SnapshotKind,
    ) -> None:
        self._max_open = None if max_cached_shards is None else positive(max_cached_shards, "max_cached_shards")
        self._max_memory = max_memory
        self._scan_bytes = scan_bytes
        self._pinned = manifest_key
        self._preload = preload
        self._kind = kind
        self.store = open_root(root, s3)
        self._cache = ShardCache(cache_dir, cache_bytes)
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="sf-pipelines-shard")
        self._searches = 0
        self.closed = False
        self.last_error: str | None = None
        self._serving = self._make(self._load_first())

    # The served snapshot.

    @contextmanager
    def serving(self) -> Iterator[Serving]:
        """The snapshot that is served now; it stays open for as long as the block lasts.

        Raises:
            ReaderClosedError: the reader was closed.
        """
        with self._lock:
            if self.closed:
                raise ReaderClosedError(f"the reader of {self.store.url} was closed; open another one")
            serving = self._serving
            serving.users += 1
            self._searches += 1
        try:
            yield serving
        finally:
            with self._lock:
                serving.users -= 1
                self._searches -= 1
                done = serving.retired and not serving.users
                last = self.closed and not self._searches
            if done:
                serving.handles.close()
            if last:
                self._threads.shutdown(wait=False)

    @property
    def state(self) -> SnapshotState:
        """The snapshot that is served, or was when the reader was closed."""
        return self._serving.state

    def refresh(self) -> RefreshOutcome:
        """Serves what the pointer names now.

        The new snapshot is loaded and checked before it is swapped in; when that fails, the old one keeps serving.

        Raises:
            ReaderClosedError: the reader was closed.
        """
        with self._refreshing, self.serving() as old:
            run_id = old.state.manifest.run_id
            if self._pinned is not None:
                return RefreshOutcome("unchanged", run_id)
            try:
                fresh = self._load_if_new(old.state)
            except SfPipelinesError as error:
                self.last_error = f"{type(error).__name__}: {error}"
                return RefreshOutcome("failed", run_id, error)
            self.last_error = None
            if fresh is None:
                return RefreshOutcome("unchanged", run_id)
            self._swap(fresh)
            return RefreshOutcome("updated", fresh.state.manifest.run_id)

    def close(self) -> None:
        """Ends serving. Searches that are under way finish; the shards are closed after the last one."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._serving.retired = True
            idle, last = not self._serving.users, not self._searches
        if idle:
            self._serving.handles.close()
        if last:
            self._threads.shutdown(wait=False)

    def _load_first(self) -> SnapshotState:
        if self._pinned is not None:
            return load_state(self.store, self._pinned)
        return load_pointed(self.store, read_current(self.store))

    def _load_if_new(self, old: SnapshotState) -> Serving | None:
        pointer = read_current(self.store)
        same_digest = pointer.manifest_digest in {None, old.manifest_digest}
        if key_of_pointer(pointer) == old.manifest_key and same_digest:
            with self._lock:
                # The pointer may have been elsewhere in between: its age counts from when it came back.
                self._serving.state = replace(old, published_at=pointer.updated_at)
            return None
        return self._make(load_pointed(self.store, pointer))

    def _make(self, state: SnapshotState) -> Serving:
        if state.kind != self._kind:
            raise SnapshotKindError(
                f"manifest {self.store.url_of(state.manifest_key)} is of a {_KINDS[state.kind]}; open it with "
                f"{_READERS[state.kind]}"
            )
        handles = ShardHandles(
            state,
            self.store,
            self._cache,
            max_open=self._max_open,
            max_memory=self._max_memory,
            scan_bytes=self._scan_bytes,
        )
        with ExitStack() as on_failure:
            on_failure.callback(handles.close)
            for shard in state.shards if self._preload else ():
                if shard.key is not None:
                    with handles.borrow(shard.db_id) as opened:
                        opened.open_all()
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

    # Searching.

    def candidates(self, serving: Serving, plan: Plan, queries: Float32, k: int, ask: Ask = exactly) -> Candidates:
        """Asks each shard of the plan once, for all queries that want it.

        Raises:
            StoreError: a shard's objects cannot be fetched.
            IntegrityError: they are not what the manifest says. There are no partial answers.
        """
        shards = serving.state.shards
        jobs = [job for job in plan.by_shard() if shards[job[0]].key is not None]

        def one(job: tuple[int, np.ndarray, np.ndarray]) -> ShardAnswer:
            shard, which, places = job
            with serving.handles.borrow(shard) as opened:
                return ShardAnswer(shard, which, places, ask(opened.index, queries[which], k))

        quick = ask is exactly
        answers = self.spread(one, jobs, lambda job: quick and serving.handles.in_memory(job[0]))
        return Candidates(answers, *plan.shards.shape)

    def spread(
        self, work: Callable[[JobT], AnswerT], jobs: list[JobT], is_quick: Callable[[JobT], bool]
    ) -> list[AnswerT]:
        """Runs jobs of different shards side by side, quick ones right here; the first error ends it.

        A scan of a shard in memory takes less than a millisecond and uses all cores itself: handing it to other threads
        makes it slower.
        """
        slow = [place for place, job in enumerate(jobs) if not is_quick(job)]
        # This thread takes one of them itself.
        pending = {place: self._threads.submit(work, jobs[place]) for place in slow[1:]}
        try:
            own = {place: work(job) for place, job in enumerate(jobs) if place not in pending}
            return [own[place] if place in own else pending[place].result() for place in range(len(jobs))]
        finally:
            for answer in pending.values():
                answer.cancel()


def open_root(root: str | Path, s3: S3Options | None) -> Store:
    """The store below a root that something should have been published under.

    Raises:
        SnapshotNotFoundError: there is no such folder.
    """
    try:
        return Store.open(root, s3)
    except ObjectMissingError as error:
        raise SnapshotNotFoundError(f"nothing has been published under {root}: {error}") from error
