"""Routed rows that one shard cannot be built from, whoever tries it and however often."""

from dataclasses import dataclass

import pyarrow.ipc as pa_ipc

from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import RangeReceipt, RouteReceipt


@dataclass(frozen=True)
class Damaged:
    """A routed file.

    Attributes:
        key: in the build's store.
        before: its bytes when they were right.
    """

    key: str
    before: bytes


def damage(build: Build, route: RouteReceipt, db_id: int) -> Damaged:
    """Changes one bit of one routed vector of a shard; the file is as long as before."""
    receipt = build.ledger(route.run_id).read(RangeReceipt, route.ranges[0])
    number = next(part.batch for part in receipt.parts if part.db_id == db_id)
    before = build.store.get(receipt.routed_key)
    with pa_ipc.open_file(before) as reader:
        vector = vectors_of(reader.get_batch(number))[0].tobytes()
    data = bytearray(before)
    data[before.index(vector)] ^= 1
    build.store.put(receipt.routed_key, bytes(data))
    return Damaged(receipt.routed_key, before)
