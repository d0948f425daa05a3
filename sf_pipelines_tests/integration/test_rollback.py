"""Rollback on real stores: verified first, one winner, and a bad snapshot that does not come back by itself."""

import json
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines import S3Options, ShardedVectorReader, WriteConfig, build_snapshot
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.errors import (
    IntegrityError,
    ManifestError,
    OperationError,
    PublishConflictError,
    RunNotFoundError,
    SfPipelinesError,
    SnapshotDamagedError,
)
from sf_pipelines.snapshot.manifest.pointer import CURRENT, MAX_REMEMBERED, Pointer, manifest_key
from sf_pipelines.snapshot.manifest.publish import history, read_pointer
from sf_pipelines.snapshot.operations.history import snapshots
from sf_pipelines.snapshot.operations.pins import pin, pins, unpin
from sf_pipelines.snapshot.operations.rollback import release, rollback
from sf_pipelines.snapshot.operations.verify import verify_snapshot
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import ScanReceipt, ShardReceipt
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.builds import assembled
from sf_pipelines_tests.tables import small_config, write_source


@dataclass
class Place:
    """A store with builds in it."""

    folder: Path
    fields: dict[str, Any]

    @property
    def config(self) -> WriteConfig:
        return small_config(self.folder, **self.fields)

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def open(self) -> Store:
        return Store.open(self.config.store, self.config.s3)

    def publish(self, seed: int) -> str:
        """A snapshot of a source of its own; run id."""
        write_source(self.folder / "source.parquet", seed=seed)
        result = build_snapshot(self.config, cache_dir=self.cache)
        assert result.published
        return result.run_id

    def pointer(self) -> Pointer:
        pointer = read_pointer(self.open()).pointer
        assert pointer is not None
        return pointer


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    fields: dict[str, Any] = {}
    if request.param == "s3":
        options: S3Options = request.getfixturevalue("moto_options")
        fields = {"store": f"s3://{request.getfixturevalue('bucket')}/small", "s3": options}
    return Place(tmp_path, fields)


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return Place(tmp_path, {})


def test_to_the_one_before(place: Place) -> None:
    first, second = place.publish(0), place.publish(1)
    store, before = place.open(), place.pointer()
    with ShardedVectorReader(place.config.store, s3=place.config.s3, cache_dir=place.cache) as reader:
        result = rollback(place.config.store, s3=place.config.s3)
        assert (result.run_id, result.previous_run_id, result.seq) == (first, second, 3)
        assert reader.refresh()
        assert reader.snapshot_info().run_id == first
    pointer = place.pointer()
    assert pointer.hold == before.build_key == result.holds[-1].build_key
    assert (pointer.withdrawn, pointer.served, pointer.moved_by) == ((second,), (first,), "rollback")
    assert pointer.previous is not None
    assert (pointer.previous.run_id, pointer.previous.write_id) == (second, before.write_id)
    assert result.checked.objects > 0
    # The store's versions are those that were sealed: nothing needed to be read.
    assert result.checked.hashed == 0
    assert verify_snapshot(place.config.store, s3=place.config.s3).run_id == first
    shown = [(entry.run_id, entry.is_current, entry.is_withdrawn, entry.is_held) for entry in snapshots(store)]
    assert shown == [(second, False, True, True), (first, True, False, False)]


def test_to_a_run_id_and_so_many_back_along_what_was_served(local: Place) -> None:
    runs = [local.publish(seed) for seed in range(4)]
    assert local.pointer().served == tuple(runs)
    assert rollback(local.open(), back=2).run_id == runs[1]
    pointer = local.pointer()
    assert (set(pointer.withdrawn), pointer.served) == ({runs[2], runs[3]}, (runs[0], runs[1]))
    # Back again does not go forward to what was withdrawn.
    assert rollback(local.open()).run_id == runs[0]
    assert set(local.pointer().withdrawn) == {runs[1], runs[2], runs[3]}
    with pytest.raises(RunNotFoundError, match="0 snapshots that were served before"):
        rollback(local.open())
    # By id, forward: that undoes the rollback of this run, and of no other.
    assert rollback(local.open(), runs[2]).run_id == runs[2]
    pointer = local.pointer()
    assert set(pointer.withdrawn) == {runs[1], runs[3]}
    assert pointer.served == (runs[0], runs[2])
    assert pointer.hold is not None
    for wrong in (0, -1, True):
        with pytest.raises(OperationError, match="at least 1"):
            rollback(local.open(), back=wrong)
    with pytest.raises(OperationError, match="current already"):
        rollback(local.open(), runs[2])
    with pytest.raises(RunNotFoundError, match="'nobody'"):
        rollback(local.open(), "nobody")


