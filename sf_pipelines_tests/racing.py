"""What tests of readers under concurrency share: snapshots that are told apart, held back openings, leaks."""

import asyncio
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines.snapshot.index.sqlite_vec import SqliteVecShard
from sf_pipelines.snapshot.manifest.models import Manifest
from sf_pipelines.snapshot.manifest.pointer import manifest_name
from sf_pipelines.snapshot.metric import DistanceMetric, Float32
from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.reader.core import ReaderCore, Serving
from sf_pipelines.snapshot.reader.reader import ReaderBase
from sf_pipelines.snapshot.reader.types import VectorSearchResponse
from sf_pipelines.snapshot.routing.hash import HashRouting
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.snapshots import brute_force, clustered, point_at, publish_by_hand

PATIENCE = 30.0  # seconds after which a test gives up: nothing here takes one
DIM, ROWS, K = 4, 24, 5
QUERIES = clustered(3, DIM, seed=99)
_STEP = 1000


class Turns:
    """Snapshots under one root, each with its own rows, and a pointer that moves between them.

    Row ``at`` of snapshot ``turn`` has the payload ``{"n": turn * 1000 + at}``. In a vector-only snapshot that is its
    id too; in a unified one the key is ``at`` and the value the same number as text.

    Args:
        root: of the snapshots.
        turns: how many.
        unified: with keys and values.
        backend: index library.
        shards: of each snapshot.
        options: see ``publish_by_hand``.
    """

    def __init__(
        self,
        root: Path,
        turns: int = 1,
        *,
        unified: bool = False,
        backend: str = "sqlite-vec",
        shards: int = 3,
        **options: Any,
    ) -> None:
        self.root = root
        self.unified = unified
        self.shards = shards
        self.store = Store.open(root, create=True)
        self.vectors: list[Float32] = [clustered(ROWS, DIM, centres=shards, seed=turn) for turn in range(turns)]
        self.manifests: list[Manifest] = []
        for turn, vectors in enumerate(self.vectors):
            numbers = [turn * _STEP + at for at in range(ROWS)]
            kind: dict[str, Any] = {"centroids": vectors[:shards]}
            if unified:
                values = [str(number).encode() for number in numbers]
                kind = {"routing": HashRouting(shards), "values": values, "key_encoding": "u64be"}
            fixed = {"metric": DistanceMetric.L2, "backend": backend, "ours": True, "num_probes": shards}
            self.manifests.append(
                publish_by_hand(
                    self.store,
                    list(range(ROWS)) if unified else numbers,
                    vectors,
                    payloads=[{"n": number} for number in numbers],
                    **(fixed | kind | options),
                )
            )
        self.move(0)

    def move(self, turn: int) -> None:
        """Points at a snapshot."""
        manifest = self.manifests[turn]
        point_at(self.store, manifest_name(manifest.run_id, manifest.created_at), manifest.run_id)

    def check(self, answers: Sequence[VectorSearchResponse], queries: Float32 = QUERIES, k: int = K) -> int:
        """Checks that answers are those of one snapshot, against brute force; returns which."""
        assert len(answers) == len(queries)
        turn = self._turn_of([hit.payload["n"] for answer in answers for hit in answer.results if hit.payload])
        truth, distances = brute_force(queries, self.vectors[turn], DistanceMetric.L2, k)
        for answer, places, scores in zip(answers, truth.tolist(), distances.tolist(), strict=True):
            numbers = [turn * _STEP + place for place in places]
            assert [hit.payload for hit in answer.results] == [{"n": number} for number in numbers]
            assert [hit.id for hit in answer.results] == (places if self.unified else numbers)
            assert [hit.score for hit in answer.results] == pytest.approx(scores, rel=1e-5)
        return turn

    def check_values(self, found: dict[Any, bytes | None]) -> int:
        """Checks that values are those of one snapshot; returns which."""
        assert None not in found.values()
        turn = self._turn_of([int(value) for value in found.values() if value is not None])
        assert found == {key: str(turn * _STEP + key).encode() for key in found}
        return turn

    def _turn_of(self, numbers: list[int]) -> int:
        (turn,) = {number // _STEP for number in numbers}
        return turn


class Checkouts:
    """Watches local copies being taken out, and holds some back.

    Attributes:
        taken: how often each shard of each run was taken out, by key of its directory.
        reached: set when one is held back.
        go: lets those go on.
        error: raised in place of a copy while it is set.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hold: Callable[[str], bool] = lambda _: False) -> None:
        self.taken: Counter[str] = Counter()
        self.reached = threading.Event()
        self.go = threading.Event()
        self.error: Exception | None = None
        checkout = ShardCache.checkout

        @contextmanager
        def watched(cache: ShardCache, store: Store, prefix: str, *more: Any) -> Iterator[Path]:
            self.taken[prefix] += 1
            if hold(prefix):
                self.reached.set()
                assert self.go.wait(PATIENCE)
            if self.error is not None:
                raise self.error
            with checkout(cache, store, prefix, *more) as folder:
                yield folder

        monkeypatch.setattr(ShardCache, "checkout", watched)


class HeldScans:
    """Holds back scans of shards of sqlite-vec.

    Attributes:
        reached: set when one is held back.
        go: lets those go on.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        scan = SqliteVecShard.scan

        def held(shard: SqliteVecShard) -> Any:
            self.reached.set()
            assert self.go.wait(PATIENCE)
            return scan(shard)

        monkeypatch.setattr(SqliteVecShard, "scan", held)


class Servings:
    """Watches all snapshots that readers serve, from their first moment on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Serving] = []
        make = ReaderCore._make

        def watched(core: ReaderCore, *arguments: Any) -> Serving:
            serving = make(core, *arguments)
            self.made.append(serving)
            return serving

        monkeypatch.setattr(ReaderCore, "_make", watched)

    def check_closed(self, but: int = 0) -> None:
        """Checks that nobody uses any, and that all but the last so many are closed."""
        for at, serving in enumerate(self.made):
            check_idle(serving)
            if at < len(self.made) - but:
                assert serving.shards.open_shards == []


def serving_of(reader: ReaderBase) -> Serving:
    """What a reader serves."""
    return reader._core.served


def users_of(serving: Serving) -> list[int]:
    """Users of the snapshot and of each open shard."""
    return [serving.users, *(shard.users for shard in serving.shards._open.values())]


def check_idle(serving: Serving) -> None:
    """Checks that everything that was borrowed comes back."""
    eventually(lambda: not any(users_of(serving)) and not serving.shards._waiting)


def eventually(holds: Callable[[], bool]) -> None:
    """Waits until something holds that another thread is about to do."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.002)


def open_files(folder: Path) -> int:
    """Files below a folder that this process has open."""
    found = 0
    for name in Path("/proc/self/fd").iterdir():
        try:
            found += name.readlink().is_relative_to(folder)
        except FileNotFoundError:
            continue  # closed meanwhile
    return found


@contextmanager
def no_leaks(folder: Path) -> Iterator[None]:
    """Checks that a block leaves no open file below the folder and no thread of a reader behind."""

    def left() -> list[str]:
        gc.collect()
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("sf-pipelines")]

    before = left()
    yield
    eventually(lambda: len(left()) <= len(before))
    eventually(lambda: open_files(folder) == 0)


