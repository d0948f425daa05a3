"""A store that hangs on one shard: deadlines, partial answers, and everybody else."""

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import (
    DeadlineError,
    DigestMismatchError,
    IntegrityError,
    QueryError,
    ReaderClosedError,
    ReaderForkedError,
    SfPipelinesError,
    StoreUnavailableError,
)
from sf_pipelines.snapshot.index.sqlite_vec import SqliteVecShard
from sf_pipelines.snapshot.manifest.models import Manifest
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.reader.shards import OpenShard
from sf_pipelines.snapshot.routing.explicit import ExplicitRouting
from sf_pipelines.snapshot.routing.hash import HashRouting
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.conftest import make_bucket
from sf_pipelines_tests.faces import Face, unified_reader, vector_reader
from sf_pipelines_tests.flaky import Fault, FlakyServer
from sf_pipelines_tests.snapshots import brute_force, clustered, publish_by_hand

DIM, SHARDS, BAD = 8, 4, 2
VECTORS = clustered(80, DIM)
QUERIES = clustered(5, DIM, seed=9)
HOMES = (np.arange(len(VECTORS)) % SHARDS).astype(np.int32)
EVERY = list(range(SHARDS))


@pytest.fixture(scope="module")
def served(moto_options: S3Options) -> tuple[str, Manifest]:
    bucket = f"deadlines-{uuid.uuid4().hex[:12]}"
    make_bucket(moto_options, bucket)
    root = f"s3://{bucket}/root"
    manifest = publish_by_hand(
        Store.open(root, moto_options),
        list(range(len(VECTORS))),
        VECTORS,
        routing=ExplicitRouting(SHARDS),
        shard_of=HOMES,
        metric=DistanceMetric.L2,
        backend="sqlite-vec",
        ours=True,
    )
    return root, manifest


@pytest.fixture
def patient(flaky: FlakyServer) -> S3Options:
    """Waits longer than any test."""
    return flaky.options.model_copy(update={"timeout": 25.0})


@contextmanager
def failing(flaky: FlakyServer, manifest: Manifest, fault: Fault, *shards: int) -> Iterator[None]:
    numbers = "|".join(f"{shard:05d}" for shard in shards)
    with flaky.failing(f"run_id={manifest.run_id}/db=({numbers})/", fault):
        yield


def nearest(query: Any, k: int, shards: list[int]) -> list[int]:
    """Ids of the true neighbours among the rows of some shards."""
    members = np.flatnonzero(np.isin(HOMES, shards))
    return members[brute_force(query[None], VECTORS[members], DistanceMetric.L2, k)[0][0]].tolist()


def ids(response: Any) -> list[int]:
    return [hit.id for hit in response.results]


def test_a_late_shard_is_named_in_time_and_served_when_the_store_is_back(
    flaky: FlakyServer, patient: S3Options, served: tuple[str, Manifest], tmp_path: Path, face: Face
) -> None:
    root, manifest = served
    with vector_reader(face, root, s3=patient, cache_dir=tmp_path) as reader:
        with failing(flaky, manifest, "hang", BAD):
            for _ in range(2):
                started = time.monotonic()
                with pytest.raises(DeadlineError, match=rf"shard {BAD} .* 0\.3 s"):
                    reader.search(QUERIES[0], 5, shard_ids=EVERY, timeout=0.3)
                assert 0.3 <= time.monotonic() - started < 5
            assert ids(reader.search(QUERIES[0], 5, shard_ids=[0, 1, 3])) == nearest(QUERIES[0], 5, [0, 1, 3])
        assert ids(reader.search(QUERIES[0], 5, shard_ids=EVERY, timeout=20)) == nearest(QUERIES[0], 5, EVERY)


def test_twenty_callers_wait_for_one_shard_and_nobody_else_does(
    flaky: FlakyServer, patient: S3Options, served: tuple[str, Manifest], tmp_path: Path, face: Face
) -> None:
    root, manifest = served
    waiting: list[Any] = []
    with (
        vector_reader(face, root, s3=patient, cache_dir=tmp_path, max_concurrency=2) as reader,
        ThreadPoolExecutor(20) as callers,
    ):
        with failing(flaky, manifest, "hang", BAD):
            waiting += [callers.submit(reader.search, QUERIES[0], 5, shard_ids=[BAD, 0]) for _ in range(20)]
            deadline = time.monotonic() + 10
            while len(reader._core.served.shards._waiting.get(BAD, ())) < 20 and time.monotonic() < deadline:
                time.sleep(0.01)
            for shard in (0, 1, 3):
                for query in QUERIES:
                    # 1 and 3 are opened now, beside the one that hangs.
                    assert ids(reader.search(query, 5, shard_ids=[shard], timeout=15)) == nearest(query, 5, [shard])
            assert not any(future.done() for future in waiting)
        for future in waiting:
            assert ids(future.result(15)) == nearest(QUERIES[0], 5, [BAD, 0])
        assert ids(reader.search(QUERIES[0], 5, shard_ids=EVERY)) == nearest(QUERIES[0], 5, EVERY)
        assert not reader._core.served.shards._waiting


