"""What a build says about itself while it works, and what it says after a crash."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines import S3Options, build_snapshot
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot import store as stores
from sf_pipelines.snapshot.errors import StoreUnavailableError
from sf_pipelines.snapshot.manifest import record
from sf_pipelines.snapshot.run import build as builds
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import PromoteReceipt, ShardReceipt
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.builds import assembled, routed
from sf_pipelines_tests.tables import small_config, write_source

_SECONDS = 30.0


@pytest.fixture
def fast_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "_BEAT_SECONDS", 0.01)
    monkeypatch.setattr(record, "RENEW_AFTER", timedelta(0))


def beating() -> bool:
    return any(thread.name == "sf-pipelines-lease" for thread in threading.enumerate())


@pytest.mark.usefixtures("fast_beats")
def test_a_lease_is_renewed_while_one_shard_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "source.parquet", seed=0)
    sealing = import_module("sf_pipelines.snapshot.stages.shard")
    seal, beats = sealing.seal_shard, threading.Semaphore(0)
    renew = record.renew

    def counted(store: Store, record_key: str) -> record.BuildRecord:
        renewed = renew(store, record_key)
        if threading.current_thread().name == "sf-pipelines-lease":
            beats.release()
        return renewed

    def slow(*args: Any) -> ShardReceipt:
        assert beats.acquire(timeout=_SECONDS), "nobody renewed the lease"
        assert beats.acquire(timeout=_SECONDS), "the lease was renewed only once"
        return seal(*args)

    with Build(small_config(tmp_path), cache_dir=tmp_path / "cache") as build:
        run_id = routed(build)
        monkeypatch.setattr(record, "renew", counted)
        monkeypatch.setattr(sealing, "seal_shard", slow)
        stages.build_shard(build, run_id, 0)
    assert not beating()


@pytest.mark.usefixtures("fast_beats")
def test_a_store_that_fails_does_not_end_the_beating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "source.parquet", seed=0)
    beats = threading.Semaphore(0)

    def failing(store: Store, record_key: str) -> None:
        beats.release()
        raise StoreUnavailableError(f"cannot read {store.url_of(record_key)}: down")

    with Build(small_config(tmp_path), cache_dir=tmp_path / "cache") as build:
        scanned = stages.scan(build)
        monkeypatch.setattr(record, "renew", failing)
        with build.working(scanned):
            for _ in range(3):
                assert beats.acquire(timeout=_SECONDS)
    assert not beating()


@pytest.mark.usefixtures("fast_beats")
def test_nobody_renews_after_the_work_has_failed(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet", seed=0)
    with Build(small_config(tmp_path), cache_dir=tmp_path / "cache") as build:
        scanned = stages.scan(build)
        with pytest.raises(ZeroDivisionError), build.working(scanned):
            raise ZeroDivisionError
        assert not beating()


def test_a_promotion_repeated_after_a_crash_names_who_was_served_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "source.parquet", seed=0)
    config, cache = small_config(tmp_path), tmp_path / "cache"
    first = build_snapshot(config, cache_dir=cache).run_id
    write_source(tmp_path / "source.parquet", seed=1)
    build, run_id = assembled(config, cache)
    commit = Ledger.commit

    def killed(self: Ledger, receipt: Any, *args: Any, **how: Any) -> Any:
        if isinstance(receipt, PromoteReceipt):
            raise KeyboardInterrupt
        return commit(self, receipt, *args, **how)

    with build:
        stages.gate(build, run_id)
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "commit", killed)
            with pytest.raises(KeyboardInterrupt):
                stages.promote(build, run_id)
        again = stages.promote(build, run_id)
    assert (again.run_id, again.previous_run_id) == (run_id, first)


def test_a_large_object_is_copied_in_parts(
    moto_options: S3Options, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(f"s3://{bucket}/copies", moto_options)
    part = 6 * 1024 * 1024  # not obstore's own 5 MiB
    data = bytes(range(256)) * (part // 128)
    store.put("from", data)
    monkeypatch.setattr(stores, "_COPIED_AT_ONCE", len(data) - 1)
    monkeypatch.setattr(stores, "_PART", part)
    store.copy("from", "to")
    assert store.sha256("to") == store.sha256("from")
    # S3 marks what was uploaded in parts by their number.
    assert (store.head("to").etag or "").strip('"').endswith("-2")


def test_a_successor_that_was_not_published_is_completed(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet", seed=0)
    config, cache = small_config(tmp_path), tmp_path / "cache"
    first = build_snapshot(config, cache_dir=cache).run_id
    with Build(config, cache_dir=cache) as build:
        stages.build_shard(build, first, 1, rebuild=True)
        successor = stages.assemble(build, first).run_id
        assert stages.assemble(build, first).run_id == successor != first
        # What it lost is copied again.
        receipt = build.ledger(successor).need(ShardReceipt, "db=00000")
        build.store.delete(f"{receipt.db_key}/{receipt.objects[0].path}")
    with Build(config, cache_dir=cache) as build:
        assert stages.assemble(build, first).run_id == successor
        stages.gate(build, successor)
        assert stages.promote(build, successor).published
        # Whoever still knows the first run comes to what is served, with the shard that was rebuilt there.
        rebuilt = build.ledger(successor).need(ShardReceipt, "db=00001")
        assert stages.assemble(build, first).run_id == successor
        third = stages.build_shard(build, first, 2, rebuild=True).run_id
        assert third not in {first, successor}
        assert stages.assemble(build, first).run_id == third
        assert build.ledger(third).need(ShardReceipt, "db=00001").objects == rebuilt.objects


def test_two_that_rebuild_shards_at_the_same_time_come_to_one_successor(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet", seed=0)
    config, cache = small_config(tmp_path), tmp_path / "cache"
    first = build_snapshot(config, cache_dir=cache).run_id

    def rebuild(db_id: int) -> ShardReceipt:
        with Build(config, cache_dir=cache) as build:
            return stages.build_shard(build, first, db_id, rebuild=True)

    with ThreadPoolExecutor(2) as pool:
        rebuilt = list(pool.map(rebuild, (0, 1)))
    (successor,) = {receipt.run_id for receipt in rebuilt}
    with Build(config, cache_dir=cache) as build:
        manifest = stages.assemble(build, first)
        assert manifest.run_id == successor
        assert manifest.shards[:2] == tuple(receipt.key for receipt in rebuilt)
        stages.gate(build, successor)
        assert stages.promote(build, successor).published
        # Of the two that began it one has a record.
        assert len([info for info in build.store.objects("runs") if successor in info.key]) == 1
