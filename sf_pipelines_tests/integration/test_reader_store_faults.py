"""Readers of a store that fails: while opening, refreshing, and opening shards."""

import hashlib
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from obstore.exceptions import PreconditionError

from sf_pipelines.snapshot import store as store_module
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import (
    DigestMismatchError,
    IntegrityError,
    ObjectMissingError,
    SfPipelinesError,
    StoreDeniedError,
    StoreUnavailableError,
)
from sf_pipelines.snapshot.manifest.codec import encode_manifest
from sf_pipelines.snapshot.manifest.models import Manifest
from sf_pipelines.snapshot.manifest.pointer import manifest_name
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.routing.cluster import ClusterRouting
from sf_pipelines.snapshot.routing.hash import HashRouting
from sf_pipelines.snapshot.routing.lsh import LshRouting
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.conftest import make_bucket
from sf_pipelines_tests.faces import Face, unified_reader, vector_reader
from sf_pipelines_tests.flaky import DRIP_BYTES, Fault, FlakyServer
from sf_pipelines_tests.snapshots import clustered, point_at, publish_by_hand

DIM, SHARDS = 8, 4
VECTORS = clustered(80, DIM)
NEW = 1000
ROUTINGS = {
    "centroids": ClusterRouting(clustered(SHARDS, DIM), DistanceMetric.L2),
    "hyperplanes": LshRouting(np.random.default_rng(3).standard_normal((6, DIM)).astype(np.float32), SHARDS),
}
# What each fault becomes; garbled bytes are told by what reads them.
FAULTS: dict[Fault, type[SfPipelinesError]] = {
    500: StoreUnavailableError,
    503: StoreUnavailableError,
    403: StoreDeniedError,
    404: ObjectMissingError,
    "reset": StoreUnavailableError,
    "hang": StoreUnavailableError,
    "truncate": StoreUnavailableError,
    "garble": IntegrityError,
}
# Every fault once, and elsewhere one of each sort: each test costs a fifth of a second, one that hangs two.
SOME: tuple[Fault, ...] = (503, "reset", "truncate", "garble")
CASES = [("sync", "centroids", fault) for fault in FAULTS]
CASES += [("async", "centroids", fault) for fault in ("hang", *SOME)] + [
    ("sync", "hyperplanes", fault) for fault in SOME
]
OPENING = [("matrix", *case) for case in CASES]
OPENING += [(which, "sync", "centroids", fault) for which in ("_CURRENT", "manifest") for fault in (404, *SOME)]


class Published(NamedTuple):
    """Two snapshots under one root, the ids of the second from ``NEW`` on."""

    root: str
    store: Store
    old: Manifest
    new: Manifest

    def point_at(self, manifest: Manifest) -> None:
        digest = hashlib.sha256(encode_manifest(manifest)).hexdigest()
        point_at(self.store, manifest_name(manifest.run_id, manifest.created_at), manifest.run_id, digest)


@pytest.fixture(scope="module")
def published(moto_options: S3Options) -> dict[str, Published]:
    bucket = f"faults-{uuid.uuid4().hex[:12]}"
    make_bucket(moto_options, bucket)
    out: dict[str, Published] = {}
    for name in (*ROUTINGS, "keys"):
        root = f"s3://{bucket}/{name}"
        store = Store.open(root, moto_options)
        fields: dict[str, Any] = {"metric": DistanceMetric.L2, "backend": "sqlite-vec", "ours": True}
        if name == "keys":
            values = [f"value {n}".encode() for n in range(len(VECTORS))]
            fields |= {"routing": HashRouting(SHARDS), "values": values, "key_encoding": "u64be"}
        else:
            fields["routing"] = ROUTINGS[name]
        both = [publish_by_hand(store, list(range(at, at + len(VECTORS))), VECTORS, **fields) for at in (0, NEW)]
        out[name] = Published(root, store, *both)
    return out


def shard_url(manifest: Manifest, shard: int) -> str:
    """Address of a shard's directory, to be matched and to be named."""
    url = next(row.db_url for row in manifest.shards if row.db_id == shard)
    assert url is not None
    return url


