"""Tasks on a Dask cluster, through ``distributed``."""

import os
import threading
import time
import uuid
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from sf_pipelines.engines.base import ClusterEngine, run_task
from sf_pipelines.engines.frames import VectorFn, build_from_frame, frame_columns, write_part
from sf_pipelines.engines.local import THREAD_VARIABLES
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import (
    EngineError,
    MissingExtraError,
    SfPipelinesError,
    TaskCrashedError,
    WorkerLostError,
    cause_of,
)
from sf_pipelines.snapshot.run.tasks import Outcome, Task
from sf_pipelines.snapshot.stages.pipeline import BuildResult

if TYPE_CHECKING:
    from distributed import Client

_MISSING = "engine dask needs dask and distributed: pip install 'sf-pipelines[dask]'"
_POLL_SECONDS = 0.1
# Each worker is about one core. Dask's own choice has workers give memory back to the system at each free, too, which
# index builds pay for with most of their time.
_ENVIRONMENT = {"distributed.nanny.pre-spawn-environ": dict.fromkeys(THREAD_VARIABLES, 1)}

_lock = threading.Lock()
_running = 0


class DaskEngine(ClusterEngine):
    """A client of ``distributed``, which stays the caller's.

    Dask itself runs a task again whose worker is lost (``distributed.scheduler.allowed-failures``).

    Args:
        client: of the cluster. Its workers need this package, and the store must be reachable from them.
    """

    name = "dask"

    def __init__(self, client: "Client") -> None:
        super().__init__()
        # Its methods are typed as if they were all coroutines.
        self._client: Any = client
        self._owned: list[Any] = []
        self.slots = max(1, sum(self._client.nthreads().values()))

    @classmethod
    def open(cls, address: str | None, workers: int | None) -> Self:
        """Connects to a scheduler, or starts a cluster on this machine, which ends with the engine."""
        try:
            from dask import config
            from distributed import Client, LocalCluster
        except ImportError as error:
            raise MissingExtraError(_MISSING) from error
        # A shard's rows are in memory while it is built: how much that is, is the choice of num_dbs.
        local: dict[str, Any] = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "memory_limit": None}
        cluster = None
        if address is None:
            count = workers or len(os.sched_getaffinity(0))
            with config.set(_ENVIRONMENT):
                cluster = LocalCluster(n_workers=count, threads_per_worker=1, **local)
        try:
            client = Client(cluster if cluster is not None else address)
        except (OSError, TimeoutError, ValueError) as error:
            raise EngineError(f"no Dask scheduler answers at {address}: {error}") from cause_of(error)
        engine = cls(client)
        engine._owned = [client, *([cluster] if cluster is not None else [])]
        return engine

    def submit(self, config: WriteConfig, task: Task) -> "Future[Outcome]":
        key = f"sf-pipelines-{task.stage}-{task.number}-{uuid.uuid4().hex[:12]}"
        theirs = self._client.submit(_counted, config, task, key=key, pure=False)
        ours = self._keep(theirs)
        theirs.add_done_callback(lambda done: self._settle(done, partial(_result, done, task)))
        return ours

    def stop(self) -> None:
        """Cancels what is queued, and waits for what runs: a thread of a worker cannot be ended from outside."""
        self._client.cancel(self._give_up(), force=True)
        while any(self._client.run(_busy).values()):
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Closes the client and the cluster, if they were opened here."""
        for item in self._owned:
            item.close()


def _result(theirs: Any, task: Task) -> Outcome | EngineError:
    """What became of a task: a future of Dask that is done, in the words of this package."""
    from distributed import KilledWorker

    if theirs.status == "finished":
        return theirs.result()
    if theirs.status == "error":
        error = theirs.exception()
        kind = WorkerLostError if isinstance(error, KilledWorker) else TaskCrashedError
        return kind(f"{task.label} on Dask: {type(error).__name__}: {error}")
    return EngineError(f"{task.label} was {theirs.status} on Dask, by somebody else")


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


def write_sharded(frame: Any, config: WriteConfig, vector_fn: VectorFn | None = None) -> BuildResult:
    """Builds, gates and publishes a snapshot of a Dask DataFrame, on the cluster of the active client.

    The frame is computed once: its partitions are written to the store, and the build reads these.

    Args:
        frame: ``dask.dataframe.DataFrame``. Vectors are Arrow-backed lists, or arrays in an object column. A column has
            the same Arrow type in all partitions: one with nulls needs an Arrow-backed dtype.
        config: what to build; ``source`` is not looked at.
        vector_fn: makes the vectors where the frame has none: given record batches of the frame, it returns an Arrow
            array of lists or a matrix.

    Raises:
        MissingExtraError: ``distributed`` is not installed.
        EngineError: there is no active client.
        SourceSchemaError: the frame lacks a column, or one is of a type that cannot be used.
        TaskCrashedError: a task failed; has its cause.
        SfPipelinesError: see ``build_snapshot``; the previous snapshot keeps serving.
    """
    try:
        from dask.delayed import delayed
        from distributed import get_client
    except ImportError as error:
        raise MissingExtraError(_MISSING) from error
    try:
        client = get_client()
    except ValueError as error:
        raise EngineError("write_sharded on Dask needs a cluster: make a distributed.Client first") from error
    names = frame_columns(config, frame.columns, vector_fn)

    def stage(folder: str) -> list[str]:
        write = delayed(_write_rows, pure=False)
        tasks = [write(config, folder, vector_fn, part) for part in frame[names].to_delayed()]
        return _keys(client, tasks, "writing the frame")

    with DaskEngine(client) as engine:
        return build_from_frame(config, vector_fn, engine, stage)


def _keys(client: Any, tasks: list[Any], what: str) -> list[str]:
    """The keys that tasks give; gives up the others where one fails."""
    from distributed import KilledWorker

    futures = client.compute(tasks)
    try:
        return [key for key in client.gather(futures) if key is not None]
    except SfPipelinesError:
        raise
    except KilledWorker as error:
        raise WorkerLostError(f"{what} on Dask: {error}") from error
    except Exception as error:
        raise TaskCrashedError(f"{what} on Dask: {type(error).__name__}: {error}") from error
    finally:
        client.cancel(futures)


def _write_rows(config: WriteConfig, folder: str, vector_fn: VectorFn | None, rows: Any) -> str | None:
    batches = pa.Table.from_pandas(rows, preserve_index=False).combine_chunks().to_batches()
    return write_part(config, folder, vector_fn, batches)