@pytest.mark.parametrize(
    ("fault", "in_memory"), [("hang", True), ("hang", False), (503, True), ("garble", True)], ids=str
)
def test_partial_answers_leave_out_what_failed(
    flaky: FlakyServer,
    patient: S3Options,
    served: tuple[str, Manifest],
    tmp_path: Path,
    face: Face,
    fault: Fault,
    in_memory: bool,
) -> None:
    kind = {"hang": DeadlineError, 503: StoreUnavailableError, "garble": DigestMismatchError}[fault]
    root, manifest = served
    timeout = 20.0 if fault != "hang" else 1.0 if in_memory else 3.0
    with vector_reader(face, root, s3=patient, cache_dir=tmp_path, exact_scan=in_memory) as reader:
        reader.search(QUERIES[0], 5, shard_ids=[0, 1, 3])
        with failing(flaky, manifest, fault, BAD):
            found = reader.search(QUERIES[0], 5, shard_ids=EVERY, timeout=timeout, partial=True)
            assert ids(found) == nearest(QUERIES[0], 5, [0, 1, 3])
            assert (found.shard_ids, found.missing_shards, found.num_shards_queried) == (EVERY, [BAD], SHARDS)
            assert isinstance(found.errors[BAD], kind)
            assert found.shortfall is None
            wide = reader.search(QUERIES[0], 100, shard_ids=EVERY, timeout=timeout, partial=True)
            assert len(wide.results) == 60
            assert wide.shortfall == f"60 of 100 results: shards {BAD} did not answer"
        whole = reader.search(QUERIES[0], 5, shard_ids=EVERY, partial=True)
        assert (ids(whole), whole.missing_shards, whole.errors) == (nearest(QUERIES[0], 5, EVERY), [], {})


def test_all_shards_missing_is_an_empty_answer_only_when_partial(
    flaky: FlakyServer, patient: S3Options, served: tuple[str, Manifest], tmp_path: Path, face: Face
) -> None:
    root, manifest = served
    with (
        vector_reader(face, root, s3=patient, cache_dir=tmp_path) as reader,
        failing(flaky, manifest, 503, *EVERY),
    ):
        for found in reader.batch_search(QUERIES, 3, shard_ids=EVERY, partial=True):
            assert (found.results, found.missing_shards, sorted(found.errors)) == ([], EVERY, EVERY)
            assert found.shortfall == "0 of 3 results: shards 0, 1, 2, 3 did not answer"
        with pytest.raises(StoreUnavailableError):
            reader.search(QUERIES[0], 3, shard_ids=EVERY)


def test_keys_have_deadlines_too(
    flaky: FlakyServer, patient: S3Options, moto_options: S3Options, bucket: str, tmp_path: Path, face: Face
) -> None:
    keys = list(range(len(VECTORS)))
    root = f"s3://{bucket}/keys"
    manifest = publish_by_hand(
        Store.open(root, moto_options),
        keys,
        VECTORS,
        routing=HashRouting(SHARDS),
        values=[b"v"] * len(keys),
        key_encoding="u64be",
        metric=DistanceMetric.L2,
        backend="sqlite-vec",
        ours=True,
    )
    with unified_reader(face, root, s3=patient, cache_dir=tmp_path) as reader:
        others = [key for key in keys if reader.route_key(key) != BAD]
        hung = next(key for key in keys if key not in others)
        with failing(flaky, manifest, "hang", BAD):
            with pytest.raises(DeadlineError, match=f"shard {BAD} "):
                reader.get(hung, timeout=0.2)
            with pytest.raises(DeadlineError, match=f"shard {BAD} "):
                reader.multi_get(keys, timeout=0.2)
            assert len(reader.multi_get(others, timeout=20)) == len(others)
        assert reader.get(hung, timeout=20) == b"v"


# Without the store: what happens inside of a shard.


@pytest.fixture
def local(tmp_path: Path) -> Path:
    root = tmp_path / "store"
    centroids = clustered(SHARDS, DIM)
    publish_by_hand(
        Store.open(root, create=True), list(range(80)), VECTORS, centroids=centroids, backend="sqlite-vec", ours=True
    )
    return root


