"""Publishing on real stores: one winner, whoever races; and what became of a write whose answer got lost."""

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import stamina
from obstore.exceptions import GenericError

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import (
    IntegrityError,
    ManifestError,
    PublishConflictError,
    StoreUnavailableError,
    WriteUncertainError,
)
from sf_pipelines.snapshot.manifest.codec import decode_manifest, encode_manifest
from sf_pipelines.snapshot.manifest.pointer import CURRENT, Pointer, manifest_key, manifest_name
from sf_pipelines.snapshot.manifest.publish import PointerView, history, publish, read_pointer
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.unit.manifest_samples import CREATED, sample_manifest

STOCK_NAME = "manifests/2026-11-21T00:00:00.000000Z_run_id=stock/manifest"


@dataclass(frozen=True)
class Place:
    """Where a store is, so that another process can open it."""

    location: str
    s3: S3Options | None

    def open(self) -> Store:
        return Store.open(self.location, self.s3, create=self.s3 is None)


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "disk":
        return Place(str(tmp_path / "root"), None)
    bucket: str = request.getfixturevalue("bucket")
    return Place(f"s3://{bucket}/products", request.getfixturevalue("moto_options"))


@pytest.fixture
def store(place: Place) -> Store:
    return place.open()


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    with stamina.set_testing(True, attempts=3):
        yield


def send(store: Store, run_id: str, base: str | None = None, minutes: int = 0) -> tuple[Pointer, PointerView]:
    created_at = CREATED + timedelta(minutes=minutes)
    manifest = sample_manifest(run_id, store.url, created_at=created_at)
    return publish(
        store,
        manifest=encode_manifest(manifest),
        run_id=run_id,
        created_at=created_at,
        build_key="bk",
        gate_key="gk",
        base_fingerprint=base,
    )


def fingerprint(store: Store) -> str | None:
    return read_pointer(store).fingerprint


def listed(store: Store) -> list[str]:
    return [entry.run_id for entry in history(store)]


# One publisher.


def test_first_and_second(store: Store) -> None:
    assert read_pointer(store) == PointerView(None, None)
    assert (history(store), fingerprint(store)) == ([], None)
    first, before = send(store, "r1")
    assert before == PointerView(None, None)
    assert (first.seq, first.previous, first.build_key, first.gate_key) == (1, None, "bk", "gk")
    view = read_pointer(store)
    assert view.pointer == first
    assert view.version is not None
    assert view.fingerprint == hashlib.sha256(view.version.data).hexdigest()

    second, before = send(store, "r2", view.fingerprint, minutes=1)
    assert before.pointer == first
    assert (second.seq, second.run_id) == (2, "r2")
    assert second.previous is not None
    assert (second.previous.run_id, second.previous.write_id) == ("r1", first.write_id)
    assert second.manifest_ref == store.url_of(manifest_key(second))
    data = store.get(manifest_key(second))
    assert second.manifest_digest == hashlib.sha256(data).hexdigest()
    assert decode_manifest(data, where="here").run_id == "r2"
    assert [(entry.run_id, entry.is_current) for entry in history(store)] == [("r2", True), ("r1", False)]
    assert history(store)[0].published_at == CREATED + timedelta(minutes=1)


def test_content_types(bucket: str, moto_options: S3Options) -> None:
    store = Store.open(f"s3://{bucket}/p", moto_options)
    pointer, _ = send(store, "r1")
    types = {key: store._backend.get(key).attributes["Content-Type"] for key in (CURRENT, manifest_key(pointer))}
    assert types == {CURRENT: "application/json", manifest_key(pointer): "application/x-sqlite3"}


