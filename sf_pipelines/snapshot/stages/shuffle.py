"""Routing by an engine's own shuffle: what its workers do before and after it.

What is shuffled are pieces: each is an Arrow message of some rows of one shard, as they are stored, beside that shard's
number. An engine so needs to understand two columns only, whatever the types of a row are, and moves whole batches.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.ipc as pa_ipc

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.routing.protocol import Int32
from sf_pipelines.snapshot.run.build import Build, Stopwatch, scratch
from sf_pipelines.snapshot.run.receipts import RangeReceipt, SampleReceipt
from sf_pipelines.snapshot.stages.route import (
    BUFFER_BYTES,
    RoutedWriter,
    by_shard,
    commit_routed,
    routed_rows,
    routing_inputs,
    spans_of,
)

# Large: an engine may put all pieces of a partition into one array.
PIECES = pa.schema([pa.field("shard", pa.int32()), pa.field("rows", pa.large_binary())])
# Keys of range receipts, as workers report them.
KEYS = pa.schema([pa.field("key", pa.string())])


class Shuffle(Protocol):
    """An engine's own shuffle."""

    def __call__(self, config: WriteConfig, run_id: str, places: int) -> list[str]:
        """Routes so many input ranges and writes each shard's rows; keys of the receipts, each shard in one of them."""
        ...


@dataclass(frozen=True)
class StagedFrame:
    """What an engine's frame was written to.

    Attributes:
        keys: Parquet parts in the store, in the frame's order; a copy that a forgotten task writes is not among them.
        shuffle: the engine's.
    """

    keys: tuple[str, ...]
    shuffle: Shuffle


def route_pieces(config: WriteConfig, run_id: str, place: int) -> Iterator[pa.RecordBatch]:
    """The rows of one input range by shard, in batches of ``PIECES``; what a worker does before the shuffle.

    Raises:
        SourceChangedError: a staged part changed since the scan.
    """
    with closing(Build(config)) as build:
        ledger = build.ledger(run_id)
        scanned, sampled, trained = build.scanned(run_id), ledger.need(SampleReceipt), build.trained(run_id)
        contract, routing = build.contract(scanned.listing.arrow_schema), build.routing(trained)
        spans = spans_of(build, scanned)[place]
        batches: list[pa.RecordBatch] = []
        shards: list[Int32] = []
        for stored, places in routed_rows(build, scanned, sampled, routing, contract, spans):
            batches.append(stored)
            shards.append(places)
            if sum(batch.nbytes for batch in batches) >= BUFFER_BYTES:
                yield _pieces(batches, shards)
                batches, shards = [], []
        if batches:
            yield _pieces(batches, shards)


def _pieces(batches: list[pa.RecordBatch], shards: list[Int32]) -> pa.RecordBatch:
    numbers: list[int] = []
    messages: list[bytes] = []
    for db_id, batch in by_shard(batches, shards):
        sink = pa.BufferOutputStream()
        with pa_ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        numbers.append(db_id)
        messages.append(sink.getvalue().to_pybytes())
    return pa.record_batch([pa.array(numbers, pa.int32()), pa.array(messages, pa.large_binary())], schema=PIECES)


def write_pieces(config: WriteConfig, run_id: str, batches: Iterable[pa.RecordBatch]) -> str | None:
    """Writes all rows of some shards to one routed file; what a worker does after the shuffle.

    Args:
        config: the snapshot.
        run_id: the build.
        batches: of ``PIECES``; all pieces of each shard that is among them.

    Returns:
        Key of the range receipt; None where there was no piece.
    """
    watch = Stopwatch()
    with closing(Build(config)) as build, scratch() as folder:
        ledger = build.ledger(run_id)
        scanned, sampled, trained = build.scanned(run_id), ledger.need(SampleReceipt), build.trained(run_id)
        writer = RoutedWriter(folder / "routed.arrow", build.contract(scanned.listing.arrow_schema).stored_schema)
        first: int | None = None
        for batch in batches:
            for db_id, message in zip(batch.column("shard").to_pylist(), batch.column("rows"), strict=True):
                with pa_ipc.open_stream(message.as_buffer()) as stream:
                    for rows in stream:
                        writer.add(rows, np.full(len(rows), db_id, dtype=np.int32))
                first = db_id if first is None else min(first, db_id)
            build.renew(scanned)
        if first is None:
            writer.close()
            return None
        # A shard's pieces are all in one place, so its number names it for every attempt.
        part = f"shards-{first:05d}"
        number = ledger.next_number(RangeReceipt, part)
        inputs = routing_inputs(scanned, sampled, trained)
        return commit_routed(build, run_id, writer, part, number, inputs=inputs, spans=(), watch=watch).key
