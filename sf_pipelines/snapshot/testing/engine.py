"""What every engine must do: a class to subclass in your tests.

Example:
    class TestMine(EngineConformance):
        def open_engine(self) -> Engine:
            return MyEngine(workers=2)
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.config import VectorSpec, WriteConfig
from sf_pipelines.snapshot.errors import IntegrityError, StoreUnavailableError, TasksFailedError
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import RouteReceipt
from sf_pipelines.snapshot.run.tasks import Engine, Task
from sf_pipelines.snapshot.store import Store
from sf_pipelines.snapshot.testing.expect import expect, same

_ROWS = 600
_DIM = 16
_SHARDS = 3
_START_SECONDS = 60.0
_QUIET_SECONDS = 1.0
LINGER_SECONDS = 3.0
_HELD_SECONDS = 120.0

_folder: Path | None = None


class EngineConformance:
    """Routes and builds small snapshots on local disk, with workers that misbehave.

    A subclass has a method ``open_engine`` that gives an engine of two workers on this machine, which import this
    package; it is closed at the end of each test. What takes long to start may be kept between tests.
    """

    def open_engine(self) -> Engine:
        """An engine that nobody has stopped."""
        raise NotImplementedError(f"{type(self).__name__} must say how its engine is opened: def open_engine(self)")

    def test_the_same_as_in_process(self, tmp_path: Path) -> None:
        """Every row is in the same shard, and the shards hold the same rows."""
        with Build(_config(tmp_path, store="alone")) as build:
            expected = _built(build, None)
        with Build(_config(tmp_path)) as build, self.open_engine() as engine:
            same(_built(build, engine), expected, "rows and digest of each shard")

    def test_an_error_names_task_and_cause(self, tmp_path: Path) -> None:
        """What cannot pass is not tried again, and comes back as the error that it was."""
        with Build(_config(tmp_path)) as build, self.open_engine() as engine:
            run_id = trained(build)
            _order(tmp_path, "fail")
            try:
                stages.route(build, run_id, engine=engine)
            except TasksFailedError as error:
                cause = error.causes.get("range 0")
                expect(isinstance(cause, IntegrityError), f"causes are {error.causes!r}")
                expect("not today" in str(error) and "range 0" in str(error), f"the message is {error}")
            else:
                raise AssertionError("a task failed, and the stage did not")
            same((tmp_path / "failed").read_text(), ".", "tries of a task that always fails")
            expect(build.ledger(run_id).find(RouteReceipt) is None, "there is a receipt of what failed")

    def test_what_may_pass_is_tried_again(self, tmp_path: Path) -> None:
        """A store that does not answer for a moment costs a retry."""
        self._loses_nothing(tmp_path, "stumble", "stumbled")

    def test_a_killed_worker_is_replaced(self, tmp_path: Path) -> None:
        """A process that is lost in the middle of a task costs no row, and none is there twice."""
        self._loses_nothing(tmp_path, "die", "dead")

    def test_nothing_runs_after_stop(self, tmp_path: Path) -> None:
        """A task in the middle of its work does none once ``stop`` has returned, and one in the queue never begins."""
        with Build(_config(tmp_path)) as build, self.open_engine() as engine:
            run_id = trained(build)
            _order(tmp_path, "linger")
            task = Task(stage="route_range", run_id=run_id, number=0)
            futures = [engine.submit(build.config, task) for _ in range(3)]
            ticks = tmp_path / "lingered"
            deadline = time.monotonic() + _START_SECONDS
            while not ticks.exists():
                expect(time.monotonic() < deadline, f"no task has begun after {_START_SECONDS:.0f} s")
                time.sleep(0.05)
            engine.stop()
            size = ticks.stat().st_size
            time.sleep(_QUIET_SECONDS)
            same(ticks.stat().st_size, size, "ticks of tasks after stop")
            expect(all(future.done() for future in futures), "a future is left open by stop")

    def _loses_nothing(self, folder: Path, order: str, obeyed: str) -> None:
        with Build(_config(folder)) as build, self.open_engine() as engine:
            run_id = trained(build)
            _order(folder, order)
            route = stages.route(build, run_id, engine=engine)
            shards = stages.build_shards(build, run_id, range(_SHARDS), engine=engine)
            same(sum(shard.rows for shard in route.shards), _ROWS, "routed rows")
            same(sum(shard.rows for shard in shards), _ROWS, "rows in shards")
        expect((folder / obeyed).exists(), f"no worker was told to {order}")


def _config(folder: Path, store: str = "store") -> "Misbehaving":
    """A source of one file, routed as one range."""
    source = folder / "source.parquet"
    if not source.exists():
        vectors = np.random.default_rng(0).standard_normal((_ROWS, _DIM)).astype(np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), _DIM)
        pq.write_table(pa.table({"id": np.arange(_ROWS), "vector": column}), source)
    return Misbehaving(
        name="conformance",
        source=str(source),
        store=str(folder / store),
        num_dbs=_SHARDS,
        vector_spec=VectorSpec(dim=_DIM),
        payload_cols=(),
        folder=folder,
    )


def trained(build: Build) -> str:
    """A build up to its routing; run id."""
    run_id = stages.scan(build).run_id
    stages.sample(build, run_id)
    stages.train(build, run_id)
    return run_id


def _built(build: Build, engine: Engine | None) -> list[tuple[object, ...]]:
    """Of each shard what was routed and what was built."""
    run_id = trained(build)
    route = stages.route(build, run_id, engine=engine)
    shards = stages.build_shards(build, run_id, range(_SHARDS), engine=engine)
    return [
        (routed.rows, routed.digest, built.db_id, built.rows, built.indexed_rows, built.rows_digest)
        for routed, built in zip(route.shards, shards, strict=True)
    ]


def _order(folder: Path, name: str) -> None:
    (folder / name).write_text("/routed/")


class Misbehaving(WriteConfig):
    """A configuration whose workers do to themselves what a test orders, in the middle of real tasks.

    Only unpickling one, as workers do, changes the process that does it. An order is a file in ``folder``; its text is
    part of the keys whose writes it is about.

    ``fail``: every such write is an error that stays.
    ``stumble``: the first one is an error that may pass.
    ``die``: the process is killed right after the first one.
    ``hold``: the process waits before the first one, for as long as there is the file ``held``.
    ``linger``: it waits some seconds before every one, and writes to the file ``lingered`` meanwhile.

    Attributes:
        folder: where the orders are.
        driver: id of the process that made it, which stays as it is.
    """

    folder: Path
    driver: int = Field(default_factory=os.getpid)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        # Dask's scheduler, which reads what it hands on, may be in the driver's process.
        if os.getpid() != self.driver:
            self._obey()

    def _obey(self) -> None:
        global _folder  # noqa: PLW0603 - a worker serves many tests, one at a time
        if _folder is None:
            for name in ("put", "create", "upload"):
                setattr(Store, name, _obedient(getattr(Store, name)))
        _folder = self.folder


def _obedient(write: Callable[..., Any]) -> Callable[..., Any]:
    def obedient_write(self: Store, *args: Any, **options: Any) -> Any:
        keys = [arg for arg in args if isinstance(arg, str)]
        if order := _order_about(keys, "linger"):
            deadline = time.monotonic() + LINGER_SECONDS
            while time.monotonic() < deadline:
                _tick(order.with_name("lingered"))
                time.sleep(0.1)
        if order := _order_about(keys, "fail"):
            _tick(order.with_name("failed"))
            raise IntegrityError("not today")
        if _take(_order_about(keys, "stumble"), "stumbled"):
            raise StoreUnavailableError("the store does not answer")
        if held := _take(_order_about(keys, "hold"), "held"):
            deadline = time.monotonic() + _HELD_SECONDS
            while held.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        done = write(self, *args, **options)
        if _take(_order_about(keys, "die"), "dead"):
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    return obedient_write


def _order_about(keys: list[str], name: str) -> Path | None:
    """The file of an order that is about one of these keys."""
    order = (_folder or Path()) / name
    try:
        part = order.read_text()
    except FileNotFoundError:
        return None
    return order if any(part in key for key in keys) else None


def _take(order: Path | None, name: str) -> Path | None:
    """The order's file under its new name, in the one process that carries it out."""
    try:
        return None if order is None else order.rename(order.with_name(name))
    except FileNotFoundError:
        return None


def _tick(path: Path) -> None:
    with path.open("a") as file:
        file.write(".")
