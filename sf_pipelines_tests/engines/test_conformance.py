"""Every engine does what an engine must do."""

import pytest

from sf_pipelines.snapshot.run.tasks import Engine
from sf_pipelines.snapshot.testing.engine import EngineConformance
from sf_pipelines_tests.engines.conftest import Opener

pytestmark = pytest.mark.slow


class TestLocal(EngineConformance):
    """Processes of this machine."""

    @pytest.fixture(autouse=True)
    def _kept(self, local_engine: Opener) -> None:
        self._opener = local_engine

    def open_engine(self) -> Engine:
        """Another one."""
        return self._opener()


class TestDask(EngineConformance):
    """A client of a scheduler with two workers."""

    @pytest.fixture(autouse=True)
    def _kept(self, dask_engine: Opener) -> None:
        self._opener = dask_engine

    def open_engine(self) -> Engine:
        """Another one."""
        return self._opener()


class TestRay(EngineConformance):
    """Ray on two cores."""

    @pytest.fixture(autouse=True)
    def _kept(self, ray_engine: Opener) -> None:
        self._opener = ray_engine

    def open_engine(self) -> Engine:
        """Another one."""
        return self._opener()


class TestSpark(EngineConformance):
    """Spark on two cores."""

    @pytest.fixture(autouse=True)
    def _kept(self, spark_engine: Opener) -> None:
        self._opener = spark_engine

    def open_engine(self) -> Engine:
        """Another one."""
        return self._opener()


class TestSparkConnect(EngineConformance):
    """A client of a Spark Connect server with two cores."""

    @pytest.fixture(autouse=True)
    def _kept(self, connect_engine: Opener) -> None:
        self._opener = connect_engine

    def open_engine(self) -> Engine:
        """Another one."""
        return self._opener()
