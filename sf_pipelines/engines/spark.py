"""Tasks on a Spark cluster, classic or through Spark Connect: each is a job of one row."""

import importlib.util
import os
import pickle
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pyarrow as pa

from sf_pipelines.engines.base import run_task
from sf_pipelines.engines.frames import VectorFn, build_from_frame, frame_columns, write_part
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import EngineError, MissingExtraError, TaskCrashedError, WorkerLostError, cause_of
from sf_pipelines.snapshot.run.tasks import Engine, Outcome, Task
from sf_pipelines.snapshot.stages.pipeline import BuildResult

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

# What Spark says where it was the worker that failed, and not the task.
_LOST = ("worker exited unexpectedly", "ExecutorLostFailure", "executor lost", "Python worker failed to connect back")
_RESULT = "outcome binary"
# Spark looks every 2 s for tasks to be ended, and gives a worker 2 s more (spark.python.task.killTimeout).
_KILL_SECONDS = 5.0
# More than any cluster has cores.
_MANY = 1_000_000
_PARTS = "number int, key string"


class SparkEngine(Engine):
    """A Spark session, which stays the caller's.

    Args:
        session: classic or Spark Connect. Its executors need this package, and the store must be reachable from them.
        workers: tasks at a time; None is what Spark says that it can do at once.

    Attributes:
        session: the same.
    """

    name = "spark"
    remote = True

    def __init__(self, session: "SparkSession", workers: int | None = None) -> None:
        self.session = session
        self._jobs = _Jobs.of(session)
        self._owned = False
        self._underway: set[Future[Outcome]] = set()
        self._tag = f"sf-pipelines-{uuid.uuid4().hex}"
        self.slots = workers or _parallelism(session)
        self._pool = ThreadPoolExecutor(self.slots, thread_name_prefix="sf-pipelines-spark")

    @classmethod
    def open(cls, address: str | None, workers: int | None) -> Self:
        """Connects to Spark, or starts it on this machine."""
        try:
            from pyspark.errors import PySparkException
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise MissingExtraError("engine spark needs pyspark: pip install 'sf-pipelines[spark]'") from error
        active = SparkSession.getActiveSession() if address is None else None
        if active is not None:
            return cls(active, workers)
        try:
            session = _connect(address) if address and address.startswith("sc://") else _start(address, workers)
        except ImportError as error:
            raise MissingExtraError(f"{address} needs pyspark[connect]: pip install 'sf-pipelines[spark]'") from error
        except (PySparkException, OSError, RuntimeError) as error:
            raise EngineError(f"no Spark at {address or 'this machine'}: {error}") from cause_of(error)
        engine = cls(session, workers)
        engine._owned = True
        return engine

    def submit(self, config: WriteConfig, task: Task) -> "Future[Outcome]":
        future = self._pool.submit(self._job, config, task)
        self._underway.add(future)
        future.add_done_callback(self._underway.discard)
        return future

    def _job(self, config: WriteConfig, task: Task) -> Outcome:
        # Tags are a thread's own: this one's jobs can be interrupted together with those of its fellows.
        self._jobs.add(self._tag)
        try:
            # One row in one partition from the start: bringing it there would be a shuffle for each task.
            job = self.session.range(0, 1, 1, 1)
            rows = _collect(job.mapInArrow(partial(_run_rows, pickle.dumps((config, task))), _RESULT), task.label)
        finally:
            self._jobs.remove(self._tag)
        return pickle.loads(rows[0]["outcome"])  # noqa: S301 - made by our own task

    def stop(self) -> None:
        """Interrupts the jobs that run, and waits until Spark has ended the Python workers of their tasks."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._underway:
            self._jobs.interrupt(self._tag)
            time.sleep(_KILL_SECONDS)
        self._pool.shutdown(wait=True)

    def close(self) -> None:
        """Ends the session, if it was started here."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._owned:
            self.session.stop()


class _Jobs(NamedTuple):
    """What a session calls the tags of its jobs. A classic one interrupts only what the very thread has tagged.

    Attributes:
        add: the jobs of this thread have a tag from now on.
        remove: they have it no longer.
        interrupt: ends all jobs that have it, of whatever thread.
    """

    add: Callable[[str], object]
    remove: Callable[[str], object]
    interrupt: Callable[[str], object]

    @classmethod
    def of(cls, session: "SparkSession") -> Self:
        """Those of a session, classic or Spark Connect."""
        if type(session).__module__.startswith("pyspark.sql.connect"):
            return cls(session.addTag, session.removeTag, session.interruptTag)
        context = session.sparkContext
        return cls(context.addJobTag, context.removeJobTag, context.cancelJobsWithTag)


