import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from sf_pipelines.snapshot.errors import IntegrityError, ManifestError, ObjectMissingError
from sf_pipelines.snapshot.manifest.record import (
    LEASE,
    BuildRecord,
    finish,
    read_record,
    renew,
    start_record,
)
from sf_pipelines.snapshot.store import Store, Versioned

START = datetime(2026, 11, 22, 12, tzinfo=UTC)
STOCK = b"""db_path_template: db={db_id:05d}
error_message: null
error_type: null
format_version: 1
lease_expires_at: '2026-11-22T12:59:52.558987Z'
manifest_ref: s3://golden/x/manifests/2026-11-22T12:59:52.508805Z_run_id=golden-run/manifest
run_id: golden-run
s3_prefix: s3://golden/x
shard_prefix: shards
started_at: '2026-11-22T12:59:51.171972Z'
status: succeeded
updated_at: '2026-11-22T12:59:52.558987Z'
writer_type: python
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "root", create=True)


def at(**passed: float) -> datetime:
    return START + timedelta(**passed)


def test_start(store: Store) -> None:
    key = start_record(store, "r1", now=START)
    assert re.fullmatch(r"runs/2026-11-22T12:00:00\.000000Z_run_id=r1_[0-9a-f]{32}/run\.yaml", key)
    record = read_record(store, key)
    assert (record.status, record.lease_expires_at) == ("running", START + LEASE)
    assert record.alive(at(minutes=9))
    assert not record.alive(at(minutes=11))
    fields = yaml.safe_load(store.get(key))
    assert set(fields) == set(yaml.safe_load(STOCK))
    assert fields["started_at"] == "2026-11-22T12:00:00.000000Z"
    assert fields["s3_prefix"] == store.url
    assert store.get(key).decode().splitlines() == sorted(store.get(key).decode().splitlines())


def test_stock_record_is_read_and_written_alike() -> None:
    record = BuildRecord.decode(STOCK, "here")
    assert (record.run_id, record.status, record.writer_type) == ("golden-run", "succeeded", "python")
    assert record.encode() == STOCK


def test_renewal_is_written_at_most_once_a_minute(store: Store) -> None:
    key = start_record(store, "r1", now=START)
    first = store.get(key)
    renew(store, key, now=at(seconds=59))
    assert store.get(key) == first
    renew(store, key, now=at(seconds=59), force=True)
    assert store.get(key) != first
    renewed = renew(store, key, now=at(seconds=119))
    assert renewed.lease_expires_at == at(seconds=119) + LEASE
    assert read_record(store, key) == renewed


def test_success_is_final(store: Store) -> None:
    key = start_record(store, "r1", now=START)
    finish(store, key, "succeeded", "s3://b/manifest", now=at(minutes=2))
    record = renew(store, key, force=True, now=at(minutes=5))
    assert (record.status, record.manifest_ref) == ("succeeded", "s3://b/manifest")
    assert record.lease_expires_at == at(minutes=2)


def test_a_failed_build_that_goes_on_is_running_again(store: Store) -> None:
    key = start_record(store, "r1", now=START)
    record = finish(store, key, "failed", error=ValueError("x" * 5000), now=at(seconds=5))
    assert (record.status, record.error_type) == ("failed", "ValueError")
    assert record.error_message == "x" * 2000
    assert not record.alive(at(seconds=6))
    again = renew(store, key, now=at(seconds=6))
    assert (again.status, again.error_type, again.error_message) == ("running", None, None)
    assert again.alive(at(seconds=7))


class RacingStore(Store):
    """Somebody else writes between our read and our swap, ``losses`` times."""

    losses = 1

    def swap(
        self, key: str, data: bytes, expected: Versioned | None, *, content_type: str = "application/json"
    ) -> bool:
        if self.losses:
            self.losses -= 1
            record = BuildRecord.decode(self.get(key), key)
            self.put(key, record.model_copy(update={"updated_at": record.updated_at + timedelta(1)}).encode())
        return super().swap(key, data, expected, content_type=content_type)


def test_a_renewal_that_lost_a_race_takes_what_is_there(tmp_path: Path) -> None:
    store = RacingStore.open(tmp_path / "root", create=True)
    key = start_record(store, "r1", now=START)
    assert renew(store, key, force=True, now=at(minutes=3)).updated_at == START + timedelta(1)


def test_the_end_is_written_in_spite_of_a_race(tmp_path: Path) -> None:
    store = RacingStore.open(tmp_path / "root", create=True)
    key = start_record(store, "r1", now=START)
    finish(store, key, "succeeded", now=at(minutes=3))
    assert read_record(store, key).status == "succeeded"


def test_no_record(store: Store) -> None:
    with pytest.raises(ObjectMissingError):
        renew(store, "runs/none/run.yaml")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[1]",
        b"{a: b: c}",
        b"!!python/object/apply:os.getcwd []",
        b"\xff\xfe\x00",
        STOCK.replace(b"succeeded", b"resting"),
        STOCK.replace(b"run_id: golden-run", b"run: golden-run"),
        STOCK + b"x: " + b"y" * 70_000,
        b"[" * 5000,
    ],
)
def test_records_that_cannot_be_understood(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="build record here"):
        BuildRecord.decode(data, "here")


def test_run_id_with_a_slash(store: Store) -> None:
    with pytest.raises(ManifestError, match="run id 'a/b'"):
        start_record(store, "a/b")
