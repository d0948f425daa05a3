"""Lost workers, tasks that cannot succeed, and attempts that wake up too late, on every engine."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from sf_pipelines import WriteConfig, build_snapshot
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import IntegrityError, TasksFailedError
from sf_pipelines.snapshot.manifest.pointer import CURRENT
from sf_pipelines.snapshot.manifest.publish import history, read_pointer
from sf_pipelines.snapshot.manifest.record import read_record
from sf_pipelines.snapshot.operations.verify import verify_snapshot
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import ManifestReceipt, ScanReceipt, ShardReceipt
from sf_pipelines.snapshot.run.tasks import Engine, Task
from sf_pipelines.snapshot.store import Store
from sf_pipelines.snapshot.testing.engine import LINGER_SECONDS, trained
from sf_pipelines_tests.engines import misbehaving
from sf_pipelines_tests.engines.conftest import Opener
from sf_pipelines_tests.engines.damage import damage
from sf_pipelines_tests.engines.lake import ENGINES, ROWS, SHARDS, Lake, answers

pytestmark = pytest.mark.slow

_PATIENCE = 60.0


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    opener: Opener = request.getfixturevalue(f"{request.param}_engine")
    with opener() as opened:
        yield opened


@pytest.fixture
def lake(bucket: str, moto_options: S3Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    monkeypatch.setattr(misbehaving.CUTTER, "_RANGE_BYTES", misbehaving.RANGE_BYTES)
    (tmp_path / "orders").mkdir()
    return Lake(bucket, moto_options, tmp_path / "orders")


def test_a_worker_killed_in_the_middle_of_a_shard(engine: Engine, lake: Lake, tmp_path: Path) -> None:
    """It had uploaded a part of the index; another attempt wins, and what was left behind is in no snapshot."""
    vectors, config = lake.fill(), lake.config("cluster", "store")
    lake.order("die", "/db=00001/attempt")

    result = build_snapshot(config, engine=engine, cache_dir=tmp_path / "cache")

    assert (lake.folder / "dead").exists(), "no worker was killed"
    store = Store.open(config.store, lake.s3)
    pointer = read_pointer(store).pointer
    assert result.published
    assert pointer is not None
    assert (pointer.run_id, pointer.seq) == (result.run_id, 1)
    receipts = f"staging/run_id={result.run_id}/receipts/shard"
    assert [len(list(store.objects(f"{receipts}/db={db_id:05d}"))) for db_id in range(SHARDS)] == [1] * SHARDS
    assert [len(_attempts(store, result.run_id, db_id)) for db_id in range(SHARDS)] == [1, 2, 1]
    assert sum(shard.rows for shard in result.shards) == ROWS
    assert verify_snapshot(config.store, s3=lake.s3).passed
    with lake.reader(config, tmp_path / "reader") as reader:
        assert [best[0][0] for best in answers(reader, vectors)] == list(range(ROWS))


def test_a_task_that_always_fails(engine: Engine, lake: Lake, tmp_path: Path) -> None:
    """The error names shard and cause; what was served before still is; no task goes on."""
    # Two objects a shard: the one that lingers is soon done, if nobody stops it.
    vectors, config = lake.fill(seed=1), lake.config("lsh", "store")
    before = build_snapshot(config, cache_dir=tmp_path / "cache")
    lake.fill()
    store = Store.open(config.store, lake.s3)
    pointer = store.get(CURRENT)
    with Build(config) as build:
        run_id = trained(build)
        damage(build, stages.route(build, run_id, engine=engine), db_id=2)
    # The last one fails when the first is done, and another is in the middle of its writing.
    lake.order("linger", "/db=00001/attempt")

    with pytest.raises(TasksFailedError, match=r"shard 2: IntegrityError: .* are not those that were routed") as caught:
        build_snapshot(config, engine=engine, cache_dir=tmp_path / "cache")

    written = _keys(store)
    assert (lake.folder / "lingered").exists(), "no other task was running"
    assert {label: type(error) for label, error in caught.value.causes.items()} == {"shard 2": IntegrityError}
    assert store.get(CURRENT) == pointer
    assert [entry.run_id for entry in history(store)] == [before.run_id]
    with Build(config) as build:
        ledger = build.ledger(run_id)
        assert ledger.find(ManifestReceipt) is None
        assert ledger.find(ShardReceipt, "db=00002") is None
        written_down = read_record(store, ledger.need(ScanReceipt).record_key)
    assert (written_down.status, written_down.error_type) == ("failed", "TasksFailedError")
    time.sleep(3 * LINGER_SECONDS)
    assert _keys(store) == written, "a task went on"
    with lake.reader(config, tmp_path / "reader") as reader:
        assert [best[0][0] for best in answers(reader, vectors)] == list(range(ROWS))


@pytest.mark.parametrize("stage", ["route_range", "build_shard"])
def test_an_attempt_that_wakes_up_after_publish(
    engine: Engine, lake: Lake, tmp_path: Path, stage: Literal["route_range", "build_shard"]
) -> None:
    """It began before, and is held before its first write; everything that it then writes is looked at by nobody."""
    vectors, config = lake.fill(), lake.config("cluster", "store")
    store = Store.open(config.store, lake.s3)
    with Build(config) as build:
        run_id = trained(build)
        if stage == "build_shard":
            stages.route(build, run_id)
    lake.order("hold", "/routed/range-00001" if stage == "route_range" else "/db=00001/attempt")
    late = engine.submit(config, Task(stage=stage, run_id=run_id, number=1))
    _wait_for((lake.folder / "held").exists, "the attempt to begin to write")

    result = build_snapshot(config, engine=engine, cache_dir=tmp_path / "cache")
    assert (result.run_id, result.published) == (run_id, True)
    assert not late.done()
    with lake.reader(config, tmp_path / "open") as reader:
        found, served = answers(reader, vectors), _served(config, lake, run_id)
        written = _keys(store)
        (lake.folder / "held").unlink()
        outcome = late.result(timeout=_PATIENCE)

        fresh = _keys(store) - written
        assert fresh, "the late attempt has written nothing"
        assert not any("/receipts/" in key for key in fresh)
        assert outcome.fault is None
        assert outcome.receipt is not None
        assert outcome.receipt.key in served.receipts, "the late attempt was told who has won"
        assert _served(config, lake, run_id) == served
        assert not reader.refresh()
        assert answers(reader, vectors) == found
    with lake.reader(config, tmp_path / "fresh") as reader:
        assert answers(reader, vectors) == found
    assert [best[0][0] for best in found] == list(range(ROWS))
    assert verify_snapshot(config.store, s3=lake.s3).passed
    again = build_snapshot(config, engine=engine, cache_dir=tmp_path / "cache")
    assert (again.published, again.run_id) == (False, run_id)


@dataclass(frozen=True)
class _Served:
    """All that a reader follows, and all that a build would go on from, byte for byte.

    Attributes:
        pointer: the current pointer.
        manifests: by their keys.
        receipts: by their keys.
        shards: etags of the objects of the sealed shards, by their keys.
        status: of the build's record.
    """

    pointer: bytes
    manifests: dict[str, bytes]
    receipts: dict[str, bytes]
    shards: dict[str, str | None]
    status: str


def _served(config: WriteConfig, lake: Lake, run_id: str) -> _Served:
    store = Store.open(config.store, lake.s3)
    with Build(config) as build:
        scanned = build.ledger(run_id).need(ScanReceipt)
        sealed = [build.ledger(run_id).need(ShardReceipt, f"db={db_id:05d}").db_key for db_id in range(SHARDS)]
    folders = [key for key in sealed if key is not None]
    return _Served(
        pointer=store.get(CURRENT),
        manifests={info.key: store.get(info.key) for info in store.objects("manifests")},
        receipts={info.key: store.get(info.key) for info in store.objects(f"staging/run_id={run_id}/receipts")},
        shards={info.key: info.etag for folder in folders for info in store.objects(folder)},
        status=read_record(store, scanned.record_key).status,
    )


def _attempts(store: Store, run_id: str, db_id: int) -> set[str]:
    folder = f"shards/run_id={run_id}/db={db_id:05d}"
    return {info.key.removeprefix(folder).split("/")[1] for info in store.objects(folder)}


def _keys(store: Store) -> set[str]:
    return {info.key for info in store.objects("")}


def _wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {_PATIENCE:.0f} s for {what}"
        time.sleep(0.05)
