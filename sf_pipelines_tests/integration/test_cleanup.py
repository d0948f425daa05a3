"""Cleanup of a store with everything in it: what stays still opens and verifies, whenever it is stopped."""

import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines import S3Options, WriteConfig, build_snapshot
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.errors import (
    GateFailedError,
    IntegrityError,
    ObjectMissingError,
    OperationError,
    RunNotFoundError,
    SnapshotDamagedError,
    SnapshotNotFoundError,
    StoreUnavailableError,
)
from sf_pipelines.snapshot.manifest import record
from sf_pipelines.snapshot.manifest.pointer import CURRENT
from sf_pipelines.snapshot.manifest.publish import HistoryEntry, history, read_pointer
from sf_pipelines.snapshot.operations import cleanup as cleaning
from sf_pipelines.snapshot.operations.cleanup import (
    CleanupReport,
    CleanupRules,
    apply_cleanup,
    cleanup,
    plan_cleanup,
)
from sf_pipelines.snapshot.operations.pins import pin, unpin
from sf_pipelines.snapshot.operations.rollback import rollback
from sf_pipelines.snapshot.operations.verify import check_whole, verify_snapshot
from sf_pipelines.snapshot.reader.state import load_state
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import ScanReceipt
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.builds import routed
from sf_pipelines_tests.golden.snapshots import UNIFIED, VECTOR, fill
from sf_pipelines_tests.tables import small_config, write_source

NOW = timedelta(0)
KEEP_TWO = CleanupRules(2, None, NOW)


@dataclass(frozen=True)
class World:
    """A store with everything in it, by what its runs are."""

    root: Path
    config: WriteConfig
    oldest: str
    pinned: str
    source: str
    fork: str
    bad: str
    failed: str
    killed: str
    running: str
    lost: str


def _publish(root: Path, seed: int) -> str:
    write_source(root / "source.parquet", seed=seed)
    result = build_snapshot(small_config(root), cache_dir=root / "cache")
    assert result.published
    return result.run_id


def _fail_the_gate(root: Path) -> str:
    write_source(root / "source.parquet", seed=20)
    config = small_config(root, recall_gate={"min_recall": 1.0}, vector_spec={"dim": 16, "sharding": {"num_probes": 1}})
    before = set(Store.open(config.store).folders("staging"))
    with pytest.raises(GateFailedError):
        build_snapshot(config, cache_dir=root / "cache")
    (folder,) = set(Store.open(config.store).folders("staging")) - before
    return folder.removeprefix("run_id=")


def _stop_half_way(root: Path, seed: int, *, alive: bool) -> str:
    """A build that nobody ended: its lease has run out, or not."""
    write_source(root / "source.parquet", seed=seed)
    with Build(small_config(root), cache_dir=root / "cache") as build:
        run_id = routed(build)
        stages.build_shard(build, run_id, 0)
        if not alive:
            key = build.ledger(run_id).need(ScanReceipt).record_key
            long_ago = datetime.now(UTC) - timedelta(hours=1)
            found = record.read_record(build.store, key)
            expired = found.model_copy(update={"lease_expires_at": long_ago, "updated_at": long_ago})
            build.store.put(key, expired.encode())
    return run_id


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    oldest, pinned, source = (_publish(root, seed) for seed in range(3))
    config = small_config(root)
    with Build(config, cache_dir=root / "cache") as build:
        # An attempt that lost, then the one that a fork is made of.
        lost = stages.build_shard(build, source, 1, rebuild=True).db_key
        stages.build_shard(build, source, 1, rebuild=True)
        fork = stages.assemble(build, source).run_id
        stages.gate(build, fork)
        stages.promote(build, fork)
    pin(config.store, pinned, "audit")
    bad = _publish(root, 3)
    rollback(config.store)
    failed = _fail_the_gate(root)
    killed, running = _stop_half_way(root, 21, alive=False), _stop_half_way(root, 22, alive=True)
    store = Store.open(config.store)
    for run in ("old", "new"):
        store.put(f"staging/dagster/runs/{run}/asset/manifest", json.dumps({"run_id": killed}).encode())
    store.put("staging/dagster/runs/live/asset/manifest", json.dumps({"run_id": running}).encode())
    store.put("staging/dagster/latest/asset/manifest", b"{}")
    store.put("notes/readme.txt", b"somebody's own")
    store.put(f"staging/run_id={killed}/notes.txt", b"somebody's own")
    assert lost is not None
    return World(root, config, oldest, pinned, source, fork, bad, failed, killed, running, lost)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def copied(request: pytest.FixtureRequest, world: World, tmp_path: Path) -> Store:
    """The same store for one test alone."""
    if request.param == "local":
        return _local_copy(world, tmp_path)
    options: S3Options = request.getfixturevalue("moto_options")
    store = Store.open(f"s3://{request.getfixturevalue('bucket')}/small", options)
    return _filled(store, world)


