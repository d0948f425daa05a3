"""What a user says about an engine, the same words in YAML, in Python and as a Dagster resource; and opening it."""

from collections.abc import Mapping
from concurrent.futures import Future
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.model import ConfigModel, describe_validation
from sf_pipelines.snapshot.run.tasks import Engine, Outcome, Task


def _without_password(address: str | None) -> str | None:
    if address is not None and "@" in address:
        raise ValueError("has a user name or a password in it, which no engine takes")
    return address


# One of Spark Connect may have a token in it.
Address = Annotated[str | None, AfterValidator(_without_password), Field(repr=False)]
Workers = Annotated[int, Field(ge=1, le=10_000)]


class LocalEngineSpec(ConfigModel):
    """Processes of this machine.

    Attributes:
        type: ``local``.
        workers: processes; None is one for each core.
    """

    type: Literal["local"] = "local"
    workers: Workers | None = None


class DaskEngineSpec(ConfigModel):
    """A Dask cluster.

    Attributes:
        type: ``dask``.
        address: of the scheduler, as in ``tcp://scheduler:8786``; None starts a cluster on this machine.
        workers: processes of that local cluster; None is one for each core.
    """

    secretive: ClassVar[bool] = True

    type: Literal["dask"] = "dask"
    address: Address = None
    workers: Workers | None = None

    @model_validator(mode="after")
    def _workers_are_ours(self) -> "DaskEngineSpec":
        return _only_local(self, self.address)


class RayEngineSpec(ConfigModel):
    """A Ray cluster.

    Attributes:
        type: ``ray``.
        address: ``auto``, ``host:port`` or ``ray://host:10001``; None starts Ray on this machine.
        workers: processes of that local Ray; None is one for each core.
        task_cpus: cores that one task takes.
    """

    secretive: ClassVar[bool] = True

    type: Literal["ray"] = "ray"
    address: Address = None
    workers: Workers | None = None
    task_cpus: Annotated[float, Field(gt=0, le=1024)] = 1

    @model_validator(mode="after")
    def _workers_are_ours(self) -> "RayEngineSpec":
        return _only_local(self, self.address)


class SparkEngineSpec(ConfigModel):
    """A Spark cluster.

    Attributes:
        type: ``spark``.
        address: of a Spark Connect server, as in ``sc://host:15002``, or a master, as in ``yarn`` or ``local[4]``; None
            takes the session that is active, else starts Spark on this machine.
        workers: tasks at a time; None is one for each core that Spark says it has.
    """

    secretive: ClassVar[bool] = True

    type: Literal["spark"] = "spark"
    address: Address = None
    workers: Workers | None = None


def _only_local(spec: Any, address: str | None) -> Any:
    if address is not None and spec.workers is not None:
        raise ValueError("workers is for a cluster on this machine; the one at address has its own: leave it out")
    return spec


Spec = LocalEngineSpec | DaskEngineSpec | RayEngineSpec | SparkEngineSpec
EngineSpec = Annotated[Spec, Field(discriminator="type")]
_ADAPTER: TypeAdapter[Spec] = TypeAdapter(EngineSpec, config=ConfigDict(hide_input_in_errors=True))


def engine_spec(fields: Mapping[str, Any]) -> Spec:
    """A specification from its fields, as in ``{"type": "dask", "address": "tcp://scheduler:8786"}``.

    Raises:
        ConfigError: a field is unknown or wrong.
    """
    try:
        return _ADAPTER.validate_python(dict(fields))
    except ValidationError as error:
        raise ConfigError(describe_validation("engine", error)) from error


def open_engine(spec: Spec | Mapping[str, Any]) -> Engine:
    """Starts or connects to an engine; close it, or use it as a context manager."""
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


class DeferredEngine(Engine):
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
    def slots(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] - known when it is opened
        return self._engine.slots

    def submit(self, config: WriteConfig, task: Task) -> "Future[Outcome]":
        return self._engine.submit(config, task)

    def stop(self) -> None:
        if "_engine" in self.__dict__:
            self._engine.stop()

    def close(self) -> None:
        if "_engine" in self.__dict__:
            self._engine.close()