def _connect(address: str) -> "SparkSession":
    """A session of its own on a Spark Connect server, whatever other sessions this process has."""
    from pyspark.sql.connect.session import SparkSession

    builder: Any = SparkSession.builder
    return builder.remote(address).create()


def _start(master: str | None, workers: int | None) -> "SparkSession":
    """A classic session; on this machine where no master is named."""
    from pyspark.sql import SparkSession

    builder: Any = SparkSession.builder
    builder = builder.appName("sf_pipelines").config("spark.ui.showConsoleProgress", "false")
    if master is not None:
        return builder.master(master).getOrCreate()
    # Its workers are of this very environment, which Spark asks for by this name and by no other.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = builder.config("spark.driver.host", "127.0.0.1").config("spark.ui.enabled", "false")
    return builder.master(f"local[{workers or len(os.sched_getaffinity(0))}]").getOrCreate()


def write_sharded(frame: "DataFrame", config: WriteConfig, vector_fn: VectorFn | None = None) -> BuildResult:
    """Builds, gates and publishes a snapshot of a Spark DataFrame, whose session does the work.

    The frame is computed once: its partitions are written to the store, and the build reads these.

    Args:
        frame: classic or Spark Connect. Vectors are ``array<float>`` or ``array<double>``.
        config: what to build; ``source`` is not looked at.
        vector_fn: makes the vectors where the frame has none: given record batches of the frame, it returns an Arrow
            array of lists or a matrix.

    Raises:
        SourceSchemaError: the frame lacks a column, or one is of a type that cannot be used.
        TaskCrashedError: a task failed; has its cause.
        SfPipelinesError: see ``build_snapshot``; the previous snapshot keeps serving.
    """
    session = frame.sparkSession
    names = [f"`{name.replace('`', '``')}`" for name in frame_columns(config, frame.columns, vector_fn)]

    def stage(folder: str) -> list[str]:
        written = frame.select(*names).mapInArrow(partial(_write_rows, config, folder, vector_fn), _PARTS)
        rows = _collect(written, "writing the frame")
        return [row["key"] for row in sorted(rows, key=lambda row: row["number"])]

    with SparkEngine(session) as engine:
        return build_from_frame(config, vector_fn, engine, stage)


def _collect(frame: "DataFrame", what: str) -> list[Any]:
    """The rows of a small result."""
    try:
        return frame.collect()
    except _errors() as error:
        text = str(error).partition("JVM stacktrace:")[0].strip()
        kind = WorkerLostError if any(sign in text for sign in _LOST) else TaskCrashedError
        raise kind(f"{what} on Spark: {text[:2000]}") from error


def _errors() -> tuple[type[Exception], ...]:
    """What Spark raises; a client of Spark Connect alone has no py4j."""
    from pyspark.errors import PySparkException

    if importlib.util.find_spec("py4j") is None:
        return (PySparkException,)
    from py4j.protocol import Py4JError

    return (PySparkException, Py4JError)


def _write_rows(
    config: WriteConfig, folder: str, vector_fn: VectorFn | None, rows: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """The key of the part that a partition was written to, in place of its rows."""
    from pyspark import TaskContext

    context = TaskContext.get()
    key = write_part(config, folder, vector_fn, rows)
    if key is not None and context is not None:
        number = pa.array([context.partitionId()], pa.int32())
        yield pa.record_batch([number, pa.array([key], pa.string())], names=["number", "key"])


def _run_rows(payload: bytes, rows: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The task, in place of the one row."""
    for batch in rows:
        if batch.num_rows:
            config, task = pickle.loads(payload)  # noqa: S301 - made by our own driver
            outcome = pickle.dumps(run_task(config, task))
            yield pa.record_batch([pa.array([outcome], pa.binary())], names=["outcome"])


def _parallelism(session: "SparkSession") -> int:
    """Tasks that Spark can run at once: as many as it makes partitions where nobody says a number."""
    parts = session.range(_MANY).selectExpr("spark_partition_id()").distinct()
    return len(_collect(parts, "asking for its cores"))