def _local_copy(world: World, folder: Path) -> Store:
    shutil.copytree(world.root / "store", folder / "store")
    return Store.open(folder / "store")


def _filled(store: Store, world: World) -> Store:
    for info in Store.open(world.config.store).objects():
        store.upload(world.root / "store" / info.key, info.key)
    return store


def keys(store: Store) -> set[str]:
    return {info.key for info in store.objects()}


def of_run(store: Store, run_id: str, *places: str) -> set[str]:
    return {key for key in keys(store) if f"run_id={run_id}" in key and key.startswith(places or ("",))}


def rules_of(plan: CleanupReport) -> dict[str, set[str | None]]:
    found: dict[str, set[str | None]] = {}
    for group in plan.groups:
        found.setdefault(group.rule, set()).add(group.run_id)
    return found


def check_history(store: Store) -> None:
    """Everything that is listed is whole."""
    for entry in history(store, limit=None):
        assert check_whole(store, load_state(store, entry.manifest_key), deep=True).faults == ()


# The plan.


def test_a_plan_names_everything_with_its_rule_and_changes_nothing(world: World, copied: Store) -> None:
    before = {info.key: (info.size, info.etag) for info in copied.objects()}
    plan = cleanup(copied, keep=2, stale_after=NOW)
    assert {info.key: (info.size, info.etag) for info in copied.objects()} == before
    assert not plan.applied
    found = rules_of(plan)
    assert found["snapshot"] == {world.oldest, world.source}
    assert found["build"] == {world.failed, world.killed}
    # What only a current snapshot needs, of those that stay. A build is running: what is of no run may be its.
    assert found["routed"] == {world.bad}
    assert set(found) == {"snapshot", "build", "routed"}
    kept = plan.kept
    assert set(kept) == {world.pinned, world.fork, world.bad, world.running}
    assert (kept[world.fork], kept[world.pinned]) == ("it is current", "it is pinned")
    assert kept[world.bad] == "it is among the 2 to keep"
    assert "its build is running (lease until" in kept[world.running]
    assert plan.left_alone == {"1 objects": "no known writer makes them: notes/readme.txt"}
    # Figures are those of the objects.
    sizes = {key: size for key, (size, _) in before.items()}
    everything = [key for group in plan.groups for key in group.keys]
    assert len(everything) == len(set(everything)) == plan.objects
    assert plan.bytes == sum(sizes[key] for key in everything)
    for group in plan.groups:
        assert (group.objects, group.bytes) == (len(group.keys), sum(sizes[key] for key in group.keys))


def test_the_order_of_deletions(world: World, copied: Store) -> None:
    plan = plan_cleanup(copied, KEEP_TWO)
    for group in plan.groups:
        if group.rule == "snapshot":
            assert group.steps[0][0].startswith("manifests/")
            assert all("/receipts/scan/" in key for key in group.steps[1])
            assert all(key.startswith("runs/") for key in group.steps[-1])
        if group.rule == "build":
            assert all("/receipts/scan/" in key for key in group.steps[0])


