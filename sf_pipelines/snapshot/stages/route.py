"""Routed files: the rows of one input range, sorted by shard.

One Arrow file for each range. Each record batch holds rows of one shard only, in source order, so that a shard's
builder reads just its own batches. Memory is bounded by the write buffer, not by the range.
"""

import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.errors import CountMismatchError, IntegrityError, ObjectMissingError, SourceChangedError
from sf_pipelines.snapshot.gate.recall import stratified_queries
from sf_pipelines.snapshot.index.protocol import IndexFamily, choose_family
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.routing.protocol import Int32, Routing, RowRouting, VectorRouting
from sf_pipelines.snapshot.run.build import Build, Stopwatch, scratch
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import (
    RangeReceipt,
    Ref,
    RoutedPart,
    RoutedShard,
    RouteReceipt,
    SampleReceipt,
    ScanReceipt,
    TrainReceipt,
    inputs_of,
)
from sf_pipelines.snapshot.run.tasks import Engine, InProcess, Task, spread
from sf_pipelines.snapshot.source.contract import RowContract
from sf_pipelines.snapshot.source.files import SourceBatch, Span, plan_ranges, read_span
from sf_pipelines.snapshot.source.hashing import RowSetDigest, UInt64, hash_column, hash_vectors
from sf_pipelines.snapshot.store import ObjectInfo, Store

if TYPE_CHECKING:
    from sf_pipelines.snapshot.stages.shuffle import Shuffle

BUFFER_BYTES = 32 * 1024 * 1024
# Decoded vectors of one input range.
_RANGE_BYTES = 64 * 1024 * 1024


def route(build: Build, run_id: str, *, engine: Engine | None = None, shuffle: "Shuffle | None" = None) -> RouteReceipt:
    """Sends every row that satisfies the contract to its shard, range by range.

    Args:
        build: what to build.
        run_id: the build.
        engine: where the ranges are routed; None is this process.
        shuffle: an engine's own shuffle, which routes the ranges and brings each shard's rows together; in place of
            tasks.

    Raises:
        SourceChangedError: a file changed since the scan.
        CountMismatchError: routed and rejected rows do not add up to the rows of the source.
    """
    scanned, ledger = build.scanned(run_id), build.ledger(run_id)
    sampled, trained = ledger.need(SampleReceipt), build.trained(run_id)
    inputs = routing_inputs(scanned, sampled, trained)
    number = ledger.next_number(RouteReceipt)
    found = ledger.find(RouteReceipt, inputs=inputs)
    if found is not None and (scanned.published or all(_is_routed(ledger, key) for key in found.ranges)):
        return found.model_copy(update={"reason": "these rows were routed before"})
    watch = Stopwatch()
    places = len(spans_of(build, scanned))
    if shuffle is not None:
        with build.working(scanned):
            ranges = [ledger.read(RangeReceipt, key) for key in shuffle(build.config, run_id, places)]
    else:
        tasks = [Task(stage="route_range", run_id=run_id, number=place) for place in range(places)]
        with (
            nullcontext(engine)
            if engine
            else InProcess(1, lambda task: route_range(build, run_id, task.number)) as where
        ):
            done = spread(build, scanned, where, tasks)
        ranges = [receipt for receipt in done if isinstance(receipt, RangeReceipt)]
    shards = _sum_shards(ranges, build.config.shards)
    rows = sum(shard.rows for shard in shards)
    if rows + sampled.rejected != sampled.rows_in:
        raise CountMismatchError(
            f"build {run_id}: {rows} rows routed and {sampled.rejected} rejected do not make the {sampled.rows_in} read"
        )
    receipt = RouteReceipt(
        run_id=run_id,
        inputs=inputs,
        ranges=tuple(receipt.key for receipt in ranges),
        shards=shards,
        index_family=_family(build, scanned, sampled, shards).value,
        queries=ledger.put_table("samples/asked", stratified_queries(build, ledger, sampled, trained)),
        seconds=watch.seconds,
    )
    return ledger.commit(receipt, number=number)