def everything(reader: Any, shards: list[int] | None = None) -> set[int]:
    asked = list(range(SHARDS)) if shards is None else shards
    return {hit.id for hit in reader.search(VECTORS[0], len(VECTORS), shard_ids=asked).results}


def all_from(start: int) -> set[int]:
    return set(range(start, start + len(VECTORS)))


@pytest.mark.parametrize(("which", "face", "kind", "fault"), OPENING)
def test_opening_fails_with_the_objects_name_and_works_when_the_store_does(
    flaky: FlakyServer, published: dict[str, Published], tmp_path: Path, face: Face, fault: Fault, which: str, kind: str
) -> None:
    one = published[kind]
    one.point_at(one.old)
    key = {"_CURRENT": "_CURRENT", "manifest": f"run_id={one.old.run_id}/manifest", "matrix": f"{kind}.npy"}[which]
    wanted: Any = FAULTS[fault]
    if which == "_CURRENT" and fault == 404:
        wanted = FileNotFoundError
    with flaky.failing(f"{kind}/.*{key}$", fault) as rule:
        for _ in range(1 if fault == "hang" else 2):
            with pytest.raises(wanted, match=key):
                vector_reader(face, one.root, s3=flaky.options, cache_dir=tmp_path)
        assert rule.hits
    with vector_reader(face, one.root, s3=flaky.options, cache_dir=tmp_path) as reader:
        assert everything(reader) == all_from(0)


@pytest.mark.parametrize(("face", "kind", "fault"), CASES)
def test_a_failing_refresh_leaves_the_old_snapshot_serving(
    flaky: FlakyServer, published: dict[str, Published], tmp_path: Path, face: Face, fault: Fault, kind: str
) -> None:
    one = published[kind]
    one.point_at(one.old)
    with vector_reader(face, one.root, s3=flaky.options, cache_dir=tmp_path) as reader:
        assert everything(reader) == all_from(0)
        one.point_at(one.new)
        with flaky.failing(f"run_id={one.new.run_id}/{kind}.npy", fault):
            outcome = reader.refresh()
        assert (outcome.status, outcome.run_id) == ("failed", one.old.run_id)
        assert isinstance(outcome.error, FAULTS[fault])
        health = reader.health()
        assert health.status == "degraded"
        assert f"{kind}.npy" in health.last_error
        assert 0 <= health.last_error_age_seconds < 60
        time.sleep(0.01)
        assert reader.health().last_error_age_seconds >= health.last_error_age_seconds + 0.01
        assert everything(reader) == all_from(0)
        assert reader.refresh().status == "updated"
        health = reader.health()
        assert (health.status, health.last_error, health.last_error_age_seconds) == ("healthy", None, None)
        assert everything(reader) == all_from(NEW)


@pytest.mark.parametrize("fault", [404, "reset", "garble"])
def test_a_refresh_warms_what_is_open_before_it_swaps(
    flaky: FlakyServer, published: dict[str, Published], tmp_path: Path, face: Face, fault: Fault
) -> None:
    one = published["centroids"]
    one.point_at(one.old)
    with vector_reader(face, one.root, s3=flaky.options, cache_dir=tmp_path) as reader:
        everything(reader)
        one.point_at(one.new)
        with flaky.failing(shard_url(one.new, 2).removeprefix("s3://"), fault):
            outcome = reader.refresh()
            assert isinstance(outcome.error, FAULTS[fault])
            assert shard_url(one.new, 2) in str(outcome.error)
            assert everything(reader) == all_from(0)
        assert reader.refresh()
        assert everything(reader) == all_from(NEW)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_that_cannot_be_opened_is_named_and_the_others_serve(
    flaky: FlakyServer, published: dict[str, Published], tmp_path: Path, face: Face, fault: Fault
) -> None:
    one = published["centroids"]
    one.point_at(one.old)
    address = shard_url(one.old, 1)
    with vector_reader(face, one.root, s3=flaky.options, cache_dir=tmp_path) as reader:
        with flaky.failing(address.removeprefix("s3://"), fault) as rule:
            for _ in range(1 if fault == "hang" else 2):
                with pytest.raises(FAULTS[fault], match=address):
                    everything(reader)
            assert everything(reader, [0, 2, 3]) < all_from(0)
            assert rule.hits == (1 if fault == "hang" else 2)
        assert everything(reader) == all_from(0)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp-")]


