"""Opening with an older manifest: only when asked for, only for damage, never one that a rollback withdrew."""

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines.snapshot.errors import (
    ConfigError,
    DigestMismatchError,
    ObjectMissingError,
    SfPipelinesError,
    SnapshotKindError,
    StoreUnavailableError,
)
from sf_pipelines.snapshot.manifest.codec import encode_manifest
from sf_pipelines.snapshot.manifest.models import Manifest
from sf_pipelines.snapshot.manifest.pointer import CURRENT, Pointer, manifest_name
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.reader.reader import UnifiedShardedReader, open_reader
from sf_pipelines.snapshot.routing.hash import HashRouting
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.faces import Face, vector_reader
from sf_pipelines_tests.snapshots import clustered, publish_by_hand

DIM = 8
VECTORS = clustered(20, DIM)
START = datetime(2026, 1, 1, tzinfo=UTC)


class History:
    """Snapshots of one root; the ids of the n-th go from 100 n on, and it was made n hours after the first."""

    def __init__(self, root: Path) -> None:
        self.store = Store.open(root, create=True)
        self.manifests: list[Manifest] = []

    def add(self, *, unified: bool = False) -> None:
        at = len(self.manifests)
        fields: dict[str, Any] = {"metric": DistanceMetric.L2, "backend": "sqlite-vec", "ours": True}
        if unified:
            values = [b"v"] * len(VECTORS)
            fields |= {"routing": HashRouting(2), "values": values, "key_encoding": "u64be"}
        else:
            fields |= {"centroids": clustered(2, DIM)}
        manifest = publish_by_hand(self.store, list(range(100 * at, 100 * at + len(VECTORS))), VECTORS, **fields)
        self.store.delete(manifest_name(manifest.run_id, manifest.created_at))
        self.manifests.append(manifest.model_copy(update={"created_at": START + timedelta(hours=at)}))
        self.store.put(self.key(at), encode_manifest(self.manifests[at]))
        self.point_at(at)

    def key(self, at: int) -> str:
        return manifest_name(self.manifests[at].run_id, self.manifests[at].created_at)

    def point_at(self, at: int, withdrawn: tuple[int, ...] = ()) -> None:
        pointer = Pointer(
            manifest_ref=self.store.url_of(self.key(at)),
            run_id=self.manifests[at].run_id,
            updated_at=datetime.now(UTC),
            manifest_digest=hashlib.sha256(encode_manifest(self.manifests[at])).hexdigest(),
            withdrawn=tuple(self.manifests[number].run_id for number in withdrawn),
        )
        self.store.put(CURRENT, pointer.encode())

    def damage(self, at: int) -> None:
        self.store.put(self.key(at), encode_manifest(self.manifests[at])[:-1])

    def repair(self, at: int) -> None:
        self.store.put(self.key(at), encode_manifest(self.manifests[at]))


@pytest.fixture
def past(tmp_path: Path) -> History:
    """Three snapshots, the last one current."""
    out = History(tmp_path / "store")
    for _ in range(3):
        out.add()
    return out


def opened(past: History, tmp_path: Path, face: Face = "sync", **options: Any) -> Any:
    assert past.store.local_root is not None
    return vector_reader(face, past.store.local_root, cache_dir=tmp_path / "cache", **options)


def served(reader: Any) -> int:
    """Which snapshot the answers come from."""
    numbers = {hit.id // 100 for hit in reader.search(VECTORS[0], len(VECTORS), num_probes=2).results}
    assert len(numbers) == 1
    return numbers.pop()


def test_nobody_falls_back_who_did_not_ask_for_it(past: History, tmp_path: Path, face: Face) -> None:
    past.damage(2)
    with pytest.raises(DigestMismatchError, match=past.manifests[2].run_id):
        opened(past, tmp_path, face)


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "damaged"])
def test_the_newest_older_one_serves_until_a_refresh_finds_the_right_one_repaired(
    past: History, tmp_path: Path, face: Face, gone: bool
) -> None:
    if gone:
        past.store.delete(past.key(2))
    else:
        past.damage(2)
    kind = ObjectMissingError if gone else DigestMismatchError
    with opened(past, tmp_path, face, fallback=1) as reader:
        assert served(reader) == 1
        health = reader.health()
        assert health.status == "degraded"
        assert past.key(2) in health.fallback
        assert kind.__name__ in health.fallback
        assert past.key(1) in health.manifest_ref
        assert health.last_error is None
        outcome = reader.refresh()
        assert (outcome.status, outcome.run_id) == ("failed", past.manifests[1].run_id)
        assert isinstance(outcome.error, kind)
        assert served(reader) == 1
        assert reader.health().fallback == health.fallback
        past.repair(2)
        assert reader.refresh().status == "updated"
        assert served(reader) == 2
        health = reader.health()
        assert (health.status, health.fallback, health.last_error) == ("healthy", None, None)


