"""Tasks on a Ray cluster."""

import os
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from sf_pipelines.engines.base import ClusterEngine, run_task
from sf_pipelines.engines.frames import VectorFn, build_from_frame, frame_columns, write_part
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
    from ray.data import Dataset

_MISSING = "engine ray needs ray: pip install 'sf-pipelines[ray]'"
# How often Ray itself runs a task again whose worker is lost.
_RERUNS = 3


class RayEngine(ClusterEngine):
    """The Ray that this process is connected to, which stays the caller's.

    Args:
        task_cpus: cores that one task takes.
    """

    name = "ray"

    def __init__(self, task_cpus: float = 1) -> None:
        import ray

        super().__init__()
        self._owned = False
        options = {"num_cpus": task_cpus, "max_retries": _RERUNS}
        self._run: Any = ray.remote(run_task).options(**options)
        self.slots = max(1, int(ray.cluster_resources().get("CPU", 1) / task_cpus))

    @classmethod
    def open(cls, address: str | None, workers: int | None, task_cpus: float = 1) -> Self:
        """Connects to a cluster, or starts Ray on this machine, which ends with the engine.

        A process that is connected already stays so: then ``address`` and ``workers`` are not looked at.
        """
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError(_MISSING) from error
        opened = not ray.is_initialized()
        if opened:
            where: dict[str, Any] = {"address": address}
            if address is None:
                where = {"num_cpus": workers or len(os.sched_getaffinity(0)), "include_dashboard": False}
                where["_node_ip_address"] = "127.0.0.1"
            try:
                ray.init(log_to_driver=False, **where)
            except (ConnectionError, OSError, RuntimeError) as error:
                raise EngineError(f"no Ray cluster answers at {address or 'this machine'}: {error}") from cause_of(
                    error
                )
        engine = cls(task_cpus)
        engine._owned = opened
        return engine

    def submit(self, config: WriteConfig, task: Task) -> "Future[Outcome]":
        reference = self._run.remote(config, task)
        ours = self._keep(reference)
        reference.future().add_done_callback(lambda done: self._settle(reference, partial(_result, done, task)))
        return ours

    def stop(self) -> None:
        """Ends the processes of tasks that run, and cancels the others."""
        import ray

        references = self._give_up()
        for reference in references:
            ray.cancel(reference, force=True)
        if references:
            ray.wait(references, num_returns=len(references))

    def close(self) -> None:
        """Ends Ray, if it was started here."""
        import ray

        if self._owned:
            ray.shutdown()


def _result(done: "Future[Outcome]", task: Task) -> Outcome | BaseException:
    """What became of a task: a future of Ray that is done, in the words of this package."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, WorkerCrashedError

    error = done.exception()
    if error is None:
        return done.result()
    if not isinstance(error, RayError):
        return error
    lost = isinstance(error, WorkerCrashedError | NodeDiedError | OutOfMemoryError)
    kind = WorkerLostError if lost else TaskCrashedError
    return kind(f"{task.label} on Ray: {type(error).__name__}: {error}")


def write_sharded(frame: "Dataset", config: WriteConfig, vector_fn: VectorFn | None = None) -> BuildResult:
    """Builds, gates and publishes a snapshot of a Ray Dataset, on the Ray that this process is connected to.

    The dataset is computed once: its blocks are written to the store, and the build reads these.

    Args:
        frame: Vectors are lists or tensors. A column has the same Arrow type in all blocks.
        config: what to build; ``source`` is not looked at.
        vector_fn: makes the vectors where the dataset has none: given record batches of it, it returns an Arrow array
            of lists or a matrix.

    Raises:
        SourceSchemaError: the dataset lacks a column, or one is of a type that cannot be used.
        TaskCrashedError: a task failed; has its cause.
        SfPipelinesError: see ``build_snapshot``; the previous snapshot keeps serving.
    """
    names = frame_columns(config, frame.columns() or [], vector_fn)

    def stage(folder: str) -> list[str]:
        write: Any = partial(_write_rows, config=config, folder=folder, vector_fn=vector_fn)
        written = frame.select_columns(names).map_batches(write, batch_size=None, batch_format="pyarrow")
        # Of two rows with the same id the first one counts.
        written.context.execution_options.preserve_order = True
        return _keys(written, "writing the dataset")

    with RayEngine() as engine:
        return build_from_frame(config, vector_fn, engine, stage)


def _keys(dataset: "Dataset", what: str) -> list[str]:
    """The keys that tasks give."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, WorkerCrashedError

    try:
        return [row["key"] for row in dataset.take_all()]
    except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
        raise WorkerLostError(f"{what} on Ray: {type(error).__name__}: {error}") from error
    except RayError as error:
        cause = error
        while cause is not None and not isinstance(cause, SfPipelinesError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is not None:
            raise cause from error
        raise TaskCrashedError(f"{what} on Ray: {type(error).__name__}: {error}") from error


def _write_rows(rows: pa.Table, config: WriteConfig, folder: str, vector_fn: VectorFn | None) -> pa.Table:
    key = write_part(config, folder, vector_fn, rows.combine_chunks().to_batches())
    return pa.table([pa.array([] if key is None else [key], pa.string())], names=["key"])