def test_history_lists_only_names_of_the_format(store: Store) -> None:
    for number in range(12):
        name = manifest_name(f"r{number:02d}", CREATED + timedelta(hours=number))
        store.put(name, b"m")
    for key in (
        "manifests/latest/manifest",
        "manifests/2026-11-22T12:00:00Z_run_id=x/manifest",
        "manifests/2026-99-22T12:00:00.000000Z_run_id=x/manifest",
        "manifests/2026-11-23T12:00:00.000000Z_run_id=x/other",
        "manifests/2026-11-23T12:00:00.000000Z_run_id=x/y/manifest",
        "manifests-old/2026-11-23T12:00:00.000000Z_run_id=x/manifest",
    ):
        store.put(key, b"m")
    assert listed(store) == [f"r{number:02d}" for number in range(11, 1, -1)]
    assert len(history(store, limit=None)) == 12
    assert [entry.run_id for entry in history(store, limit=1)] == ["r11"]


def test_history_without_an_understandable_pointer(store: Store) -> None:
    send(store, "r1")
    store.put(CURRENT, b"{")
    assert [(entry.run_id, entry.is_current) for entry in history(store)] == [("r1", False)]
    with pytest.raises(ManifestError, match="_CURRENT"):
        send(store, "r2")


def test_again(store: Store) -> None:
    """A publisher that does not know that it had finished."""
    first, _ = send(store, "r1")
    data = store.get(CURRENT)
    again, found = send(store, "r1")
    assert again == first
    assert found.pointer == first
    assert store.get(CURRENT) == data


def test_again_after_a_crash_between_copy_and_swap(store: Store) -> None:
    send(store, "r0")
    base = fingerprint(store)
    created_at = CREATED + timedelta(minutes=1)
    data = encode_manifest(sample_manifest("r1", store.url, created_at=created_at))
    store.put(manifest_name("r1", created_at), data)
    pointer, _ = send(store, "r1", base, minutes=1)
    assert read_pointer(store).pointer == pointer
    assert listed(store) == ["r1", "r0"]


def test_other_bytes_under_the_public_name(store: Store) -> None:
    store.put(manifest_name("r1", CREATED), b"something else")
    with pytest.raises(IntegrityError, match="holds a manifest other than"):
        send(store, "r1")
    assert read_pointer(store).pointer is None
    assert store.get(manifest_name("r1", CREATED)) == b"something else"


def test_wrong_manifest(store: Store) -> None:
    arguments: dict[str, Any] = {"created_at": CREATED, "build_key": "b", "gate_key": "g", "base_fingerprint": None}
    with pytest.raises(ManifestError, match="run 'r2' is that of run 'r1'"):
        publish(store, manifest=encode_manifest(sample_manifest("r1", store.url)), run_id="r2", **arguments)
    with pytest.raises(ManifestError, match="to be published for run r2"):
        publish(store, manifest=b"nonsense", run_id="r2", **arguments)
    assert list(store.objects()) == []


# Somebody else was first.


def test_pointer_moved_since_the_scan(store: Store) -> None:
    send(store, "r1")
    with pytest.raises(PublishConflictError, match=r"'r1'.*'r2'") as caught:
        send(store, "r2", None, minutes=1)
    assert (caught.value.ours, caught.value.theirs) == ("r2", "r1")
    assert listed(store) == ["r1"]


def test_pointer_gone_since_the_scan(store: Store) -> None:
    send(store, "r1")
    base = fingerprint(store)
    store.delete(CURRENT)
    with pytest.raises(PublishConflictError, match="is gone") as caught:
        send(store, "r2", base, minutes=1)
    assert caught.value.theirs is None
    assert listed(store) == ["r1"]


def stock_pointer(store: Store, **changes: Any) -> Pointer:
    fields: dict[str, Any] = {"manifest_ref": store.url_of(STOCK_NAME), "run_id": "stock", "updated_at": CREATED}
    return Pointer(**fields | changes)


def test_on_top_of_a_stock_pointer(store: Store) -> None:
    """A pointer that does not count: counting starts anew."""
    store.put(CURRENT, stock_pointer(store).encode())
    assert read_pointer(store).seq is None
    pointer, before = send(store, "r1", fingerprint(store))
    assert pointer.seq == 1
    assert before.pointer == stock_pointer(store)
    assert pointer.previous is not None
    assert (pointer.previous.run_id, pointer.previous.write_id) == ("stock", None)


