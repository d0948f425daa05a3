"""Whether sealed shards are still what their receipts say."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sf_pipelines.snapshot.manifest.models import ShardObject
from sf_pipelines.snapshot.run.ledger import changed_objects
from sf_pipelines.snapshot.run.receipts import ShardReceipt
from sf_pipelines.snapshot.store import ObjectInfo, Store

RUN = "shards/run_id=r"


def sealed(store: Store, db_id: int) -> ShardReceipt:
    """A shard of two objects, one of them in a folder of its own."""
    db_key = f"{RUN}/db={db_id:05d}/attempt=01-x"
    objects, etags = [], []
    for path in ("shard.db", "data/0.lance"):
        data = f"{db_id} {path}".encode()
        store.put(f"{db_key}/{path}", data)
        objects.append(ShardObject(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
        etags.append(store.head(f"{db_key}/{path}").etag)
    return ShardReceipt(
        run_id="r",
        inputs="i",
        db_id=db_id,
        db_key=db_key,
        attempt=1,
        rows=1,
        indexed_rows=1,
        objects=tuple(objects),
        etags=tuple(etags),
        rows_digest="d",
    )


def test_shards_that_are_whole_take_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path, create=True)
    shards = [sealed(store, db_id) for db_id in range(3)]
    store.put(f"{RUN}/db=00001/attempt=00-y/shard.db", b"an attempt that lost")
    listings: list[str] = []
    real = Store.objects

    def listed(self: Store, prefix: str = "", *, odd: list[str] | None = None) -> Iterator[ObjectInfo]:
        listings.append(prefix)
        return real(self, prefix, odd=odd)

    monkeypatch.setattr(Store, "objects", listed)
    assert changed_objects(store, shards) == []
    assert listings == [RUN]
    assert changed_objects(store, shards[:1]) == []
    assert changed_objects(store, []) == []


def test_what_is_missing_changed_or_strange_is_named(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    shards = [sealed(store, db_id) for db_id in range(3)]
    keys = [shard.db_key for shard in shards]
    store.delete(f"{keys[0]}/shard.db")
    store.put(f"{keys[1]}/data/0.lance", b"1 data/0.lancE")
    store.put(f"{keys[2]}/data/1.lance", b"who wrote this?")
    faults = changed_objects(store, shards)
    assert [fault.partition(f"{RUN}/")[2] for fault in faults] == [
        "db=00000/attempt=01-x/shard.db is missing",
        "db=00001/attempt=01-x/data/0.lance was changed after it was sealed",
        "db=00002/attempt=01-x/data/1.lance does not belong to the shard",
    ]