def test_what_is_young_stays(world: World, copied: Store) -> None:
    plan = plan_cleanup(copied, CleanupRules(1, timedelta(hours=2), timedelta(hours=2)))
    assert plan.groups == ()
    assert plan.kept[world.oldest] == "it was built less than 2:00:00 ago"
    later = datetime.now(UTC) + timedelta(hours=3)
    plan = plan_cleanup(copied, CleanupRules(1, timedelta(hours=2), timedelta(hours=2)), now=later)
    # By then the lease of the running build has run out, too.
    assert rules_of(plan)["snapshot"] == {world.oldest, world.source, world.bad}
    assert rules_of(plan)["build"] == {world.failed, world.killed, world.running}


def test_keep_counts_what_is_good(world: World, copied: Store) -> None:
    """The current one, what was served before it, then the newest that nobody withdrew; pinned ones beside."""
    wanted = {
        1: {world.oldest, world.source, world.bad},
        2: {world.oldest, world.source},
        3: {world.oldest},
        4: {world.oldest},
        5: set[str](),
    }
    for keep, gone in wanted.items():
        assert rules_of(plan_cleanup(copied, CleanupRules(keep, None, NOW))).get("snapshot", set()) == gone
    for keep in (0, -1, True):
        with pytest.raises(OperationError, match="keep"):
            cleanup(copied, keep=keep)
    with pytest.raises(OperationError, match="older_than must not be negative"):
        cleanup(copied, keep=1, older_than=timedelta(days=-1))


# Doing it.


def test_everything_that_stays_opens_and_verifies(world: World, copied: Store, moto_options: S3Options) -> None:
    before = keys(copied)
    result = cleanup(copied, keep=2, stale_after=NOW, dry_run=False)
    assert result.applied
    assert [group.refused for group in result.groups] == [None] * len(result.groups)
    assert result.bytes_freed == result.bytes
    gone = {key for group in result.groups for key in group.keys}
    assert keys(copied) == before - gone
    assert {entry.run_id for entry in history(copied)} == {world.fork, world.pinned, world.bad}
    s3 = None if copied.local_root else moto_options
    for entry in history(copied):
        assert verify_snapshot(copied.url, s3=s3, manifest_key=entry.manifest_key).passed
    assert of_run(copied, world.oldest) == set()
    assert of_run(copied, world.failed) == set()
    assert of_run(copied, world.killed) | of_run(copied, world.source) == set()
    assert of_run(copied, world.running) == of_run(Store.open(world.config.store), world.running)
    assert "notes/readme.txt" in keys(copied)
    assert "staging/dagster/latest/asset/manifest" in keys(copied)
    assert "staging/dagster/runs/live/asset/manifest" in keys(copied)
    again = cleanup(copied, keep=2, stale_after=NOW)
    assert again.groups == ()
    if copied.local_root is not None:
        empty = [path for path in copied.local_root.rglob("*") if path.is_dir() and not any(path.iterdir())]
        assert empty == []
    # What was withdrawn can be made current again, and back.
    assert rollback(copied, world.bad, s3=s3).run_id == world.bad


def test_a_fork_whose_source_is_gone(world: World, tmp_path: Path) -> None:
    """It is whole without it; a shard of it is built anew from the table only, and the error says so."""
    store = _local_copy(world, tmp_path)
    cleanup(store, keep=1, stale_after=NOW, dry_run=False)
    check_history(store)
    config = small_config(tmp_path, source=world.config.source)
    with (
        Build(config, cache_dir=tmp_path / "cache") as build,
        pytest.raises(IntegrityError, match=r"the routed rows of run .* are gone.* build again with force"),
    ):
        stages.build_shard(build, world.fork, 1, rebuild=True)


def test_routed_rows_stay_where_shards_may_be_built_anew(world: World, tmp_path: Path) -> None:
    """Of the current snapshot and of pinned ones; of others they go, and nothing else of them."""
    store = _local_copy(world, tmp_path)
    plan = plan_cleanup(store, CleanupRules(5, None, NOW))
    groups = {group.run_id: group for group in plan.groups if group.rule == "routed"}
    assert set(groups) == {world.oldest, world.source, world.bad}
    for run_id, group in groups.items():
        assert {key.rsplit("/", 1)[0] for key in group.keys} == {
            f"staging/run_id={run_id}/{rows}" for rows in ("routed", "rows")
        }
    assert plan_cleanup(store, CleanupRules(5, None, timedelta(hours=1))).groups == ()
    apply_cleanup(store, plan)
    check_history(store)