def interposed(store: Store, act: Callable[[Store], object], *, fails: bool = False) -> Store:
    """Something happens right before the pointer is swapped."""

    class Interposed(Store):
        def swap(self, key: str, data: bytes, *args: Any, **kwargs: Any) -> bool:
            if key == "_CURRENT":
                act(store)
            return super().swap(key, data, *args, **kwargs)

    return Interposed(store.url, store._backend, store.local_root)


def test_loser_at_the_swap_takes_its_name_back(store: Store) -> None:
    with pytest.raises(PublishConflictError) as caught:
        send(interposed(store, lambda real: send(real, "winner")), "loser", minutes=1)
    assert (caught.value.ours, caught.value.theirs) == ("loser", "winner")
    assert listed(store) == ["winner"]
    winner = read_pointer(store).pointer
    assert winner is not None
    assert winner.seq == 1


def test_loser_leaves_a_name_that_was_there_before(store: Store) -> None:
    """Published earlier and rolled back from: the name is part of the history, whoever wins now."""
    send(store, "old")
    send(store, "bad", fingerprint(store), minutes=1)
    base = fingerprint(store)
    with pytest.raises(PublishConflictError):
        send(interposed(store, lambda real: send(real, "winner", base, minutes=2)), "old", base)
    assert listed(store) == ["winner", "bad", "old"]


def test_same_manifest_from_two_processes_at_once(store: Store) -> None:
    winners: list[Pointer] = []
    pointer, _ = send(interposed(store, lambda real: winners.append(send(real, "r1")[0])), "r1")
    assert [pointer] == winners
    assert listed(store) == ["r1"]


def test_a_name_that_a_twin_published_meanwhile_stays(store: Store) -> None:
    """Our twin published the same manifest and was superseded before we came to the swap."""

    def twin_and_next(real: Store) -> None:
        send(real, "r1")
        send(real, "next", fingerprint(real), minutes=1)

    with pytest.raises(PublishConflictError) as caught:
        send(interposed(store, twin_and_next), "r1")
    assert caught.value.theirs == "next"
    assert listed(store) == ["next", "r1"]


@pytest.mark.parametrize("base_runs", [(), ("r0",)])
def test_a_stock_writer_in_between(store: Store, base_runs: tuple[str, ...]) -> None:
    """It compares nothing; whether somebody published our manifest before it cannot be known: the name stays."""
    for run_id in base_runs:
        send(store, run_id)
    base = fingerprint(store)
    stock = stock_pointer(store).encode()
    with pytest.raises(PublishConflictError) as caught:
        send(interposed(store, lambda real: real.put(CURRENT, stock)), "r1", base, minutes=1)
    assert caught.value.theirs == "stock"
    assert store.get(CURRENT) == stock
    assert listed(store) == ["r1", *base_runs]


def test_counting_that_began_anew_twice(store: Store) -> None:
    """From a stock pointer, our twin published; a stock writer and a winner came after: again number one."""
    other = stock_pointer(store, manifest_ref=store.url_of(STOCK_NAME.replace("stock", "stock2")), run_id="stock2")
    store.put(CURRENT, stock_pointer(store).encode())
    base = fingerprint(store)

    def twin_stock_and_winner(real: Store) -> None:
        send(real, "r1", base)
        real.put(CURRENT, other.encode())
        send(real, "winner", fingerprint(real), minutes=1)

    with pytest.raises(PublishConflictError) as caught:
        send(interposed(store, twin_stock_and_winner), "r1", base)
    assert caught.value.theirs == "winner"
    assert read_pointer(store).seq == 1
    assert listed(store) == ["winner", "r1"]


# Races.


def race_once(place: Place, run_id: str, base: str | None, minutes: int) -> str:
    """``won``, or all that the loser was told."""
    try:
        send(place.open(), run_id, base, minutes)
    except PublishConflictError as error:
        told = f"{error.ours} lost to {error.theirs}"
        return told if error.ours in str(error) and str(error.theirs) in str(error) else str(error)
    return "won"