def test_a_pointer_moved_to_what_is_served_ends_the_fallback(past: History, tmp_path: Path) -> None:
    past.damage(2)
    with opened(past, tmp_path, fallback=1) as reader:
        past.point_at(1)
        assert reader.refresh().status == "unchanged"
        assert (reader.health().status, reader.health().fallback) == ("healthy", None)


def test_no_more_are_tried_than_asked_for(past: History, tmp_path: Path) -> None:
    past.damage(2)
    # Not sealed by any pointer: it must be no manifest at all to be damaged.
    past.store.put(past.key(1), b"no manifest")
    with pytest.raises(DigestMismatchError, match=past.manifests[2].run_id):
        opened(past, tmp_path, fallback=1)
    with opened(past, tmp_path, fallback=2) as reader:
        assert served(reader) == 0
        assert past.key(2) in reader.health().fallback


def test_when_all_are_broken_the_pointed_one_is_named(past: History, tmp_path: Path, face: Face) -> None:
    past.damage(2)
    for at in (0, 1):
        past.store.put(past.key(at), b"no manifest")
    with pytest.raises(DigestMismatchError, match=past.manifests[2].run_id):
        opened(past, tmp_path, face, fallback=9)


def test_a_matrix_that_is_gone_is_damage_too(past: History, tmp_path: Path) -> None:
    past.store.delete(f"vector_meta/run_id={past.manifests[2].run_id}/centroids.npy")
    with opened(past, tmp_path, fallback=1) as reader:
        assert served(reader) == 1
        assert "centroids.npy" in reader.health().fallback


def test_after_a_rollback_nothing_newer_serves(past: History, tmp_path: Path, face: Face) -> None:
    past.point_at(1)
    past.damage(1)
    with opened(past, tmp_path, face, fallback=9) as reader:
        assert served(reader) == 0


def test_what_was_withdrawn_does_not_serve(past: History, tmp_path: Path, face: Face) -> None:
    past.damage(2)
    past.point_at(2, withdrawn=(1,))
    with opened(past, tmp_path, face, fallback=1) as reader:
        assert served(reader) == 0
    past.point_at(2, withdrawn=(0, 1))
    with pytest.raises(DigestMismatchError, match=past.manifests[2].run_id):
        opened(past, tmp_path, face, fallback=9)


def test_a_pointer_that_is_damaged_or_gone_is_no_reason(past: History, tmp_path: Path) -> None:
    past.store.put(CURRENT, b"{}")
    with pytest.raises(SfPipelinesError, match=CURRENT):
        opened(past, tmp_path, fallback=9)
    past.store.delete(CURRENT)
    with pytest.raises(FileNotFoundError, match=CURRENT):
        opened(past, tmp_path, fallback=9)


def test_an_unreachable_store_is_no_reason(past: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Store.get

    def fails(self: Store, key: str) -> bytes:
        if key == past.key(2):
            raise StoreUnavailableError(f"cannot read {key}")
        return whole(self, key)

    monkeypatch.setattr(Store, "get", fails)
    with pytest.raises(StoreUnavailableError, match=past.manifests[2].run_id):
        opened(past, tmp_path, fallback=9)


def test_the_other_kind_is_left_out(past: History, tmp_path: Path) -> None:
    past.add(unified=True)
    past.add()
    past.damage(4)
    with opened(past, tmp_path, fallback=2) as reader:
        assert served(reader) == 2
    with pytest.raises(SnapshotKindError, match=past.manifests[3].run_id) as caught:
        opened(past, tmp_path, fallback=1)
    assert past.manifests[4].run_id in str(caught.value)
    assert isinstance(caught.value.__cause__, DigestMismatchError)
    assert past.store.local_root is not None
    with open_reader(past.store.local_root, cache_dir=tmp_path / "cache", fallback=1) as reader:
        assert isinstance(reader, UnifiedShardedReader)
        assert reader.snapshot_info().run_id == past.manifests[3].run_id


def test_a_pinned_manifest_has_no_fallback(past: History, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fallback"):
        opened(past, tmp_path, manifest_key=past.key(1), fallback=1)
    past.store.put(past.key(1), b"no manifest")
    with pytest.raises(SfPipelinesError, match=past.manifests[1].run_id):
        opened(past, tmp_path, manifest_key=past.key(1))