@pytest.mark.slow
def test_what_was_never_served_is_no_step_back(local: Place) -> None:
    """A publisher was killed between the manifest's public name and the pointer."""
    first = local.publish(0)
    write_source(local.folder / "source.parquet", seed=1)
    build, run_id = assembled(local.config, local.cache)
    with build:
        stages.gate(build, run_id)

        def killed(*args: Any, **kwargs: Any) -> bool:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "swap", killed)
            with pytest.raises(KeyboardInterrupt):
                stages.promote(build, run_id)
    third = local.publish(2)
    assert {entry.run_id for entry in history(local.open())} == {first, run_id, third}
    assert rollback(local.open()).run_id == first
    # Nobody falls back to it either.
    assert set(local.pointer().withdrawn) == {run_id, third}


def _harm_gone(path: Path) -> None:
    path.unlink()


def _harm_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _harm_changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.slow
@pytest.mark.parametrize("harm", [_harm_gone, _harm_cut, _harm_changed])
@pytest.mark.parametrize("what", ["shards/run_id={}/db=00001/*/vector_index.lance/data/*", "vector_meta/run_id={}/*"])
def test_a_damaged_target_is_refused_and_named(local: Place, harm: Callable[[Path], None], what: str) -> None:
    first, second = local.publish(0), local.publish(1)
    (victim,) = (local.folder / "store").glob(what.format(first))
    harm(victim)
    before = local.open().get(CURRENT)
    with pytest.raises(IntegrityError) as caught:
        rollback(local.open())
    assert victim.name in str(caught.value)
    assert local.open().get(CURRENT) == before
    assert local.pointer().run_id == second


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gone", "changed", "cut"])
def test_a_damaged_target_on_s3_is_refused(bucket: str, moto_options: S3Options, tmp_path: Path, how: str) -> None:
    place = Place(tmp_path, {"store": f"s3://{bucket}/small", "s3": moto_options})
    first = place.publish(0)
    place.publish(1)
    store = place.open()
    key = max((info for info in store.objects(f"shards/run_id={first}")), key=lambda info: info.size).key
    data = store.get(key)
    store.delete(key)
    if how != "gone":
        store.put(key, data[:-1] if how == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    before = store.get(CURRENT)
    with pytest.raises(SnapshotDamagedError, match=key.rsplit("/", 1)[-1]):
        rollback(place.config.store, first, s3=moto_options)
    assert store.get(CURRENT) == before


def test_a_manifest_other_than_the_published_one_is_refused(local: Place) -> None:
    first = local.publish(0)
    local.publish(1)
    (victim,) = (local.folder / "store" / "manifests").glob(f"*{first}/manifest")
    data = victim.read_bytes()
    victim.write_bytes(data.replace(b'"title"', b'"titel"') + b"\0" * 0 if b'"title"' in data else data + bytes(4096))
    with pytest.raises(IntegrityError, match="manifest"):
        rollback(local.open(), first)


def test_a_copy_is_hashed_where_its_versions_say_nothing(local: Place) -> None:
    first = local.publish(0)
    local.publish(1)
    for path in (local.folder / "store" / "shards" / f"run_id={first}").rglob("*"):
        if path.is_file():
            # The same bytes, another time: another version.
            path.write_bytes(path.read_bytes())
    result = rollback(local.open())
    assert result.checked.hashed == result.checked.objects > 0


def test_deep_reads_every_object(local: Place) -> None:
    local.publish(0)
    local.publish(1)
    result = rollback(local.open(), deep=True)
    assert result.checked.hashed == result.checked.objects > 0


# Hold.


def test_a_hold_keeps_the_bad_snapshot_away(place: Place) -> None:
    first, second = place.publish(0), place.publish(1)
    rollback(place.config.store, s3=place.config.s3)
    before = place.open().get(CURRENT)
    for _ in range(2):
        again = build_snapshot(place.config, cache_dir=place.cache)
        assert (again.published, again.held, again.run_id) == (False, True, first)
        assert "holds it" in again.reason
        assert "sf-pipelines release" in again.reason
    assert place.open().get(CURRENT) == before
    # Another gate is no other build.
    gate = {**place.fields, "recall_gate": {"min_recall": 0.9}}
    other = build_snapshot(small_config(place.folder, **gate), cache_dir=place.cache)
    assert (other.published, other.held) == (False, True)
    assert place.open().get(CURRENT) == before
    assert set(place.open().folders("staging")) == {f"run_id={first}", f"run_id={second}"}

    third = place.publish(2)
    pointer = place.pointer()
    assert (pointer.run_id, pointer.hold, pointer.holds, pointer.withdrawn) == (third, None, (), (second,))
    assert pointer.served == (first, third)


def test_rollbacks_one_after_the_other_hold_everything_that_they_withdrew(local: Place) -> None:
    runs = [local.publish(seed) for seed in range(4)]
    rollback(local.open())
    rollback(local.open(), back=2)
    assert local.pointer().run_id == runs[0]
    assert len(local.pointer().holds) == 3
    # The source is still the last one that was withdrawn.
    again = build_snapshot(local.config, cache_dir=local.cache)
    assert (again.published, again.held, again.run_id) == (False, True, runs[0])
    assert [entry.is_held for entry in snapshots(local.open())] == [True, True, True, False]


def test_what_differs_in_its_gate_alone_is_held_under_that_gate(local: Place) -> None:
    """Source and shards are those of the target; the published number of probes, say, was the fault."""
    first = local.publish(0)
    other = small_config(local.folder, recall_gate={"min_recall": 0.9})
    second = build_snapshot(other, cache_dir=local.cache)
    assert second.published
    result = rollback(local.open())
    assert result.run_id == first
    assert [hold.gate_key for hold in result.holds] == [other.gate_key()]
    again = build_snapshot(other, cache_dir=local.cache)
    assert (again.published, again.held, again.run_id) == (False, True, first)
    # What is served is not held: a damaged shard of it can be built anew.
    same = build_snapshot(local.config, cache_dir=local.cache)
    assert (same.published, same.held, same.run_id) == (False, False, first)
    assert [entry.is_held for entry in snapshots(local.open())] == [True, False]
    release(local.open())
    assert build_snapshot(other, cache_dir=local.cache).published


def test_a_hold_written_by_itself_is_understood() -> None:
    fields = {"manifest_ref": "r", "manifest_content_type": "t", "run_id": "x", "updated_at": "2026-01-01T00:00:00Z"}
    pointer = Pointer.decode(json.dumps(fields | {"hold": "k"}).encode(), "here")
    assert pointer.is_held("k", "any")
    assert not pointer.is_held("other", "any")
    assert Pointer.decode(pointer.encode(), "here") == pointer


def test_a_shard_that_was_withdrawn_with_its_fork_does_not_come_back(local: Place) -> None:
    first = local.publish(0)
    with Build(local.config, cache_dir=local.cache) as build:
        stages.build_shard(build, first, 1, rebuild=True)
    forked = build_snapshot(local.config, cache_dir=local.cache)
    assert forked.published
    assert rollback(local.open()).run_id == first
    for _ in range(2):
        again = build_snapshot(local.config, cache_dir=local.cache)
        assert (again.published, again.run_id) == (False, first)
    assert set(local.open().folders("staging")) == {f"run_id={first}", f"run_id={forked.run_id}"}
    # A shard that breaks afterwards is built anew all the same.
    (victim,) = (local.folder / "store").glob(f"shards/run_id={first}/db=00001/attempt=00-*/vector_index.lance/data/*")
    victim.unlink()
    healed = build_snapshot(local.config, cache_dir=local.cache)
    assert healed.published
    assert healed.run_id not in {first, forked.run_id}


@pytest.mark.slow
def test_a_damaged_shard_of_what_is_held_is_not_built_anew(local: Place) -> None:
    local.publish(0)
    second = local.publish(1)
    rollback(local.open())
    (victim,) = (local.folder / "store").glob(f"shards/run_id={second}/db=00001/*/vector_index.lance/data/*")
    victim.unlink()
    objects = {info.key for info in local.open().objects()}
    again = build_snapshot(local.config, cache_dir=local.cache)
    assert (again.published, again.held) == (False, True)
    assert {info.key for info in local.open().objects()} == objects


@pytest.mark.slow
def test_a_hold_stays_when_the_withdrawn_build_is_gone(local: Place) -> None:
    """Then it is built once more, and goes no further than its gate."""
    first, second = local.publish(0), local.publish(1)
    rollback(local.open())
    for key in [info.key for info in local.open().objects(f"staging/run_id={second}")]:
        local.open().delete(key)
    runs = set[str]()
    for _ in range(2):
        again = build_snapshot(local.config, cache_dir=local.cache)
        assert (again.published, again.held, again.run_id) == (False, True, first)
        runs |= set(local.open().folders("staging"))
    assert len(runs) == 3
    assert local.pointer().run_id == first
    release(local.open())
    late = build_snapshot(local.config, cache_dir=local.cache)
    assert late.published
    assert f"run_id={late.run_id}" in runs


def test_force_does_not_publish_what_is_held(local: Place) -> None:
    first, second = local.publish(0), local.publish(1)
    rollback(local.open())
    held = build_snapshot(local.config, cache_dir=local.cache, force=True)
    assert (held.published, held.held, held.run_id) == (False, True, first)
    release(local.open())
    forced = build_snapshot(local.config, cache_dir=local.cache, force=True)
    assert forced.published
    assert forced.run_id not in {first, second}
    assert (local.pointer().hold, local.pointer().withdrawn) == (None, (second,))


def test_a_forced_build_that_was_killed_goes_on_as_a_forced_one(local: Place) -> None:
    first = local.publish(0)
    build, run_id = assembled(local.config, local.cache, force=True)
    build.close()
    local.open().delete(CURRENT)
    again = build_snapshot(local.config, cache_dir=local.cache)
    assert again.published
    assert again.run_id == run_id != first
    assert Ledger(local.open(), run_id).need(ScanReceipt).forced


@pytest.mark.slow
def test_promote_alone_is_held_back(local: Place) -> None:
    first, second = local.publish(0), local.publish(1)
    rollback(local.open())
    with Build(local.config, cache_dir=local.cache) as build:
        receipt = stages.promote(build, second)
    assert (receipt.published, receipt.held, receipt.run_id) == (False, True, first)
    assert local.pointer().run_id == first


@pytest.mark.slow
def test_release(place: Place) -> None:
    first, second = place.publish(0), place.publish(1)
    rollback(place.config.store, s3=place.config.s3)
    held = place.pointer().hold
    result = release(place.config.store, s3=place.config.s3)
    assert (result.released[-1].build_key, result.run_id, result.seq) == (held, first, 4)
    pointer = place.pointer()
    assert (pointer.run_id, pointer.hold, pointer.withdrawn) == (first, None, (second,))
    assert pointer.previous is not None
    assert pointer.previous.run_id == second
    data = place.open().get(CURRENT)
    assert release(place.config.store, s3=place.config.s3).released == ()
    assert place.open().get(CURRENT) == data
    again = build_snapshot(place.config, cache_dir=place.cache)
    assert again.published
    assert again.run_id not in {first, second}


@pytest.mark.slow
def test_going_back_to_what_was_withdrawn_lifts_its_hold(local: Place) -> None:
    first, second = local.publish(0), local.publish(1)
    rollback(local.open())
    result = rollback(local.open(), second)
    assert (result.holds, result.withdrawn) == ((), ())
    assert local.pointer().served == (first, second)
    again = build_snapshot(local.config, cache_dir=local.cache)
    assert (again.published, again.held, again.run_id) == (False, False, second)


@pytest.mark.slow
def test_a_hold_never_blocks_what_is_served(local: Place) -> None:
    """Both were built from one source: a damaged shard of what is served can still be built anew."""
    first = local.publish(0)
    second = build_snapshot(local.config, cache_dir=local.cache, force=True).run_id
    assert rollback(local.open()).holds == ()
    (victim,) = (local.folder / "store").glob(f"shards/run_id={first}/db=00001/*/vector_index.lance/data/*")
    victim.unlink()
    healed = build_snapshot(local.config, cache_dir=local.cache)
    assert healed.published
    assert local.pointer().withdrawn == (second,)
    assert verify_snapshot(local.config.store).passed


# Pointers that are not as they should be.


def test_without_a_pointer_that_can_be_read(local: Place) -> None:
    first = local.publish(0)
    store = local.open()
    for harm in (lambda: store.put(CURRENT, b"{"), lambda: store.delete(CURRENT)):
        harm()
        with pytest.raises((ManifestError, OperationError)):
            rollback(store)
        result = rollback(store, first)
        assert (result.run_id, result.previous_run_id, result.holds) == (first, None, ())
        assert local.pointer().run_id == first


@pytest.mark.slow
def test_lists_in_the_pointer_are_bounded_and_long_ones_readable(local: Place) -> None:
    local.publish(0)
    second = local.publish(1)
    long = tuple(f"run-{number}" for number in range(200))
    store = local.open()
    store.put(CURRENT, local.pointer().model_copy(update={"withdrawn": long, "served": (*long, second)}).encode())
    local.publish(2)
    pointer = local.pointer()
    assert (len(pointer.withdrawn), len(pointer.served)) == (MAX_REMEMBERED, MAX_REMEMBERED)
    assert pointer.withdrawn == long[-MAX_REMEMBERED:]
    rollback(store)
    assert len(local.pointer().withdrawn) == MAX_REMEMBERED


# Two at once.


@pytest.mark.slow
def test_two_rollbacks_at_once_have_one_winner(place: Place) -> None:
    runs = [place.publish(seed) for seed in range(3)]
    barrier = threading.Barrier(2)

    def race(target: str) -> SfPipelinesError | str:
        barrier.wait()
        try:
            return rollback(place.config.store, target, s3=place.config.s3).run_id
        except SfPipelinesError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(race, runs[:2]))
    won = [outcome for outcome in outcomes if isinstance(outcome, str)]
    lost = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    if len(won) == 2:
        # One had finished before the other looked: no race took place.
        assert place.pointer().seq == 5
        return
    (error,) = lost
    assert isinstance(error, PublishConflictError)
    assert (error.theirs, place.pointer().run_id) == (won[0], won[0])
    assert won[0] in str(error)
    assert "by a rollback" in str(error)


