"""Tasks on a Ray cluster."""

import os
from concurrent.futures import Future
from typing import Any, Self

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.engine import Outcome, Task, run_task
from sf_pipelines.snapshot.errors import EngineError, MissingExtraError, TaskCrashedError, WorkerLostError

# How often Ray itself runs a task again whose worker is lost.
_RERUNS = 3


class RayEngine:
    """The Ray that this process is connected to, which stays the caller's.

    Args:
        task_cpus: cores that one task takes.
    """

    name = "ray"
    remote = True

    def __init__(self, task_cpus: float = 1) -> None:
        import ray

        self._owned = False
        self._futures: dict[Any, Future[Outcome]] = {}
        options = {"num_cpus": task_cpus, "max_retries": _RERUNS}
        self._run: Any = ray.remote(run_task).options(**options)
        self.slots = max(1, int(ray.cluster_resources().get("CPU", 1) / task_cpus))

    @classmethod
    def open(cls, address: str | None, workers: int | None, task_cpus: float = 1) -> Self:
        """Connects to a cluster, or starts Ray on this machine, which ends with the engine.

        A process that is connected already stays so: then ``address`` and ``workers`` are not looked at.

        Raises:
            MissingExtraError: ``ray`` is not installed.
            EngineError: the cluster does not answer.
        """
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("engine ray needs ray: pip install 'sf-pipelines[ray]'") from error
        opened = not ray.is_initialized()
        if opened:
            where: dict[str, Any] = {"address": address}
            if address is None:
                where = {"num_cpus": workers or len(os.sched_getaffinity(0)), "include_dashboard": False}
                where["_node_ip_address"] = "127.0.0.1"
            try:
                ray.init(log_to_driver=False, **where)
            except (ConnectionError, OSError, RuntimeError) as error:
                raise EngineError(f"no Ray cluster answers at {address or 'this machine'}: {error}") from error
        engine = cls(task_cpus)
        engine._owned = opened
        return engine

    def submit(self, config: WriteConfig, task: Task) -> "Future[Outcome]":
        """Runs the task on any node."""
        reference = self._run.remote(config, task)
        ours: Future[Outcome] = Future()
        ours.set_running_or_notify_cancel()
        self._futures[reference] = ours
        reference.future().add_done_callback(lambda done: self._settle(reference, done, task))
        return ours

    def _settle(self, reference: Any, done: "Future[Outcome]", task: Task) -> None:
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, WorkerCrashedError

        ours = self._futures.pop(reference, None)
        if ours is None or ours.done():
            return
        error = done.exception()
        if error is None:
            ours.set_result(done.result())
        elif isinstance(error, WorkerCrashedError | NodeDiedError | OutOfMemoryError):
            ours.set_exception(WorkerLostError(f"{task.label} on Ray: {type(error).__name__}: {error}"))
        elif isinstance(error, RayError):
            ours.set_exception(TaskCrashedError(f"{task.label} on Ray: {type(error).__name__}: {error}"))
        else:
            ours.set_exception(error)

    def stop(self) -> None:
        """Ends the processes of tasks that run, and cancels the others."""
        import ray

        references = list(self._futures)
        for ours in [self._futures.pop(reference) for reference in references]:
            ours.set_exception(EngineError("the task was given up"))
        for reference in references:
            ray.cancel(reference, force=True)
        if references:
            ray.wait(references, num_returns=len(references))

    def close(self) -> None:
        """Ends Ray, if it was started here."""
        import ray

        if self._owned:
            ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