def test_what_a_manifest_refers_to_stays(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in stores of a writer that keeps routing or shards of an earlier run where they are."""
    store = _local_copy(world, tmp_path)
    real = cleaning._referred_runs

    def referred(store: Store, entry: HistoryEntry) -> set[str]:
        return real(store, entry) | ({world.oldest, world.failed} if entry.is_current else set[str]())

    monkeypatch.setattr(cleaning, "_referred_runs", referred)
    plan = plan_cleanup(store, CleanupRules(1, None, NOW))
    assert not {group.run_id for group in plan.groups if group.rule != "routed"} & {world.oldest, world.failed}
    assert plan.kept[world.failed] == f"the manifest of run {world.fork} refers to its objects"


def test_what_is_of_no_run_goes_by_age_when_no_build_runs(world: World, tmp_path: Path) -> None:
    store = _local_copy(world, tmp_path)
    frame = f"staging/frames/{'0' * 32}/part-{'1' * 32}.parquet"
    for key in (frame, f"staging/outworn/{'0' * 64}.json", f"staging/probe/{'0' * 32}"):
        store.put(key, b"x")
    found = rules_of(plan_cleanup(store, CleanupRules(5, None, NOW)))
    assert "notes" in found
    assert not {"dagster", "frames"} & set(found)
    later = datetime.now(UTC) + timedelta(hours=1)
    assert {"notes", "dagster", "frames"} <= set(rules_of(plan_cleanup(store, CleanupRules(5, None, NOW), now=later)))
    young = CleanupRules(5, None, timedelta(hours=2))
    assert plan_cleanup(store, young, now=later).groups == ()


def test_temporary_files_of_killed_writers(world: World, tmp_path: Path) -> None:
    store = _local_copy(world, tmp_path)
    root = tmp_path / "store"
    old = [root / "._CURRENT.ab12cd_3", root / "runs" / "data.bin#1", root / "staging" / "x.arrow#12"]
    young = root / "shards" / "part#3"
    for path in (*old, young):
        path.write_bytes(b"xx")
    for path in old:
        os.utime(path, (1, 1))
    plan = plan_cleanup(store, CleanupRules(5, None, timedelta(hours=1)))
    (group,) = plan.groups
    assert (group.rule, group.objects, group.bytes) == ("temporary", 3, 6)
    apply_cleanup(store, plan)
    assert [path.exists() for path in old] == [False] * 3
    assert young.exists()


# Killed in the middle.


class Failing(Store):
    """Fails at the n-th delete, for good."""

    left = 0

    def delete(self, key: str) -> None:
        if self.left <= 0:
            raise StoreUnavailableError(f"cannot delete {key}: connection reset")
        self.left -= 1
        super().delete(key)

    def delete_many(self, keys: Any) -> None:
        for key in keys:
            self.delete(key)


def failing(store: Store, after: int) -> Store:
    made = Failing(store.url, store._backend, store.local_root)
    made.left = after
    return made


@pytest.mark.slow
def test_a_crash_after_every_single_delete(world: World, tmp_path: Path) -> None:
    """Whatever is listed can be opened; cleaning up again ends where one that was not stopped ends."""
    reference = _local_copy(world, tmp_path / "reference")
    plan = plan_cleanup(reference, KEEP_TWO)
    apply_cleanup(reference, plan)
    store = _filled(Store.open(f"memory://{uuid.uuid4().hex}"), world)
    total = len([key for group in plan.groups for key in group.keys])
    stopped = 0
    for crash in itertools.count():
        try:
            # One delete more each time, on what the crashes before have left.
            cleanup(failing(store, 1), keep=2, stale_after=NOW, dry_run=False)
        except StoreUnavailableError:
            stopped += 1
            listed = history(store, limit=None)
            assert {entry.run_id for entry in listed} >= {world.fork, world.pinned, world.bad}
            if crash % 20 == 0 or len(listed) > 3:
                check_history(store)
            continue
        break
    assert stopped >= total - 1
    check_history(store)
    assert keys(store) == keys(reference)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 10, 40])
def test_a_crash_in_one_go(world: World, copied: Store, after: int) -> None:
    with pytest.raises(StoreUnavailableError):
        cleanup(failing(copied, after), keep=2, stale_after=NOW, dry_run=False)
    check_history(copied)
    assert read_pointer(copied).pointer is not None
    cleanup(copied, keep=2, stale_after=NOW, dry_run=False)
    assert {entry.run_id for entry in history(copied)} == {world.fork, world.pinned, world.bad}
    assert of_run(copied, world.oldest) | of_run(copied, world.failed) == set()


def test_the_memory_of_a_plan_that_is_gone_does_not_matter(world: World, copied: Store) -> None:
    """A plan whose objects are gone already does nothing."""
    plan = plan_cleanup(copied, KEEP_TWO)
    apply_cleanup(copied, plan)
    left = keys(copied)
    apply_cleanup(copied, plan)
    assert keys(copied) == left


# Between plan and apply.


def outcome_of(store: Store, plan: CleanupReport, rule: str, run_id: str) -> str | None:
    result = apply_cleanup(store, plan)
    (found,) = [group.refused for group in result.groups if (group.rule, group.run_id) == (rule, run_id)]
    return found


def test_what_was_rolled_back_to_since_then_stays(world: World, copied: Store, moto_options: S3Options) -> None:
    plan = plan_cleanup(copied, KEEP_TWO)
    mine = of_run(copied, world.oldest)
    rollback(copied, world.oldest, s3=moto_options)
    refused = outcome_of(copied, plan, "snapshot", world.oldest)
    assert refused == "since the plan was made: it is current"
    assert of_run(copied, world.oldest) == mine
    check_history(copied)


def test_what_was_pinned_since_then_stays(world: World, copied: Store) -> None:
    plan = plan_cleanup(copied, KEEP_TWO)
    mine = of_run(copied, world.oldest)
    pin(copied, world.oldest, "late")
    assert outcome_of(copied, plan, "snapshot", world.oldest) == "since the plan was made: it is pinned"
    assert of_run(copied, world.oldest) == mine
    unpin(copied, world.oldest)
    assert outcome_of(copied, plan_cleanup(copied, KEEP_TWO), "snapshot", world.oldest) is None


def test_a_build_that_was_taken_up_since_then_stays(world: World, copied: Store) -> None:
    plan = plan_cleanup(copied, KEEP_TWO)
    mine = of_run(copied, world.killed)
    record.renew(copied, Ledger(copied, world.killed).need(ScanReceipt).record_key, force=True)
    refused = outcome_of(copied, plan, "build", world.killed)
    assert refused is not None
    assert "its build is running" in refused
    assert of_run(copied, world.killed) == mine


def interposed(store: Store, needle: str, act: Callable[[], object]) -> Store:
    """Something happens right before an object is deleted."""
    done: list[str] = []

    class Interposed(Store):
        def delete(self, key: str) -> None:
            if needle in key and not done:
                done.append(key)
                act()
            super().delete(key)

        def delete_many(self, keys: Any) -> None:
            for key in keys:
                self.delete(key)

    return Interposed(store.url, store._backend, store.local_root)


@pytest.mark.parametrize("how", ["rollback", "pin"])
def test_what_is_protected_in_the_last_moment_comes_back(
    world: World, copied: Store, moto_options: S3Options, how: str
) -> None:
    """Between the last look and the first delete: the manifest is put back, everything else was not touched."""

    def protect() -> None:
        if how == "pin":
            pin(copied, world.oldest, "last moment")
        else:
            rollback(copied, world.oldest, s3=moto_options)

    mine = of_run(copied, world.oldest)
    plan = plan_cleanup(copied, KEEP_TWO)
    refused = outcome_of(interposed(copied, f"run_id={world.oldest}/manifest", protect), plan, "snapshot", world.oldest)
    assert refused is not None
    assert of_run(copied, world.oldest) >= mine
    check_history(copied)


def test_who_comes_after_the_manifest_is_gone_is_told(world: World, copied: Store, moto_options: S3Options) -> None:
    told: list[Exception] = []

    def too_late() -> None:
        for act in (
            lambda: rollback(copied, world.oldest, s3=moto_options),
            lambda: pin(copied, world.oldest, "too late"),
        ):
            with pytest.raises((RunNotFoundError, SnapshotDamagedError)) as caught:
                act()
            told.append(caught.value)

    plan = plan_cleanup(copied, KEEP_TWO)
    store = interposed(copied, f"run_id={world.oldest}/receipts/scan", too_late)
    assert outcome_of(store, plan, "snapshot", world.oldest) is None
    assert len(told) == 2
    pointer = read_pointer(copied).pointer
    assert pointer is not None
    assert pointer.run_id == world.fork
    assert of_run(copied, world.oldest) == set()


# What is not understood.


def test_strangers_are_left_alone(world: World, tmp_path: Path) -> None:
    store = _local_copy(world, tmp_path)
    store.put(f"shards/run_id={world.oldest}/db=00000/attempt=00/wal/1.sst", b"another library's")
    (entry,) = [one for one in history(store, limit=None) if one.run_id == world.source]
    store.put(entry.manifest_key, b"no manifest")
    mine = {run: of_run(store, run) for run in (world.oldest, world.source)}
    result = cleanup(store, keep=1, stale_after=NOW, dry_run=False)
    left = result.left_alone
    assert "which no known writer makes" in left[world.oldest]
    assert "SQLite" in left[world.source]
    assert {run: of_run(store, run) for run in mine} == mine


@pytest.mark.parametrize("name", [*VECTOR, *UNIFIED])
def test_stock_snapshots(name: str, tmp_path: Path) -> None:
    """The one that is served stays; one that is not goes with all its objects, as the format says where they are."""
    store = Store.open(tmp_path / "stock", create=True)
    fill(store, name)
    whole = keys(store)
    assert cleanup(store, keep=1, stale_after=NOW, dry_run=False).groups == ()
    assert keys(store) == whole
    write_source(tmp_path / "source.parquet")
    config = small_config(tmp_path, store=str(tmp_path / "stock"))
    ours = build_snapshot(config, cache_dir=tmp_path / "cache").run_id
    result = cleanup(store, keep=1, stale_after=NOW, dry_run=False)
    assert rules_of(result) == {"snapshot": {"golden-run"}}
    assert all(f"run_id={ours}" in key or key == CURRENT or key.startswith(".") for key in keys(store))
    assert verify_snapshot(store.url).passed


def test_without_a_pointer_nothing_is_cleaned_up(world: World, tmp_path: Path) -> None:
    store = _local_copy(world, tmp_path)
    pointer = read_pointer(store).pointer
    assert pointer is not None
    whole = keys(store)
    data = store.get(CURRENT)

    def lose_manifest() -> None:
        store.put(CURRENT, data.replace(world.fork.encode(), b"nobody"))

    for harm, kind in (
        (lambda: store.delete(CURRENT), OperationError),
        (lambda: store.put(CURRENT, b"{"), IntegrityError),
        (lose_manifest, ObjectMissingError),
    ):
        harm()
        with pytest.raises(kind):
            cleanup(store, keep=1, stale_after=NOW, dry_run=False)
        store.put(CURRENT, data)
        assert keys(store) == whole


def test_a_record_that_cannot_be_understood_protects_its_run(world: World, tmp_path: Path) -> None:
    store = _local_copy(world, tmp_path)
    store.put(Ledger(store, world.killed).need(ScanReceipt).record_key, b"status: [")
    plan = plan_cleanup(store, KEEP_TWO)
    assert rules_of(plan)["build"] == {world.failed}
    assert "cannot be understood" in plan.kept[world.killed]


def test_a_root_with_nothing_in_it(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "empty", create=True)
    assert cleanup(store, keep=1).groups == ()
    with pytest.raises(SnapshotNotFoundError, match="nothing has been published under"):
        cleanup(tmp_path / "nowhere", keep=1)