def route_range(build: Build, run_id: str, place: int) -> RangeReceipt:
    """Sends the rows of one input range to their shards.

    Raises:
        SourceChangedError: a file changed since the scan.
    """
    scanned, ledger = build.scanned(run_id), build.ledger(run_id)
    sampled, trained = ledger.need(SampleReceipt), build.trained(run_id)
    part, inputs = f"range-{place:05d}", routing_inputs(scanned, sampled, trained)
    receipt = ledger.find(RangeReceipt, part, inputs=inputs)
    if receipt is not None and _is_routed(ledger, receipt.key):
        return receipt
    spans = spans_of(build, scanned)[place]
    return _route_spans(build, scanned, sampled, build.routing(trained), spans, part, inputs)


def _family(build: Build, scanned: ScanReceipt, sampled: SampleReceipt, shards: tuple[RoutedShard, ...]) -> IndexFamily:
    """The one family of a snapshot; sqlite-vec has no other than the exact scan."""
    spec = build.config.vector_spec
    if spec.backend == "sqlite-vec":
        return IndexFamily.FLAT
    base = scanned.base_run_id
    served = None if base is None or scanned.forced else build.ledger(base).find(RouteReceipt)
    return choose_family(
        spec.index_type,
        max(shard.rows for shard in shards),
        eight_bit=spec.quantization == "i8",
        served=None if served is None else served.index_family,
        repeated=sampled.repeated,
    )


def _is_routed(ledger: Ledger, key: str) -> bool:
    """Whether a range's routed file is there; its rows are checked by whoever reads them."""
    receipt = ledger.read(RangeReceipt, key)
    try:
        return ledger.store.head(receipt.routed_key).size == receipt.routed_size
    except ObjectMissingError:
        return False


def _sum_shards(ranges: list[RangeReceipt], num_dbs: int) -> tuple[RoutedShard, ...]:
    digests = [RowSetDigest() for _ in range(num_dbs)]
    for receipt in ranges:
        for shard in receipt.shards:
            digests[shard.db_id].merge(shard.digest, shard.rows)
    return tuple(
        RoutedShard(db_id=db_id, rows=digest.rows, digest=digest.hexdigest()) for db_id, digest in enumerate(digests)
    )


def _route_spans(
    build: Build,
    scanned: ScanReceipt,
    sampled: SampleReceipt,
    routing: Routing,
    spans: tuple[Span, ...],
    part: str,
    inputs: str,
) -> RangeReceipt:
    """Reads one input range and stores its rows sorted by shard."""
    watch, contract = Stopwatch(), build.contract(scanned.listing.arrow_schema)
    number = build.ledger(scanned.run_id).next_number(RangeReceipt, part)
    with scratch() as folder:
        writer = RoutedWriter(folder / "routed.arrow", contract.stored_schema)
        for stored, shards in routed_rows(build, scanned, sampled, routing, contract, spans):
            writer.add(stored, shards)
        return commit_routed(build, scanned.run_id, writer, part, number, inputs=inputs, spans=spans, watch=watch)


def routed_rows(
    build: Build,
    scanned: ScanReceipt,
    sampled: SampleReceipt,
    routing: Routing,
    contract: RowContract,
    spans: tuple[Span, ...],
) -> Iterator[tuple[pa.RecordBatch, Int32]]:
    """The rows of one input range as they are stored, without rejects, and the shard of each."""
    config = build.config
    source = Store.open(scanned.listing.root, config.s3)
    rejected = RejectedRows(build.store, sampled.rejects)
    for span in spans:
        file = scanned.listing.files[span.file]
        gone = rejected.between(file.first_row, file.first_row + file.rows)
        for batch in read_span(source, file, span, scanned.listing.arrow_schema, config.batch_rows):
            rows = _without(batch, gone)
            if rows.num_rows:
                stored, vectors = contract.stored(rows, batch.file)
                yield stored, _shards_of(routing, contract, rows, vectors)
            build.report("route", batch.first_row + batch.rows.num_rows, scanned.rows)
            build.renew(scanned)


