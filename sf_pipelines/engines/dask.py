"""Tasks on a Dask cluster, through ``distributed``."""

import os
import threading
import time
import uuid
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.engine import Outcome, Task, run_task
from sf_pipelines.snapshot.errors import EngineError, MissingExtraError, TaskCrashedError, WorkerLostError

if TYPE_CHECKING:
    from distributed import Client

_POLL_SECONDS = 0.1

_lock = threading.Lock()
_running = 0


class DaskEngine:
    """A client of ``distributed``, which stays the caller's.

    Dask itself runs a task again whose worker is lost (``distributed.scheduler.allowed-failures``).

    Args:
        client: of the cluster. Its workers need this package, and the store must be reachable from them.
    """

    name = "dask"
    remote = True

    def __init__(self, client: "Client") -> None:
        # Its methods are typed as if they were all coroutines.
        self._client: Any = client
        self._owned: list[Any] = []
        self._futures: dict[Any, Future[Outcome]] = {}
        self.slots = max(1, sum(self._client.nthreads().values()))

    @classmethod
    def open(cls, address: str | None, workers: int | None) -> Self:
        """Connects to a scheduler, or starts a cluster on this machine, which ends with the engine.

        Raises:
            MissingExtraError: ``distributed`` is not installed.
            EngineError: the scheduler does not answer.
        """
        try:
            from distributed import Client, LocalCluster
        except ImportError as error:
            raise MissingExtraError("engine dask needs distributed: pip install 'sf-pipelines[dask]'") from error
        # A shard's rows are in memory while it is built: how much that is, is the choice of num_dbs.
        local: dict[str, Any] = {"host": "127.0.0.1", "dashboard_address": None, "memory_limit": None}
        cluster = None
        if address is None:
            count = workers or len(os.sched_getaffinity(0))
            cluster = LocalCluster(n_workers=count, threads_per_worker=1, **local)
        try:
            client = Client(cluster if cluster is not None else address)
        except (OSError, TimeoutError) as error:
            raise EngineError(f"no Dask scheduler answers at {address}: {error}") from error
        engine = cls(client)
        engine._owned = [client, *([cluster] if cluster is not None else [])]
        return engine

    def submit(self, config: WriteConfig, task: Task) -> "Future[Outcome]":
        """Runs the task on any worker."""
        key = f"sf-pipelines-{task.stage}-{task.number}-{uuid.uuid4().hex[:12]}"
        theirs = self._client.submit(_counted, config, task, key=key, pure=False)
        ours: Future[Outcome] = Future()
        ours.set_running_or_notify_cancel()
        self._futures[theirs] = ours
        theirs.add_done_callback(lambda done: self._settle(done, task))
        return ours

    def _settle(self, theirs: Any, task: Task) -> None:
        """Hands over what became of a task; called by a thread of the client."""
        from distributed import KilledWorker

        ours = self._futures.pop(theirs, None)
        if ours is None or ours.done():
            return
        if theirs.status == "finished":
            ours.set_result(theirs.result())
        elif theirs.status == "error":
            error = theirs.exception()
            lost = isinstance(error, KilledWorker)
            kind = WorkerLostError if lost else TaskCrashedError
            ours.set_exception(kind(f"{task.label} on Dask: {type(error).__name__}: {error}"))
        else:
            ours.set_exception(EngineError(f"{task.label} was {theirs.status} on Dask, by somebody else"))

    def stop(self) -> None:
        """Cancels what is queued, and waits for what runs: a thread of a worker cannot be ended from outside."""
        futures = list(self._futures)
        for ours in [self._futures.pop(theirs) for theirs in futures]:
            ours.set_exception(EngineError("the task was given up"))
        self._client.cancel(futures, force=True)
        while any(self._client.run(_busy).values()):
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Closes the client and the cluster, if they were opened here."""
        for item in self._owned:
            item.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _counted(config: WriteConfig, task: Task) -> Outcome:
    """The task, counted as running in its worker's process."""
    global _running  # noqa: PLW0603 - one count for all threads of a worker
    with _lock:
        _running += 1
    try:
        return run_task(config, task)
    finally:
        with _lock:
            _running -= 1


def _busy() -> int:
    """Tasks that run in this worker's process."""
    return _running
