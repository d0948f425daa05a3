"""What every engine must do: a class to subclass in your tests.

Example:
    class TestMine(EngineConformance):
        def open_engine(self) -> Engine:
            return MyEngine(workers=2)
"""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.config import VectorSpec
from sf_pipelines.snapshot.errors import IntegrityError, TasksFailedError
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import RouteReceipt, ShardReceipt
from sf_pipelines.snapshot.run.tasks import Engine, Task
from sf_pipelines.snapshot.testing.engine_functions import Misbehaving

_ROWS = 600
_DIM = 16
_SHARDS = 3
_START_SECONDS = 60.0
_QUIET_SECONDS = 1.0


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
        with Build(_config(tmp_path, "behave", store="alone")) as build:
            run_id = _trained(build)
            wanted = _rows_of(stages.route(build, run_id), stages.build_shards(build, run_id, range(_SHARDS)))
        with Build(_config(tmp_path, "behave")) as build, self.open_engine() as engine:
            run_id = _trained(build)
            route = stages.route(build, run_id, engine=engine)
            shards = stages.build_shards(build, run_id, range(_SHARDS), engine=engine)
            _same(_rows_of(route, shards), wanted, "rows and digest of each shard")
            _same([shard.db_id for shard in shards], list(range(_SHARDS)), "order of the receipts")

    def test_an_error_names_task_and_cause(self, tmp_path: Path) -> None:
        """What cannot pass is not tried again, and comes back as the error that it was."""
        with Build(_config(tmp_path, "fail")) as build, self.open_engine() as engine:
            run_id = _trained(build)
            _arm(tmp_path)
            try:
                stages.route(build, run_id, engine=engine)
            except TasksFailedError as error:
                cause = error.causes.get("range 0")
                _expect(isinstance(cause, IntegrityError), f"causes are {error.causes!r}")
                _expect("not today" in str(error) and "range 0" in str(error), f"the message is {error}")
            else:
                raise AssertionError("a task failed, and the stage did not")
            _same(_calls(tmp_path), 1, "tries of a task that always fails")
            _expect(build.ledger(run_id).find(RouteReceipt) is None, "there is a receipt of what failed")

    def test_what_may_pass_is_tried_again(self, tmp_path: Path) -> None:
        """A store that does not answer for a moment costs a retry."""
        with Build(_config(tmp_path, "stumble")) as build, self.open_engine() as engine:
            run_id = _trained(build)
            _arm(tmp_path)
            _same(_routed_rows(stages.route(build, run_id, engine=engine)), _ROWS, "rows")
        _expect(_calls(tmp_path) >= 2, f"the task was tried {_calls(tmp_path)} times")

    def test_a_killed_worker_is_replaced(self, tmp_path: Path) -> None:
        """A process that is lost in the middle of a task costs no row, and none is there twice."""
        with Build(_config(tmp_path, "die")) as build, self.open_engine() as engine:
            run_id = _trained(build)
            _arm(tmp_path)
            route = stages.route(build, run_id, engine=engine)
            shards = stages.build_shards(build, run_id, range(_SHARDS), engine=engine)
            _same(_routed_rows(route), _ROWS, "routed rows")
            _same(sum(shard.rows for shard in shards), _ROWS, "rows in shards")
        _expect((tmp_path / "first").exists(), "no worker was killed")

    def test_nothing_runs_after_stop(self, tmp_path: Path) -> None:
        """A task in the middle of its work does none once ``stop`` has returned, and one in the queue never begins."""
        with Build(_config(tmp_path, "tick")) as build, self.open_engine() as engine:
            run_id = _trained(build)
            _arm(tmp_path)
            task = Task(stage="route_range", run_id=run_id, number=0)
            futures = [engine.submit(build.config, task) for _ in range(3)]
            ticks = tmp_path / "ticks"
            deadline = time.monotonic() + _START_SECONDS
            while not ticks.exists():
                _expect(time.monotonic() < deadline, f"no task has begun after {_START_SECONDS:.0f} s")
                time.sleep(0.05)
            engine.stop()
            size = ticks.stat().st_size
            time.sleep(_QUIET_SECONDS)
            _same(ticks.stat().st_size, size, "ticks of tasks after stop")
            _expect(all(future.done() for future in futures), "a future is left open by stop")


def _config(folder: Path, act: str, store: str = "store") -> Misbehaving:
    """A source of one file, routed as one range."""
    source = folder / "source.parquet"
    if not source.exists():
        (folder / "calls").mkdir()
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
        act=act,
    )


def _trained(build: Build) -> str:
    """A build up to its routing; run id."""
    run_id = stages.scan(build).run_id
    stages.sample(build, run_id)
    stages.train(build, run_id)
    return run_id


def _arm(folder: Path) -> None:
    (folder / "armed").touch()


def _calls(folder: Path) -> int:
    return len(list((folder / "calls").iterdir()))


def _routed_rows(route: RouteReceipt) -> int:
    return sum(shard.rows for shard in route.shards)


def _rows_of(route: RouteReceipt, shards: list[ShardReceipt]) -> list[tuple[object, ...]]:
    """Of each shard what was routed and what was built."""
    return [
        (routed.rows, routed.digest, built.rows, built.indexed_rows, built.rows_digest)
        for routed, built in zip(route.shards, shards, strict=True)
    ]


def _same(found: object, wanted: object, what: str) -> None:
    _expect(found == wanted, f"{what}: is {found!r:.500}, must be {wanted!r:.500}")


def _expect(condition: bool, fault: str) -> None:
    if not condition:
        raise AssertionError(fault)