def commit_routed(
    build: Build,
    run_id: str,
    writer: "RoutedWriter",
    part: str,
    number: int,
    *,
    inputs: str,
    spans: tuple[Span, ...],
    watch: Stopwatch,
) -> RangeReceipt:
    """Closes a routed file, uploads it under a fresh name and commits its receipt."""
    ledger = build.ledger(run_id)
    parts, shards = writer.close()
    key = f"{ledger.root}/routed/{part}-{uuid.uuid4().hex[:8]}.arrow"
    build.store.upload(writer.path, key)
    receipt = RangeReceipt(
        run_id=run_id,
        inputs=inputs,
        spans=spans,
        routed_key=key,
        routed_size=writer.path.stat().st_size,
        parts=parts,
        shards=shards,
        seconds=watch.seconds,
    )
    return ledger.commit(receipt, part, number=number)


def spans_of(build: Build, scanned: ScanReceipt) -> list[tuple[Span, ...]]:
    """The input ranges: the same ones whoever asks, and whatever the engine."""
    return plan_ranges(scanned.listing.files, max(1, _RANGE_BYTES // (4 * build.config.vector_spec.dim)))


def routing_inputs(scanned: ScanReceipt, sampled: SampleReceipt, trained: TrainReceipt | None) -> str:
    """Digest of all that decides what a routed file holds."""
    return inputs_of(
        build_key=scanned.build_key,
        rejects=sampled.rejects.sha256,
        routing=trained.ref.sha256 if trained else "",
    )


def _shards_of(routing: Routing, contract: RowContract, rows: pa.RecordBatch, vectors: Float32) -> Int32:
    """Shard of each row, by its vector or by its columns."""
    if isinstance(routing, VectorRouting):
        return routing.assign(vectors)
    if not isinstance(routing, RowRouting):
        raise TypeError(f"{type(routing).__name__} is routing neither by vector nor by row")
    placed = routing.place(contract.routing_rows(rows))
    if placed.faults:
        row, fault = next(iter(placed.faults.items()))
        raise SourceChangedError(f"row {contract.ids(rows)[row]} passed the contract, but has no shard now: {fault}")
    return placed.shards


class RejectedRows:
    """Which source rows were turned away, read for one file at a time."""

    def __init__(self, store: Store, ref: Ref) -> None:
        self._store = store
        self._ref = ref

    def between(self, first_row: int, end_row: int) -> NDArray[np.int64]:
        """Sorted positions of rejected rows in ``first_row <= row < end_row``."""
        if not self._ref.rows:
            return np.empty(0, dtype=np.int64)
        info = ObjectInfo(self._ref.key, self._ref.size, None)
        with self._store.open_file(self._ref.key, pinned=info) as raw:
            inside = (pc.field("row") >= first_row) & (pc.field("row") < end_row)
            table = pq.read_table(raw, columns=["row"], filters=inside)
        return np.sort(table.column("row").to_numpy())


def _without(batch: SourceBatch, gone: NDArray[np.int64]) -> pa.RecordBatch:
    first, end = np.searchsorted(gone, [batch.first_row, batch.first_row + batch.rows.num_rows])
    if first == end:
        return batch.rows
    kept = np.ones(batch.rows.num_rows, dtype=bool)
    kept[gone[first:end] - batch.first_row] = False
    return batch.rows.filter(pa.array(kept))


def by_shard(batches: list[pa.RecordBatch], shards: list[Int32]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Each shard that has rows here, with its rows in one batch, in their order."""
    rows = pa.Table.from_batches(batches).combine_chunks()
    places = np.concatenate(shards)
    order = np.argsort(places, kind="stable")
    present, starts = np.unique(places[order], return_index=True)
    ends = [*starts[1:].tolist(), len(order)]
    for db_id, start, end in zip(present.tolist(), starts.tolist(), ends, strict=True):
        part = rows.take(pa.array(order[start:end])).combine_chunks()
        yield db_id, part.to_batches()[0]


class RoutedWriter:
    """Collects rows with their shard and writes them shard by shard whenever the buffer is full."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self._writer = pa_ipc.new_file(str(path), schema)
        self._batches: list[pa.RecordBatch] = []
        self._shards: list[Int32] = []
        self._bytes = 0
        self._digests: dict[int, RowSetDigest] = {}
        self._parts: list[RoutedPart] = []

    def add(self, rows: pa.RecordBatch, shards: Int32) -> None:
        """Takes stored rows and the shard of each."""
        self._batches.append(rows)
        self._shards.append(shards)
        self._bytes += rows.nbytes
        if self._bytes >= BUFFER_BYTES:
            self._flush()

    def close(self) -> tuple[tuple[RoutedPart, ...], tuple[RoutedShard, ...]]:
        """Writes the rest; what the file's batches hold, and rows and digest of each shard."""
        self._flush()
        self._writer.close()
        shards = tuple(
            RoutedShard(db_id=db_id, rows=digest.rows, digest=digest.hexdigest())
            for db_id, digest in sorted(self._digests.items())
        )
        return tuple(self._parts), shards

    def _flush(self) -> None:
        if not self._batches:
            return
        for db_id, batch in by_shard(self._batches, self._shards):
            self._parts.append(RoutedPart(db_id=db_id, batch=self._next_batch(), rows=len(batch)))
            self._writer.write_batch(batch)
            add_rows(self._digests.setdefault(db_id, RowSetDigest()), batch)
        self._batches, self._shards, self._bytes = [], [], 0

    def _next_batch(self) -> int:
        return len(self._parts)


def read_shard(store: Store, ranges: list[RangeReceipt], db_id: int, expected: RoutedShard) -> pa.Table:
    """All rows of one shard, in source order, checked against what was routed to it.

    Raises:
        CountMismatchError: rows are missing or too many.
        IntegrityError: the rows are not those that were routed.
    """
    digest, batches = RowSetDigest(), []
    schema: pa.Schema | None = None
    for receipt in ranges:
        mine = [part.batch for part in receipt.parts if part.db_id == db_id]
        if not mine:
            continue
        for batch in _read_batches(store, receipt, mine):
            schema = batch.schema
            add_rows(digest, batch)
            batches.append(batch)
    if digest.rows != expected.rows:
        raise CountMismatchError(f"shard {db_id}: {expected.rows} rows were routed, {digest.rows} were found")
    if digest.hexdigest() != expected.digest:
        keys = ", ".join(receipt.routed_key for receipt in ranges)
        raise IntegrityError(
            f"shard {db_id}: the rows in {keys} are not those that were routed; build again with force"
        )
    return pa.Table.from_batches(batches, schema)


def _read_batches(store: Store, receipt: RangeReceipt, numbers: list[int]) -> Iterator[pa.RecordBatch]:
    info = ObjectInfo(receipt.routed_key, receipt.routed_size, None)
    with store.open_file(info.key, pinned=info) as raw:
        try:
            reader = pa_ipc.open_file(pa.PythonFile(raw, mode="r"))
            for number in numbers:
                yield reader.get_batch(number)
        except (pa.ArrowException, SourceChangedError) as error:
            # Not a source file: what this build itself wrote is gone or damaged.
            raise IntegrityError(
                f"the routed rows in {store.url_of(info.key)} cannot be read: {error}; route again, or build with force"
            ) from error


def add_rows(digest: RowSetDigest, batch: pa.RecordBatch) -> None:
    """Adds stored rows to a digest: id, vector, and all other columns."""
    extras: list[UInt64] = [
        hash_column(_hashable(batch.column(field.name))) for field in batch.schema if field.name not in {"id", "vector"}
    ]
    digest.add(hash_column(batch.column("id")), hash_vectors(vectors_of(batch)), extras)


def _hashable(column: pa.Array) -> pa.Array:
    if pa.types.is_binary(column.type):
        return column
    if pa.types.is_temporal(column.type):
        # Arrow's text of one depends on its list of time zones, and ends with the year 32,767.
        return column.view(pa.int32() if column.type.bit_width == 32 else pa.int64())
    return column.cast(pa.string())