def interposed(place: Place, act: Callable[[], object]) -> Store:
    """Something happens right before the pointer is swapped."""
    real = place.open()

    class Interposed(Store):
        def swap(self, key: str, *args: Any, **kwargs: Any) -> bool:
            if key == CURRENT:
                act()
            return super().swap(key, *args, **kwargs)

    return Interposed(real.url, real._backend, real.local_root)


@pytest.mark.slow
def test_two_rollbacks_to_one_target_have_one_winner(place: Place) -> None:
    first = place.publish(0)
    place.publish(1)
    with pytest.raises(PublishConflictError, match=rf"names run '{first}' \(seq 3\) since .* by a rollback") as caught:
        rollback(interposed(place, lambda: rollback(place.open())))
    assert (caught.value.ours, caught.value.theirs) == (first, first)
    assert place.pointer().seq == 3


@pytest.mark.slow
def test_a_release_does_not_overwrite_a_rollback(place: Place) -> None:
    runs = [place.publish(seed) for seed in range(3)]
    rollback(place.open())
    with pytest.raises(PublishConflictError) as caught:
        release(interposed(place, lambda: rollback(place.open())))
    assert caught.value.theirs == runs[0] == place.pointer().run_id
    assert place.pointer().hold is not None


@pytest.mark.slow
def test_a_publish_beats_a_rollback_and_a_rollback_a_publish(place: Place) -> None:
    first, second = place.publish(0), place.publish(1)
    with pytest.raises(PublishConflictError) as caught:
        rollback(interposed(place, lambda: place.publish(2)))
    third = place.pointer().run_id
    assert (caught.value.ours, caught.value.theirs) == (first, third)
    # A slow build that went out from the third snapshot, which is withdrawn meanwhile.
    write_source(place.folder / "source.parquet", seed=3)
    build, run_id = assembled(place.config, place.cache)
    with build:
        stages.gate(build, run_id)
        rollback(place.open())
        with pytest.raises(PublishConflictError) as caught:
            stages.promote(build, run_id)
    assert (caught.value.ours, caught.value.theirs) == (run_id, second)
    pointer = place.pointer()
    assert (pointer.run_id, pointer.withdrawn) == (second, (third,))


