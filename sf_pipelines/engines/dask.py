"""Tasks on a Dask cluster, through ``distributed``."""

import os
import threading
import time
import uuid
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from sf_pipelines.engines.frames import VectorFn, build_from_frame, frame_columns, partitions, write_part
from sf_pipelines.engines.local import THREAD_VARIABLES
from sf_pipelines.snapshot.addresses import cause_of
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import (
    EngineError,
    MissingExtraError,
    SfPipelinesError,
    TaskCrashedError,
    WorkerLostError,
)
from sf_pipelines.snapshot.run.tasks import Outcome, Task
from sf_pipelines.snapshot.stages.pipeline import BuildResult
from sf_pipelines.snapshot.stages.shuffle import PIECES, route_pieces, write_pieces
from sf_pipelines.snapshot.stages.worker import run_task

if TYPE_CHECKING:
    from distributed import Client

_MISSING = "engine dask needs dask and distributed: pip install 'sf-pipelines[dask]'"
_POLL_SECONDS = 0.1
# Each worker is about one core. Dask's own choice has workers give memory back to the system at each free, too, which
# index builds pay for with most of their time.
_ENVIRONMENT = {"distributed.nanny.pre-spawn-environ": dict.fromkeys(THREAD_VARIABLES, 1)}

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


def write_sharded(frame: Any, config: WriteConfig, vector_fn: VectorFn | None = None) -> BuildResult:
    """Builds, gates and publishes a snapshot of a Dask DataFrame, on the cluster of the active client.

    The frame is computed once: its partitions are written to the store, and the build reads these. Dask's own shuffle
    brings a shard's rows together.

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

        def shuffle(config: WriteConfig, run_id: str, places: int) -> list[str]:
            count = partitions(config, places, engine.slots)
            place = delayed(_place_rows, pure=False)
            placed = _pieces(config, run_id, places, count).shuffle("_partitions", npartitions=count)
            tasks = [place(config, run_id, part) for part in placed.to_delayed()]
            return _keys(client, tasks, "routing the frame")

        return build_from_frame(config, vector_fn, engine, stage, shuffle)


def _pieces(config: WriteConfig, run_id: str, places: int, count: int) -> Any:
    """A frame of pieces, a partition for each input range; Dask brings a piece where ``_partitions`` says."""
    import pandas as pd
    from dask.dataframe import from_map

    columns = {"_partitions": "int32", "shard": "int32", "rows": pd.ArrowDtype(pa.large_binary())}
    meta = pd.DataFrame({name: pd.Series([], dtype=kind) for name, kind in columns.items()})
    return from_map(_route_rows, range(places), args=(config, run_id, count), meta=meta)


def _keys(client: Any, tasks: list[Any], what: str) -> list[str]:
    """The keys that tasks give; gives up the others where one fails.

    Raises:
        SfPipelinesError: what a task raised.
        WorkerLostError: a worker was lost, more often than Dask runs a task again.
        TaskCrashedError: a task failed in another way.
    """
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
    return write_part(config, folder, vector_fn, _batches(rows))


def _route_rows(place: int, config: WriteConfig, run_id: str, count: int) -> Any:
    import pandas as pd

    pieces = pa.Table.from_batches(list(route_pieces(config, run_id, place)), PIECES)
    shards = pieces.column("shard").to_numpy()
    rows = pd.Series(pieces.column("rows"), dtype=pd.ArrowDtype(pa.large_binary()))
    return pd.DataFrame({"_partitions": shards % count, "shard": shards, "rows": rows})


def _place_rows(config: WriteConfig, run_id: str, pieces: Any) -> str | None:
    return write_pieces(config, run_id, _batches(pieces[PIECES.names], PIECES))


def _batches(rows: Any, schema: pa.Schema | None = None) -> list[pa.RecordBatch]:
    """A pandas frame as Arrow."""
    return pa.Table.from_pandas(rows, schema, preserve_index=False).combine_chunks().to_batches()