def test_a_batch_lacks_the_shard_only_where_it_was_asked(
    local: Path, tmp_path: Path, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, queries = SqliteVecShard.payloads, VECTORS[:30]
    with vector_reader(face, local, cache_dir=tmp_path / "cache") as reader:
        plain = reader.batch_search(queries, 3, num_probes=2)
        bad = plain[0].shard_ids[0]
        size = reader.shard_details()[bad].vector_count

        def payloads(self: SqliteVecShard, rows: Any) -> Any:
            if self.rows == size:
                raise IntegrityError("the payloads are gone")
            return whole(self, rows)

        monkeypatch.setattr(SqliteVecShard, "payloads", payloads)
        with pytest.raises(IntegrityError, match="the payloads are gone"):
            reader.batch_search(queries, 3, num_probes=2)
        found = reader.batch_search(queries, 3, num_probes=2, partial=True)
        asked = [bad in answer.shard_ids for answer in plain]
        assert any(asked)
        assert not all(asked)
        for before, answer, query in zip(plain, found, queries, strict=True):
            assert answer.shard_ids == before.shard_ids
            if bad not in answer.shard_ids:
                assert (ids(answer), answer.errors) == (ids(before), {})
                continue
            assert answer.missing_shards == [bad]
            rest = [shard for shard in answer.shard_ids if shard != bad]
            alone = reader.search(query, 3, shard_ids=rest)
            assert ids(answer) == ids(alone)
            assert [hit.payload for hit in answer.results] == [{"n": hit.id} for hit in answer.results]


@pytest.mark.parametrize("kind", [QueryError, ReaderClosedError, ReaderForkedError])
def test_partial_does_not_hide_what_is_wrong_with_the_call_or_the_reader(
    local: Path, tmp_path: Path, face: Face, kind: type[SfPipelinesError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: OpenShard) -> Any:
        raise kind("told to fail")

    with vector_reader(face, local, cache_dir=tmp_path / "cache") as reader:
        with pytest.raises(QueryError, match="top_k"):
            reader.search(QUERIES[0], 0, partial=True)
        with pytest.raises(QueryError, match="query"):
            reader.search(QUERIES[0][:3], 1, partial=True)
        monkeypatch.setattr(OpenShard, "_open_index", fails)
        with pytest.raises(kind, match="told to fail"):
            reader.search(QUERIES[0], 5, num_probes=SHARDS, partial=True)
        reader.close()
        with pytest.raises(ReaderClosedError):
            reader.search(QUERIES[0], 5, partial=True)


def test_why_there_are_fewer_results(local: Path, tmp_path: Path, face: Face) -> None:
    with vector_reader(face, local, cache_dir=tmp_path / "cache") as reader:
        rows = reader.shard_details()[1].vector_count
        found = reader.search(QUERIES[0], 500, shard_ids=[1])
        assert len(found.results) == rows
        assert (
            found.shortfall == f"{rows} of 500 results: the 1 shards that were asked hold {rows} rows; ask more shards"
        )
        found = reader.search(QUERIES[0], 500, num_probes=SHARDS)
        assert found.shortfall == f"80 of 500 results: the {SHARDS} shards that were asked hold 80 rows"
        assert reader.search(QUERIES[0], 80, num_probes=SHARDS).shortfall is None


def test_a_deadline_that_passed_before_the_search_is_one(local: Path, tmp_path: Path, face: Face) -> None:
    with vector_reader(face, local, cache_dir=tmp_path / "cache", preload=True) as reader:
        with pytest.raises(DeadlineError):
            reader.search(QUERIES[0], 5, timeout=1e-9)
        found = reader.search(QUERIES[0], 5, num_probes=2, timeout=1e-9, partial=True)
        assert (len(found.errors), found.results) == (2, [])
        # They were let go: nothing keeps them open.
        assert {shard.users for shard in reader._core.served.shards._open.values()} == {0}
        for wrong in (0, -1, True, "1", float("nan")):
            with pytest.raises(QueryError, match="timeout"):
                reader.search(QUERIES[0], 5, timeout=wrong)


def test_callers_in_threads_get_their_own_deadlines(
    local: Path, tmp_path: Path, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, gate = OpenShard._open_index, threading.Event()

    def slow(self: OpenShard) -> Any:
        gate.wait(20)
        return whole(self)

    monkeypatch.setattr(OpenShard, "_open_index", slow)
    with vector_reader(face, local, cache_dir=tmp_path / "cache") as reader, ThreadPoolExecutor(2) as callers:
        soon = callers.submit(reader.search, QUERIES[0], 3, timeout=0.2)
        late = callers.submit(reader.search, QUERIES[0], 3, timeout=20)
        assert isinstance(soon.exception(10), DeadlineError)
        assert not late.done()
        gate.set()
        assert len(late.result(10).results) == 3