def race_in_thread(place: Place, run_id: str, base: str | None, minutes: int, start: Barrier) -> str:
    start.wait(timeout=30)
    return race_once(place, run_id, base, minutes)


def check_race(place: Place, results: dict[str, str], seq: int) -> None:
    winners = [run_id for run_id, result in results.items() if result == "won"]
    assert len(winners) == 1, results
    losers = {run_id: result for run_id, result in results.items() if result != "won"}
    assert losers == {run_id: f"{run_id} lost to {winners[0]}" for run_id in losers}
    store = place.open()
    pointer = read_pointer(store).pointer
    assert pointer is not None
    assert (pointer.run_id, pointer.seq) == (winners[0], seq)
    ours = [run_id for run_id in listed(store) if run_id in results]
    assert ours == winners


@pytest.mark.slow
def test_race_of_threads(place: Place) -> None:
    racers = 8
    with ThreadPoolExecutor(racers) as pool:
        for number in range(4):
            base, start = fingerprint(place.open()), Barrier(racers)
            names = [f"round{number}-{racer}" for racer in range(racers)]
            futures = {
                name: pool.submit(race_in_thread, place, name, base, number * 10 + racer, start)
                for racer, name in enumerate(names)
            }
            check_race(place, {name: future.result() for name, future in futures.items()}, number + 1)


@pytest.mark.slow
def test_race_of_processes(place: Place) -> None:
    racers = 4
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(racers, mp_context=spawn) as pool:
        # All workers are up before the first race.
        assert list(pool.map(abs, range(racers * 4))) == list(range(racers * 4))
        for number in range(4):
            base = fingerprint(place.open())
            names = [f"round{number}-{racer}" for racer in range(racers)]
            futures = {
                name: pool.submit(race_once, place, name, base, number * 10 + racer) for racer, name in enumerate(names)
            }
            check_race(place, {name: future.result() for name, future in futures.items()}, number + 1)


# Lost answers. Local disk has none: its swap is a rename under a lock.


class Faulty:
    """A backend whose writes of the pointer go wrong."""

    def __init__(self, backend: Any, put: Callable[[Callable[[], Any]], Any]) -> None:
        self._backend = backend
        self._put = put
        self.blind = False
        self.puts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def put(self, key: str, data: Any, **options: Any) -> Any:
        if key != CURRENT:
            return self._backend.put(key, data, **options)
        self.puts += 1
        return self._put(lambda: self._backend.put(key, data, **options))

    def get(self, key: str, **options: Any) -> Any:
        if self.blind and key == CURRENT:
            raise GenericError("connection refused")
        return self._backend.get(key, **options)


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest) -> Store:
    if request.param == "memory":
        return Store.open(f"memory://{request.node.name}")
    bucket: str = request.getfixturevalue("bucket")
    return Store.open(f"s3://{bucket}/products", request.getfixturevalue("moto_options"))


def faulty(store: Store, put: Callable[[Callable[[], Any]], Any]) -> tuple[Store, Faulty]:
    backend = Faulty(store._backend, put)
    return Store(store.url, backend), backend  # pyright: ignore[reportArgumentType]


def lost(*_: object) -> None:
    raise GenericError("connection reset by peer")


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("base_runs", [(), ("r0",)])
def test_applied_but_unanswered_is_ours(remote: Store, base_runs: tuple[str, ...]) -> None:
    for run_id in base_runs:
        send(remote, run_id)
    store, backend = faulty(remote, lambda put: lost(put()))
    pointer, _ = send(store, "r1", fingerprint(remote), minutes=1)
    assert backend.puts == 1
    assert read_pointer(remote).pointer == pointer
    assert listed(remote) == ["r1", *base_runs]


