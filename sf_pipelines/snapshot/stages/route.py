"""Stage route: the rows of each input range, sorted by shard.

One Arrow file for each range. Each record batch holds rows of one shard only, in source order, so that a shard's
builder reads just its own batches. Memory is bounded by the write buffer, not by the range.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.errors import (
    CountMismatchError,
    IntegrityError,
    ReceiptMissingError,
    SourceChangedError,
)
from sf_pipelines.snapshot.gate.recall import stratified_queries
from sf_pipelines.snapshot.index.protocol import IndexFamily, choose_family
from sf_pipelines.snapshot.routing.protocol import Int32, Routing, VectorRouting
from sf_pipelines.snapshot.run.build import Build, Run, Stopwatch, scratch
from sf_pipelines.snapshot.run.receipts import (
    RangeReceipt,
    RoutedPart,
    RoutedShard,
    RouteReceipt,
    inputs_of,
)
from sf_pipelines.snapshot.run.tasks import Engine, InProcess, Task, spread
from sf_pipelines.snapshot.source.hashing import RowSetDigest, UInt64, hash_column, hash_vectors
from sf_pipelines.snapshot.source.parts import read_part
from sf_pipelines.snapshot.source.rejects import RejectReason
from sf_pipelines.snapshot.store import ObjectInfo, Ref, Store

_BUFFER_BYTES = 32 * 1024 * 1024


def route(build: Build, run_id: str, *, engine: Engine | None = None) -> RouteReceipt:
    """Sends every row that satisfies the contract to its shard, range by range."""
    run = build.run(run_id)
    scanned, sampled, inputs = run.scanned, run.sampled, _inputs(run)
    found, number = run.seek(RouteReceipt, inputs=inputs)
    if found is not None and (
        scanned.published or _are_there(run, [run.read(RangeReceipt, key) for key in found.ranges])
    ):
        run.take(found)
        return found.model_copy(update={"reason": "these rows were routed before"})
    watch = Stopwatch()
    tasks = [Task(stage="route_range", run_id=run_id, number=place) for place in range(len(_parts(run)))]
    with nullcontext(engine) if engine else InProcess(1, lambda task: route_range(build, run_id, task.number)) as where:
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
        index_family=_family(run, shards).value,
        queries=run.put_table("samples/asked", stratified_queries(run)),
        seconds=watch.seconds,
    )
    return run.commit(receipt, number=number)


def route_range(build: Build, run_id: str, place: int) -> RangeReceipt:
    """Sends the checked rows of one input range to their shards: one Arrow file, sorted by shard."""
    run = build.run(run_id)
    name, inputs = f"range-{place:05d}", _inputs(run)
    found, number = run.seek(RangeReceipt, name, inputs=inputs)
    if found is not None and _are_there(run, [found]):
        return found
    watch, part, schema = (
        Stopwatch(),
        _parts(run)[place],
        build.contract(run.scanned.listing.arrow_schema).stored_schema,
    )
    with scratch() as folder:
        run.store.download_sealed(part, folder / "part.arrow")
        writer = _RoutedWriter(folder / "routed.arrow", schema)
        done = 0
        for stored, shards in read_part(folder / "part.arrow", schema, lambda first, last: _repeats(run, first, last)):
            writer.add(stored, _shards_of(run.routing, stored) if shards is None else shards)
            done += stored.num_rows
            build.report("route", done, part.rows)
            build.renew(run.scanned)
        parts, shards = writer.close()
        key = f"{run.root}/routed/{name}-{uuid.uuid4().hex[:8]}.arrow"
        run.store.upload(writer.path, key)
        receipt = RangeReceipt(
            run_id=run_id,
            inputs=inputs,
            routed_key=key,
            routed_size=writer.path.stat().st_size,
            parts=parts,
            shards=shards,
            seconds=watch.seconds,
        )
    return run.commit(receipt, name, number=number)


def _inputs(run: Run) -> str:
    """Digest of all that decides what the routed files hold."""
    return inputs_of(build_key=run.scanned.build_key, rejects=run.sampled.rejects.sha256, routing=run.routing_digest)


def _parts(run: Run) -> tuple[Ref, ...]:
    if run.sampled.parts is None:
        raise ReceiptMissingError(f"build {run.run_id} has kept no checked rows; run stage sample again")
    return run.sampled.parts


def _family(run: Run, shards: tuple[RoutedShard, ...]) -> IndexFamily:
    """The one family of a snapshot; sqlite-vec has no other than the exact scan."""
    spec, scanned = run.build.config.vector_spec, run.scanned
    if spec.backend == "sqlite-vec":
        return IndexFamily.FLAT
    base = scanned.base_run_id
    served = None if base is None or scanned.forced else run.build.ledger(base).find(RouteReceipt)
    return choose_family(
        spec.index_type,
        max(shard.rows for shard in shards),
        eight_bit=spec.quantization == "i8",
        served=None if served is None else served.index_family,
        repeated=run.sampled.repeated,
    )


def _are_there(run: Run, ranges: Sequence[RangeReceipt]) -> bool:
    return run.are_there({receipt.routed_key: receipt.routed_size for receipt in ranges})


def _sum_shards(ranges: list[RangeReceipt], num_dbs: int) -> tuple[RoutedShard, ...]:
    digests = [RowSetDigest() for _ in range(num_dbs)]
    for receipt in ranges:
        for shard in receipt.shards:
            digests[shard.db_id].merge(shard.digest, shard.rows)
    return tuple(
        RoutedShard(db_id=db_id, rows=digest.rows, digest=digest.hexdigest()) for db_id, digest in enumerate(digests)
    )


def _shards_of(routing: Routing, stored: pa.RecordBatch) -> Int32:
    """Shard of each row by its vector."""
    if not isinstance(routing, VectorRouting):
        raise TypeError(f"{type(routing).__name__} routes by columns, and these rows were stored without their shards")
    return routing.assign(vectors_of(stored))


def _repeats(run: Run, first: int, last: int) -> NDArray[np.int64]:
    """Positions, from first to last, of rows that were turned away after they had been stored: repeated ids."""
    rejects = run.sampled.rejects
    if not run.sampled.reject_reasons.get(RejectReason.DUPLICATE_ID.value):
        return np.empty(0, dtype=np.int64)
    with run.store.open_file(rejects.key, pinned=ObjectInfo(rejects.key, rejects.size, None)) as raw:
        repeated = pc.field("reason") == RejectReason.DUPLICATE_ID.value
        inside = (pc.field("row") >= first) & (pc.field("row") <= last)
        return pq.read_table(raw, columns=["row"], filters=repeated & inside).column("row").to_numpy()


def _by_shard(batches: list[pa.RecordBatch], shards: list[Int32]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Each shard that has rows here, with its rows in one batch, in their order."""
    rows = pa.Table.from_batches(batches).combine_chunks()
    places = np.concatenate(shards)
    order = np.argsort(places, kind="stable")
    present, starts = np.unique(places[order], return_index=True)
    ends = [*starts[1:].tolist(), len(order)]
    for db_id, start, end in zip(present.tolist(), starts.tolist(), ends, strict=True):
        part = rows.take(pa.array(order[start:end])).combine_chunks()
        yield db_id, part.to_batches()[0]


class _RoutedWriter:
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
        if self._bytes >= _BUFFER_BYTES:
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
        for db_id, batch in _by_shard(self._batches, self._shards):
            self._parts.append(RoutedPart(db_id=db_id, batch=len(self._parts), rows=len(batch)))
            self._writer.write_batch(batch)
            add_rows(self._digests.setdefault(db_id, RowSetDigest()), batch)
        self._batches, self._shards, self._bytes = [], [], 0


def read_shard(store: Store, ranges: list[RangeReceipt], db_id: int, expected: RoutedShard) -> pa.Table:
    """All rows of one shard, in source order, checked against what was routed to it."""
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