def test_keys_of_a_shard_that_cannot_be_opened(
    flaky: FlakyServer, published: dict[str, Published], tmp_path: Path, face: Face
) -> None:
    one = published["keys"]
    one.point_at(one.old)
    keys = list(range(len(VECTORS)))
    with unified_reader(face, one.root, s3=flaky.options, cache_dir=tmp_path) as reader:
        mine = [key for key in keys if reader.route_key(key) == 1]
        with flaky.failing(shard_url(one.old, 1).removeprefix("s3://"), "garble"):
            with pytest.raises(DigestMismatchError, match=shard_url(one.old, 1)):
                reader.multi_get(keys)
            with pytest.raises(DigestMismatchError, match=shard_url(one.old, 1)):
                reader.get(mine[0])
            assert reader.get(next(key for key in keys if key not in mine)) is not None
        assert reader.multi_get(keys) == {key: f"value {key}".encode() for key in keys}


def test_nobody_listens(flaky: FlakyServer, published: dict[str, Published], tmp_path: Path, face: Face) -> None:
    one = published["centroids"]
    one.point_at(one.old)
    with vector_reader(face, one.root, s3=flaky.options, cache_dir=tmp_path) as reader:
        everything(reader, [0])
        with flaky.refusing():
            with pytest.raises(StoreUnavailableError, match="_CURRENT"):
                vector_reader(face, one.root, s3=flaky.options, cache_dir=tmp_path)
            assert isinstance(reader.refresh().error, StoreUnavailableError)
            assert reader.health().status == "degraded"
            assert everything(reader, [0])
            with pytest.raises(StoreUnavailableError, match=shard_url(one.old, 3)):
                everything(reader, [3])
        assert reader.refresh().status == "unchanged"
        assert reader.health().status == "healthy"
        assert everything(reader) == all_from(0)


def test_what_may_pass_is_tried_again(
    flaky: FlakyServer, published: dict[str, Published], tmp_path: Path, face: Face
) -> None:
    one = published["centroids"]
    one.point_at(one.old)
    patient = flaky.options.model_copy(update={"retries": 2, "timeout": 30.0})
    with flaky.failing("centroids/_CURRENT$", 503) as rule:
        with pytest.raises(StoreUnavailableError):
            vector_reader(face, one.root, s3=patient, cache_dir=tmp_path)
        assert rule.hits == 3


def test_an_object_may_take_longer_than_a_request(
    flaky: FlakyServer, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_PART", DRIP_BYTES)
    data = np.random.default_rng(0).bytes(15 * DRIP_BYTES + 7)
    # The object takes one and a half seconds, each of its parts a tenth.
    store = Store.open(f"s3://{bucket}/root", flaky.options.model_copy(update={"timeout": 1.0}))
    store.put("large", data)
    sealed = hashlib.sha256(data).hexdigest()
    with flaky.failing("root/large$", "drip"):
        assert store.download("large", tmp_path / "copy") == (len(data), sealed)
        assert (tmp_path / "copy").read_bytes() == data
    assert store.sha256("large") == sealed


def test_an_object_that_is_replaced_between_its_parts_is_an_error(
    moto_options: S3Options, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(f"s3://{bucket}/root", moto_options)
    store.put("large", b"1" * 1000)
    monkeypatch.setattr(store_module, "_PART", 100)
    parts = store._chunks("large")
    assert next(parts) == b"1" * 100
    store.put("large", b"2" * 1000)
    with pytest.raises(PreconditionError):
        next(parts)
