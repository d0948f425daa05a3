"""Builds, rollbacks, releases, pins and cleanups in any order, each killed between any two writes, against a model.

The model knows what is served, what may be asked for and what must not come back. Bugs that are planted in each
operation show that its invariants see them.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from sf_pipelines import ShardedVectorReader, WriteConfig, build_snapshot
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.errors import (
    IntegrityError,
    ObjectMissingError,
    OperationError,
    PublishConflictError,
    ReceiptMissingError,
    SfPipelinesError,
)
from sf_pipelines.snapshot.manifest import publish
from sf_pipelines.snapshot.manifest.publish import history, read_pointer
from sf_pipelines.snapshot.operations import cleanup as cleaning
from sf_pipelines.snapshot.operations import rollback as rolling
from sf_pipelines.snapshot.operations.cleanup import CleanupRules, apply_cleanup, plan_cleanup
from sf_pipelines.snapshot.operations.pins import pin, pinned_runs, unpin
from sf_pipelines.snapshot.operations.rollback import release, rollback
from sf_pipelines.snapshot.operations.verify import check_whole
from sf_pipelines.snapshot.reader.state import load_state
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.builds import assembled
from sf_pipelines_tests.tables import small_config, write_source

_VERSIONS, _ROWS, _DIM = 3, 300, 4
_WRITES = ("put", "create", "swap", "upload", "copy", "delete")


class Killed(BaseException):
    """The process ends here: no code of ours catches it."""


class Crash(NamedTuple):
    """Where a process is killed.

    Attributes:
        at: number of the write, from 0.
        side: before it is done, or after it was done and before anybody is told.
    """

    at: int
    side: Literal["before", "after"]


@contextmanager
def killed_at(crash: Crash | None) -> Iterator[None]:
    """Within the block a process is killed at one of its writes; a dead process writes no more."""
    if crash is None:
        yield
        return
    done = 0

    def dying(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            number, done = done, done + 1
            if number > crash.at or (number == crash.at and crash.side == "before"):
                raise Killed
            result = write(*arguments, **options)
            if number == crash.at:
                raise Killed
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in _WRITES:
            patch.setattr(Store, name, dying(getattr(Store, name)))
        yield


@dataclass
class Model:
    """What must be true of a store.

    Attributes:
        served: run that readers get; None before the first publish.
        data: version of the data in each run that was ever listed. One whose builder was killed between its manifest
            and the pointer is listed and was never served.
        pinned: runs that a cleanup must leave.
        held: versions that no build may publish until a release or another publish.
    """

    served: str | None = None
    data: dict[str, int] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    held: set[int] = field(default_factory=set)


# Choices do not depend on what is there: a crash among threads may leave this or that, and draws must repeat.
_WHICH = st.integers(0, 5)
_CRASHES = st.one_of(
    st.none(), st.none(), st.builds(Crash, at=st.integers(0, 40), side=st.sampled_from(["before", "after"]))
)


class Lifecycle(RuleBasedStateMachine):
    """One store, a source of a few versions, and whoever works on them."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="lifecycle-"))
        self.model = Model()
        self.paused: tuple[Build, str, int, str | None] | None = None
        self.keys: dict[int, str] = {}
        self.vectors = [
            write_source(self.root / f"source-{version}.parquet", _ROWS + version, _DIM, seed=version)
            for version in range(_VERSIONS)
        ]

    def teardown(self) -> None:
        if self.paused is not None:
            self.paused[0].close()
        shutil.rmtree(self.root)

    # What is there.

    @property
    def store(self) -> Store:
        return Store.open(self.root / "store", create=True)

    def config(self, version: int) -> WriteConfig:
        return small_config(
            self.root,
            source=str(self.root / f"source-{version}.parquet"),
            num_dbs=2,
            vector_spec={"dim": _DIM, "metric": "l2", "backend": "sqlite-vec"},
            recall_gate={"k": 3, "min_recall": 0.5, "query_rows": 200},
        )

    def published(self) -> list[str]:
        return [entry.run_id for entry in history(self.store, limit=None)]

    def chosen(self, which: int) -> str | None:
        """One of what is listed, the oldest first."""
        listed = self.published()[::-1]
        return listed[which % len(listed)] if listed else None

    def pointer(self) -> str | None:
        pointer = read_pointer(self.store).pointer
        return None if pointer is None else pointer.run_id

    def held_now(self) -> set[int]:
        """Versions that the pointer holds, by the build keys of what was published of them."""
        pointer = read_pointer(self.store).pointer
        held = {hold.build_key for hold in pointer.holds} if pointer else set[str]()
        return {version for version, key in self.keys.items() if key in held}

    def notice(self, version: int) -> None:
        """What a builder of this version has left in the history, whether it was served or not."""
        for entry in history(self.store, limit=None):
            if entry.run_id not in self.model.data:
                self.model.data[entry.run_id] = version
                extras = load_state(self.store, entry.manifest_key).manifest.extras
                assert extras is not None
                assert extras.build_key is not None
                assert self.keys.setdefault(version, extras.build_key) == extras.build_key

    def has_published(self, run_id: str, version: int) -> None:
        self.notice(version)
        assert run_id in self.model.data, "what is served is not in the history"
        assert self.model.data[run_id] == version
        self.model.served, self.model.held = run_id, set()

    # What is done.

    @initialize(versions=st.lists(st.integers(0, _VERSIONS - 1), max_size=2, unique=True))
    def begin(self, versions: list[int]) -> None:
        for version in versions:
            self.build(version, force=False, crash=None)

    @rule(version=st.integers(0, _VERSIONS - 1), force=st.booleans(), crash=_CRASHES)
    def build(self, version: int, force: bool, crash: Crash | None) -> None:
        before = self.pointer()
        try:
            with killed_at(crash):
                result = build_snapshot(self.config(version), force=force, cache_dir=self.root / "cache")
        except Killed:
            self._published_or_not(before, version)
            return
        if version in self.model.held:
            assert not result.published, f"version {version} is held, and was published"
            assert result.held
        elif force or before is None or self.model.data[before] != version:
            assert result.published, result.reason
            assert result.run_id != before
            self.has_published(result.run_id, version)
        else:
            assert not result.published
            assert result.run_id == before

    def _published_or_not(self, before: str | None, version: int) -> None:
        """After a crash of a publisher: the one or the other, nothing else."""
        now = self.pointer()
        self.notice(version)
        if now != before:
            assert now is not None
            assert version not in self.model.held
            self.has_published(now, version)

    @rule(version=st.integers(0, _VERSIONS - 1))
    def another_process_begins(self, version: int) -> None:
        """A build by another process gets as far as its gate, and then takes its time."""
        if self.paused is not None or version in self.model.held:
            return
        build, run_id = assembled(self.config(version), self.root / "other-cache", force=True)
        self.paused = (build, run_id, version, build.run(run_id).scanned.base_fingerprint)

    @rule(crash=_CRASHES)
    def another_process_ends(self, crash: Crash | None) -> None:
        if self.paused is None:
            return
        (build, run_id, version, base), self.paused = self.paused, None
        before = read_pointer(self.store)
        # A build of the same version has gone on with it, and published it.
        done_by_other = run_id in self.published()
        try:
            with build, killed_at(crash):
                stages.gate(build, run_id)
                promoted = stages.promote(build, run_id)
        except Killed:
            self._published_or_not(before.pointer.run_id if before.pointer else None, version)
        except (ReceiptMissingError, IntegrityError, ObjectMissingError):
            # Its lease had ended and a cleanup took its objects: it must say so, and must not publish.
            assert self.pointer() == (before.pointer.run_id if before.pointer else None)
        except PublishConflictError:
            self.notice(version)
            assert before.fingerprint != base
            assert self.pointer() == self.model.served
        else:
            if version in self.model.held or done_by_other:
                assert not promoted.published
                assert self.pointer() == self.model.served
            else:
                assert promoted.published
                assert before.fingerprint == base, "somebody had published in between"
                self.has_published(promoted.run_id, version)

    @rule(which=_WHICH, crash=_CRASHES)
    def roll_back(self, which: int, crash: Crash | None) -> None:
        target, before = self.chosen(which), self.pointer()
        if target is None:
            return
        dates = {entry.run_id: entry.manifest_key for entry in history(self.store, limit=None)}
        try:
            with killed_at(crash):
                rollback(self.store, to=target)
        except Killed:
            assert self.pointer() in {before, target}
        except OperationError:
            assert target == before
        else:
            assert self.pointer() == target
        if self.pointer() != before:
            versions = self.model.data
            self.model.served = target
            # What is the target's own gives nothing new; all else that is taken out of service must not come back.
            expected = self.model.held - {versions[target]}
            if before is not None and dates[target] < dates[before]:
                expected |= {versions[before]} - {versions[target]}
            held = self.held_now()
            assert expected <= held, "what was rolled back from may come back"
            assert versions[target] not in held
            self.model.held = held

    @rule(crash=_CRASHES)
    def let_go(self, crash: Crash | None) -> None:
        if self.model.served is None:
            return
        try:
            with killed_at(crash):
                release(self.store)
        except Killed:
            left = self.held_now()
            assert left in (set(), self.model.held)
            self.model.held = left
        else:
            self.model.held = set()
            assert self.held_now() == set()

    @rule(which=_WHICH, crash=_CRASHES)
    def pin_one(self, which: int, crash: Crash | None) -> None:
        run_id = self.chosen(which)
        if run_id is None:
            return
        try:
            with killed_at(crash):
                pin(self.store, run_id, "the model says so")
        except Killed:
            # It may or may not be, whatever it was before.
            self.model.pinned -= {run_id}
            self.model.pinned |= {run_id} & pinned_runs(self.store)
        else:
            self.model.pinned.add(run_id)

    @rule(which=_WHICH)
    def unpin_one(self, which: int) -> None:
        pinned = sorted(self.model.pinned, key=list(self.model.data).index)
        if not pinned:
            return
        run_id = pinned[which % len(pinned)]
        unpin(self.store, run_id)
        self.model.pinned.discard(run_id)

    @rule(keep=st.integers(1, 3), later=st.booleans(), crash=_CRASHES)
    def clean(self, keep: int, later: bool, crash: Crash | None) -> None:
        """Everything that may go at once; ``later``, leases of dead and of slow builds have ended."""
        if self.model.served is None:
            return
        now = datetime.now(UTC) + (timedelta(days=1) if later else timedelta(0))
        rules = CleanupRules(keep, None, timedelta(0))
        before = set(self.published())
        pointer = read_pointer(self.store).pointer
        assert pointer is not None
        # What a rollback has withdrawn is nothing to fall back to.
        good = before - set(pointer.withdrawn)
        try:
            with killed_at(crash):
                apply_cleanup(self.store, plan_cleanup(self.store, rules, now=now), now=now)
        except Killed:
            pass
        else:
            after = set(self.published())
            assert len(after) >= min(keep, len(good))
            if later:
                assert len(after) <= keep + len(self.model.pinned)
        assert set(self.published()) <= before
        assert self.held_now() == self.model.held

    # What must be true after each.

    @invariant()
    def what_is_served_is_whole_and_right(self) -> None:
        assert self.pointer() == self.model.served
        if self.model.served is None:
            return
        vectors = self.vectors[self.model.data[self.model.served]]
        with ShardedVectorReader(str(self.root / "store"), cache_dir=self.root / "reader-cache") as reader:
            assert reader.snapshot_info().run_id == self.model.served
            assert reader.snapshot_info().total_vectors == len(vectors)
            answers = reader.batch_search(vectors[:3], top_k=1, num_probes=2)
        assert [hit.id for answer in answers for hit in answer.results] == [0, 1, 2]

    @invariant()
    def what_can_be_asked_for_is_whole(self) -> None:
        found = self.published()
        assert self.model.pinned <= set(found), "a pinned snapshot is gone"
        for entry in history(self.store, limit=None):
            assert entry.run_id in self.model.data
            assert not check_whole(self.store, load_state(self.store, entry.manifest_key)).faults


