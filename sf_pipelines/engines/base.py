"""What engines on clusters have in common: the futures of their tasks."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from sf_pipelines.snapshot.errors import EngineError
from sf_pipelines.snapshot.run.tasks import Engine, Outcome


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