def race_in_process(store: str, s3: S3Options | None, target: str) -> str:
    try:
        return rollback(store, target, s3=s3).run_id
    except PublishConflictError as error:
        return f"{error.ours} lost to {error.theirs}"


@pytest.mark.slow
def test_processes_that_roll_back_at_once(place: Place) -> None:
    runs = [place.publish(seed) for seed in range(3)]
    before = place.pointer().seq or 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        outcomes = list(pool.map(race_in_process, [place.config.store] * 2, [place.config.s3] * 2, runs[:2]))
    won = [outcome for outcome in outcomes if outcome in runs]
    # As many moves as winners; who lost was told by whom.
    assert (place.pointer().seq or 0) == before + len(won)
    for outcome in outcomes:
        assert outcome in runs or outcome.endswith(f"lost to {won[0]}")


@pytest.mark.slow
def test_a_target_that_a_cleanup_takes_away_is_not_left_current(place: Place) -> None:
    first, second = place.publish(0), place.publish(1)
    (entry,) = [entry for entry in history(place.open()) if entry.run_id == first]
    with pytest.raises(SnapshotDamagedError, match=rf"removed by a cleanup.*'{second}' stays current"):
        rollback(interposed(place, lambda: place.open().delete(entry.manifest_key)))
    pointer = place.pointer()
    assert (pointer.run_id, pointer.withdrawn, pointer.hold) == (second, (), None)
    assert place.open().exists(manifest_key(pointer))


