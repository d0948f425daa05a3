"""An engine from what a user says about it."""

from collections.abc import Mapping
from concurrent.futures import Future
from functools import cached_property
from typing import Any, Self

from sf_pipelines.engines.config import (
    DaskEngineSpec,
    LocalEngineSpec,
    RayEngineSpec,
    SparkEngineSpec,
    engine_spec,
)
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.run.tasks import Engine, Outcome, Task

Spec = LocalEngineSpec | DaskEngineSpec | RayEngineSpec | SparkEngineSpec


def open_engine(spec: Spec | Mapping[str, Any]) -> Engine:
    """Starts or connects to an engine; close it, or use it as a context manager.

    Args:
        spec: which one; a mapping has its fields.

    Raises:
        ConfigError: a field is unknown or wrong.
        MissingExtraError: its library is not installed; names the extra.
        EngineError: the cluster cannot be reached.
    """
    found = engine_spec(spec) if isinstance(spec, Mapping) else spec
    if isinstance(found, LocalEngineSpec):
        from sf_pipelines.engines.local import LocalEngine

        return LocalEngine(found.workers)
    if isinstance(found, DaskEngineSpec):
        from sf_pipelines.engines.dask import DaskEngine

        return DaskEngine.open(found.address, found.workers)
    if isinstance(found, RayEngineSpec):
        from sf_pipelines.engines.ray import RayEngine

        return RayEngine.open(found.address, found.workers, found.task_cpus)
    from sf_pipelines.engines.spark import SparkEngine

    return SparkEngine.open(found.address, found.workers)


class DeferredEngine:
    """An engine that is opened when there is something to do: most scheduled builds find that nothing is new.

    Args:
        spec: which one.
    """

    remote = True

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self.name = spec.type

    @cached_property
    def _engine(self) -> Engine:
        return open_engine(self._spec)

    @property
    def slots(self) -> int:
        """Tasks at a time."""
        return self._engine.slots

    def submit(self, config: WriteConfig, task: Task) -> "Future[Outcome]":
        """Opens the engine, if this is the first task."""
        return self._engine.submit(config, task)

    def stop(self) -> None:
        """Stops the engine, if it was opened."""
        if "_engine" in self.__dict__:
            self._engine.stop()

    def close(self) -> None:
        """Closes the engine, if it was opened."""
        if "_engine" in self.__dict__:
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