_LONG = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    print_blob=True,
    report_multiple_bugs=False,
    # Shrinking takes many builds; a short run is read as easily as it is.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)


def test_any_order_of_operations_and_crashes_keeps_every_promise() -> None:
    run_state_machine_as_test(
        Lifecycle, settings=settings(_LONG, max_examples=6, stateful_step_count=12, derandomize=True)
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_any_order_of_operations_and_crashes_at_length() -> None:
    run_state_machine_as_test(Lifecycle, settings=_LONG)


# Bugs that the invariants must see, one in each operation.


def _publish_from_any_pointer(patch: pytest.MonkeyPatch) -> None:
    """A build publishes although somebody has moved the pointer since its scan."""
    real = publish.publish

    def careless(store: Store, **options: Any) -> Any:
        return real(store, **dict[str, Any](options, base_fingerprint=read_pointer(store).fingerprint))

    patch.setattr(publish, "publish", careless)


def _pointer_before_manifest(patch: pytest.MonkeyPatch) -> None:
    """The pointer moves before the manifest has its public name."""
    copy, confirm = publish._copy_manifest, publish._confirm
    waiting: dict[str, bytes] = {}

    def later(_: Store, key: str, manifest: bytes) -> bool:
        waiting[key] = manifest
        return True

    def late(store: Store, ours: Any, base: Any, **options: Any) -> Any:
        copy(store, options["key"], waiting[options["key"]])
        return confirm(store, ours, base, **options)

    patch.setattr(publish, "_copy_manifest", later)
    patch.setattr(publish, "_confirm", late)


def _rollback_holds_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rolling, "_holds", lambda *_: ())


