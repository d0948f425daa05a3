"""What engines have in common: the work of one task, and the futures of tasks on clusters."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from typing import Any

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import EngineError, SfPipelinesError
from sf_pipelines.snapshot.run.build import Build, Stopwatch
from sf_pipelines.snapshot.run.tasks import Engine, Fault, Outcome, Task, peak_bytes, worker_name
from sf_pipelines.snapshot.stages.route import route_range
from sf_pipelines.snapshot.stages.shard import build_shard


def run_task(config: WriteConfig, task: Task) -> Outcome:
    """Does the work of a task; a typed error becomes part of the outcome."""
    watch = Stopwatch()
    receipt, fault = None, None
    try:
        # The driver decides what an error means for the build: the task may be tried again.
        with closing(Build(config)) as build:
            if task.stage == "route_range":
                receipt = route_range(build, task.run_id, task.number)
            else:
                receipt = build_shard(build, task.run_id, task.number, rebuild=task.rebuild)
    except SfPipelinesError as error:
        fault = Fault(kind=error.kind, message=str(error))
    return Outcome(receipt=receipt, fault=fault, seconds=watch.seconds, peak_bytes=peak_bytes(), worker=worker_name())


class ClusterEngine(Engine):
    """An engine whose cluster has futures of its own: each is kept with ours until one of both is settled."""

    remote = True

    def __init__(self) -> None:
        self._futures: dict[Any, Future[Outcome]] = {}

    def _keep(self, theirs: Any) -> "Future[Outcome]":
        """Our future of a task that the cluster has begun."""
        ours: Future[Outcome] = Future()
        ours.set_running_or_notify_cancel()
        self._futures[theirs] = ours
        return ours

    def _settle(self, theirs: Any, became: Callable[[], "Outcome | BaseException"]) -> None:
        """Hands over what became of a task that was not given up; called by a thread of the cluster's client."""
        ours = self._futures.pop(theirs, None)
        if ours is None or ours.done():
            return
        result = became()
        if isinstance(result, BaseException):
            ours.set_exception(result)
        else:
            ours.set_result(result)

    def _give_up(self) -> list[Any]:
        """Ends the waiting for all tasks; the cluster's futures of them, to be cancelled."""
        kept = list(self._futures)
        for ours in [self._futures.pop(theirs) for theirs in kept]:
            ours.set_exception(EngineError("the task was given up"))
        return kept