def run_threads(works: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs all at the same moment, each in a thread; their results, or the first error. Never hangs."""
    start = threading.Barrier(len(works))
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []

    def run(at: int) -> None:
        try:
            start.wait(PATIENCE)
            results[at] = works[at]()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(at,), daemon=True) for at in range(len(works))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return results


def calls_on(reader: Any, turns: Turns) -> list[Callable[[], int]]:
    """Calls of a blocking reader that say which snapshot they saw."""
    calls: list[Callable[[], int]] = [
        lambda: turns.check(reader.batch_search(QUERIES, K)),
        lambda: turns.check([reader.search(QUERIES[0], K)], QUERIES[:1]),
    ]
    if turns.unified:
        calls += [
            lambda: turns.check_values(reader.multi_get(range(ROWS))),
            lambda: turns.check_values({7: reader.get(7)}),
        ]
    return calls


async def call_async(reader: Any, turns: Turns) -> set[int]:
    """All calls of an async reader at once; the snapshots that they saw."""
    batch, single = await asyncio.gather(reader.batch_search(QUERIES, K), reader.search(QUERIES[0], K))
    seen = {turns.check(batch), turns.check([single], QUERIES[:1])}
    if turns.unified:
        found, value = await asyncio.gather(reader.multi_get(range(ROWS)), reader.get(7))
        seen |= {turns.check_values(found), turns.check_values({7: value})}
    return seen