@pytest.mark.usefixtures("_no_waiting")
def test_applied_unanswered_and_superseded_is_ours(remote: Store) -> None:
    def put_then_lose_then_next(put: Callable[[], Any]) -> None:
        put()
        send(remote, "r2", fingerprint(remote), minutes=2)
        lost()

    store, _ = faulty(remote, put_then_lose_then_next)
    pointer, _ = send(store, "r1", minutes=1)
    assert (pointer.run_id, pointer.seq) == ("r1", 1)
    now = read_pointer(remote).pointer
    assert now is not None
    assert (now.run_id, now.seq) == ("r2", 2)
    assert listed(remote) == ["r2", "r1"]


@pytest.mark.usefixtures("_no_waiting")
def test_not_applied_and_taken_is_theirs(remote: Store) -> None:
    def lose_then_theirs(put: Callable[[], Any]) -> None:
        send(remote, "r2", fingerprint(remote), minutes=2)
        lost()

    store, _ = faulty(remote, lose_then_theirs)
    with pytest.raises(PublishConflictError) as caught:
        send(store, "r1", minutes=1)
    assert (caught.value.ours, caught.value.theirs) == ("r1", "r2")
    assert listed(remote) == ["r2"]


@pytest.mark.usefixtures("_no_waiting")
def test_not_applied_is_tried_again(remote: Store) -> None:
    failures = iter([lost])

    def put_second_time(put: Callable[[], Any]) -> Any:
        return next(failures, put)()

    store, backend = faulty(remote, put_second_time)
    pointer, _ = send(store, "r1")
    assert backend.puts == 2
    assert read_pointer(remote).pointer == pointer


@pytest.mark.usefixtures("_no_waiting")
def test_never_applied_is_an_error_and_can_be_repeated(remote: Store) -> None:
    send(remote, "r0")
    base = fingerprint(remote)
    store, backend = faulty(remote, lost)
    with pytest.raises(StoreUnavailableError, match="connection reset"):
        send(store, "r1", base, minutes=1)
    assert backend.puts == 3
    assert fingerprint(remote) == base
    pointer, _ = send(remote, "r1", base, minutes=1)
    assert pointer.seq == 2


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("applied", [True, False])
def test_unknown_is_an_error_and_can_be_repeated(remote: Store, applied: bool) -> None:
    def put_then_go_dark(put: Callable[[], Any]) -> None:
        if applied and not backend.blind:
            put()
        backend.blind = True
        lost()

    store, backend = faulty(remote, put_then_go_dark)
    with pytest.raises(WriteUncertainError, match="so did reading it back"):
        send(store, "r1")
    # Whatever became of it, the manifest is still there and publishing again settles it.
    assert listed(remote) == ["r1"]
    pointer, _ = send(remote, "r1")
    assert read_pointer(remote).pointer == pointer
    assert (pointer.run_id, pointer.seq) == ("r1", 1)


@pytest.mark.usefixtures("_no_waiting")
def test_overwritten_by_a_writer_that_compares_nothing(remote: Store) -> None:
    """Applied and answered, and gone a moment later: the read-back notices, and the name stays."""
    stock = stock_pointer(remote).encode()

    def put_then_stock(put: Callable[[], Any]) -> Any:
        answer = put()
        remote.put(CURRENT, stock)
        return answer

    store, _ = faulty(remote, put_then_stock)
    with pytest.raises(PublishConflictError) as caught:
        send(store, "r1")
    assert caught.value.theirs == "stock"
    assert listed(remote) == ["r1"]


def test_superseded_twice_before_the_read_back(remote: Store) -> None:
    def put_then_two_more(put: Callable[[], Any]) -> Any:
        answer = put()
        for number in (2, 3):
            send(remote, f"r{number}", fingerprint(remote), minutes=number)
        return answer

    store, _ = faulty(remote, put_then_two_more)
    pointer, _ = send(store, "r1")
    assert (pointer.run_id, pointer.seq) == ("r1", 1)
    assert listed(remote) == ["r3", "r2", "r1"]


def test_updated_at_is_now(store: Store) -> None:
    before = datetime.now(UTC)
    pointer, _ = send(store, "r1")
    assert before <= pointer.updated_at <= datetime.now(UTC)