# Pins.


def test_pins(place: Place) -> None:
    first, second = place.publish(0), place.publish(1)
    store = place.open()
    assert pins(store) == []
    made = pin(place.config.store, first, " audit ", s3=place.config.s3)
    assert (made.run_id, made.reason) == (first, "audit")
    pin(store, first, "longer audit")
    pin(store, second, "release 2")
    assert [(one.run_id, one.reason) for one in pins(store)] == [(first, "longer audit"), (second, "release 2")]
    assert [entry.pinned for entry in snapshots(store)] == ["release 2", "longer audit"]
    assert unpin(store, first).reason == "longer audit"
    assert [one.run_id for one in pins(store)] == [second]
    with pytest.raises(RunNotFoundError, match="not pinned"):
        unpin(store, first)
    with pytest.raises(RunNotFoundError, match="'nobody'"):
        pin(store, "nobody", "why")
    for reason in ("", "  ", "x" * 1001):
        with pytest.raises(OperationError, match="1 to 1000 characters"):
            pin(store, first, reason)
    store.put(f"pins/{first}.json", b"{}")
    with pytest.raises(IntegrityError, match=r"pin .*reason"):
        pins(store)


@pytest.mark.slow
def test_rebuilt_shards_of_a_fork_are_verified_too(local: Place) -> None:
    first = local.publish(0)
    with Build(local.config, cache_dir=local.cache) as build:
        stages.build_shard(build, first, 2, rebuild=True)
        fork = stages.assemble(build, first).run_id
        stages.gate(build, fork)
        stages.promote(build, fork)
        key = build.ledger(fork).need(ShardReceipt, "db=00002").db_key
    local.publish(1)
    assert rollback(local.open()).run_id == fork
    rollback(local.open(), first)
    (local.folder / "store" / str(key) / "vector_index.lance").rename(local.folder / "gone")
    with pytest.raises(SnapshotDamagedError, match="is missing"):
        rollback(local.open(), fork)