def _release_releases_nothing(patch: pytest.MonkeyPatch) -> None:
    held = rolling._held
    patch.setattr(rolling, "_held", lambda holds: held(holds) if holds else {})


def _pins_are_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cleaning, "pinned_runs", lambda _: frozenset[str]())


def _cleanup_takes_shards_first(patch: pytest.MonkeyPatch) -> None:
    """A snapshot's objects go before its manifest: a crash in between leaves half of it in the history."""
    remove = cleaning._remove

    def reversed_steps(store: Store, group: Any, now: Any) -> Any:
        return remove(store, dataclasses.replace(group, steps=group.steps[::-1]), now)

    patch.setattr(cleaning, "_remove", reversed_steps)


Step = Callable[[Lifecycle], None]


def each_crash(step: Callable[..., None], most: int = 41) -> list[Step]:
    """The step once for each point at which it can be killed."""
    return [partial(step, crash=Crash(at, side)) for at in range(most) for side in ("before", "after")]


def walked(steps: Sequence[Step]) -> bool:
    """Takes the steps in this order; looks at what must be true after each."""
    machine = Lifecycle()
    try:
        for step in steps:
            step(machine)
            machine.what_is_served_is_whole_and_right()
            machine.what_can_be_asked_for_is_whole()
    finally:
        machine.teardown()
    return True


def _builds(*versions: int) -> list[Step]:
    return [partial(Lifecycle.build, version=version, force=False, crash=None) for version in versions]


def _rolled_back() -> list[Step]:
    return [*_builds(0, 1), partial(Lifecycle.roll_back, which=0, crash=None)]


# For each planted bug the walks that a random run takes at some time, and on one of which it shows.
WALKS: dict[Callable[[pytest.MonkeyPatch], None], list[list[Step]]] = {
    _publish_from_any_pointer: [
        [
            *_builds(0),
            partial(Lifecycle.another_process_begins, version=1),
            *_builds(2),
            partial(Lifecycle.another_process_ends, crash=None),
        ]
    ],
    _pointer_before_manifest: [
        [*_builds(0), crashing] for crashing in each_crash(partial(Lifecycle.build, version=1, force=False))[::-1]
    ],
    _rollback_holds_nothing: [_rolled_back()],
    _release_releases_nothing: [[*_rolled_back(), partial(Lifecycle.let_go, crash=None)]],
    _pins_are_not_looked_at: [
        [
            *_builds(0),
            partial(Lifecycle.pin_one, which=0, crash=None),
            *_builds(1, 2),
            partial(Lifecycle.clean, keep=1, later=False, crash=None),
        ]
    ],
    _cleanup_takes_shards_first: [
        [*_builds(0, 1), crashing] for crashing in each_crash(partial(Lifecycle.clean, keep=1, later=False), 12)
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("plant", WALKS)
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, SfPipelinesError)):
        all(map(walked, WALKS[plant]))


@pytest.mark.slow
@pytest.mark.parametrize("plant", WALKS)
def test_without_a_planted_bug_nothing_is_found(plant: Callable[[pytest.MonkeyPatch], None]) -> None:
    assert all(map(walked, WALKS[plant][:12]))
