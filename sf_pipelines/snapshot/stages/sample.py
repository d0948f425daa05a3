"""The first pass over the source: every row against the contract, rejects with their reason, samples by hash."""

import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError, DataContractError, SourceEmptyError
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.run.build import Build, Run, Stopwatch, scratch
from sf_pipelines.snapshot.run.receipts import SampleReceipt, ScanReceipt
from sf_pipelines.snapshot.sharding import ClusterSharding, LshSharding
from sf_pipelines.snapshot.source.contract import RowContract
from sf_pipelines.snapshot.source.files import SourceBatch, SourceListing, Span, plan_ranges, read_span
from sf_pipelines.snapshot.source.hashing import UInt64, hash_column, hash_vectors
from sf_pipelines.snapshot.source.parts import PartWriter
from sf_pipelines.snapshot.source.rejects import REJECT_SCHEMA, RejectReason
from sf_pipelines.snapshot.source.samples import DuplicateFinder, SmallestHashSample
from sf_pipelines.snapshot.store import Ref, Store

# Decoded vectors of one input range.
_RANGE_BYTES = 64 * 1024 * 1024
# Half of them judge; with fewer than 100 a lucky sample passes too easily.
_FEWEST_QUERIES = 200
# Different vectors that are looked at, at least, to tell how many rows are equal to others.
_DISTINCT = 100_000
# Rows beside the samples, for each sample query: small shards get more queries from them. At most a fifth of the rows.
_POOL, _POOL_SHARE = 4, 0.2


def sample(build: Build, run_id: str) -> SampleReceipt:
    """Validates every row, writes the reject table, and draws the training and the query sample."""
    run = build.run(run_id)
    scanned = run.scanned
    receipt, number = run.seek_whole(SampleReceipt, inputs=scanned.build_key, published=scanned.published)
    if receipt is not None and (
        scanned.published or (receipt.parts and run.are_there({part.key: part.size for part in receipt.parts}))
    ):
        run.take(receipt)
        receipt = receipt.model_copy(update={"reason": "this source was validated and sampled before"})
    else:
        receipt = run.commit(_validate_and_sample(run), number=number)
    check_rejects(build, receipt)
    return receipt


def _validate_and_sample(run: Run) -> SampleReceipt:
    """Streams the whole source once."""
    scanned, config, watch = run.scanned, run.build.config, Stopwatch()
    contract = run.build.contract(scanned.listing.arrow_schema)
    training_rows = _training_rows(config)
    query_rows = config.recall_gate.query_rows
    drawn = SmallestHashSample(
        max(training_rows + (1 + _POOL) * query_rows, 2 * _FEWEST_QUERIES), config.vector_spec.dim, contract.kept_schema
    )
    with scratch() as folder:
        path = folder / "rejects.parquet"
        reasons, repeated, parts = _first_pass(run, contract, drawn, folder, path)
        key = f"{run.root}/rejects-{uuid.uuid4().hex[:8]}.parquet"
        rejects = run.put_file(path, key, rows=reasons.total())
    rows, vectors = drawn.take()
    kept = scanned.rows - reasons.total()
    queries = min(query_rows, kept // 2, kept - min(config.shards, training_rows))
    # A small table cannot spare enough to prove anything: then all rows are queries and training at once.
    disjoint = queries >= _FEWEST_QUERIES
    first = queries if disjoint else 0
    pool = (
        rows.slice(first, min(_POOL * queries, int(_POOL_SHARE * (kept - queries)))) if disjoint else rows.slice(0, 0)
    )
    rest = first + len(pool)
    return SampleReceipt(
        run_id=run.run_id,
        inputs=scanned.build_key,
        rows_in=scanned.rows,
        rejected=reasons.total(),
        reject_reasons=dict(reasons),
        rejects=rejects,
        training=_put_vectors(run, "training", rows.select(["id"]).slice(rest, training_rows), vectors[rest:]),
        queries=_put_vectors(run, "queries", rows.slice(0, queries if disjoint else len(rows)), vectors),
        pool=_put_vectors(run, "pool", pool, vectors[first:]) if len(pool) else None,
        disjoint=disjoint,
        # One value that many rows have is rarely among those drawn by its hash, but often among the rows drawn.
        repeated=max(repeated, _repeated(hash_vectors(vectors))),
        parts=parts,
        seconds=watch.seconds,
    )


def _training_rows(config: WriteConfig) -> int:
    """Size of the training sample; 0 where there is nothing to train."""
    if not isinstance(config.sharding, ClusterSharding | LshSharding):
        return 0
    return config.sharding.training_rows or max(256 * config.shards, 10_000)


def _first_pass(
    run: Run, contract: RowContract, drawn: SmallestHashSample, folder: Path, path: Path
) -> tuple[Counter[str], float, tuple[Ref, ...]]:
    """Validates all rows, writes the rejects to ``path`` and the others to the store, fills the sample."""
    build, scanned = run.build, run.scanned
    reasons: Counter[str] = Counter()
    listing = scanned.listing
    store = Store.open(listing.root, build.config.s3)
    duplicates = DuplicateFinder(folder, scanned.rows, contract.stored_schema.field("id").type)
    done, step = 0, np.uint64(max(1, scanned.rows // _DISTINCT))
    seen: list[UInt64] = []
    parts: list[Ref] = []
    with pq.ParquetWriter(path, REJECT_SCHEMA) as rejects:
        for place, spans in enumerate(_input_ranges(run)):
            with PartWriter(folder / "part.arrow", contract) as part:
                for batch in _batches(store, scanned, spans, build.config.batch_rows):
                    checked = contract.check(batch)
                    hashes = hash_column(checked.ids)
                    duplicates.add(checked.ids, hashes, checked.rows)
                    drawn.add(checked.kept, hashes, checked.rows, checked.vectors)
                    vectors = hash_vectors(checked.vectors)
                    seen.append(vectors[vectors % step == 0])
                    if checked.rejects.num_rows:
                        reasons.update(checked.count_reasons())
                        rejects.write_batch(checked.rejects)
                    part.add(checked)
                    done += batch.rows.num_rows
                    build.report("sample", done, scanned.rows)
                    build.renew(scanned)
            key = f"{run.root}/rows/range-{place:05d}-{uuid.uuid4().hex[:8]}.arrow"
            parts.append(run.put_file(part.path, key, rows=part.rows))
        for repeats in duplicates.repeats():
            if repeats.num_rows:
                reasons[RejectReason.DUPLICATE_ID.value] += repeats.num_rows
                rejects.write_table(_as_rejects(listing, repeats))
    return reasons, _repeated(np.concatenate(seen) if seen else np.empty(0, np.uint64)), tuple(parts)


def _input_ranges(run: Run) -> list[tuple[Span, ...]]:
    """Parts of the source that are routed one by one."""
    rows = max(1, _RANGE_BYTES // (4 * run.build.config.vector_spec.dim))
    return plan_ranges(run.scanned.listing.files, rows)


def _batches(store: Store, scanned: ScanReceipt, spans: tuple[Span, ...], batch_rows: int) -> Iterator[SourceBatch]:
    """The rows of one input range."""
    for span in spans:
        yield from read_span(store, scanned.listing.files[span.file], span, scanned.listing.arrow_schema, batch_rows)


def _repeated(hashes: UInt64) -> float:
    """Part of the rows that share their hash with another. Sampled by hash, equal rows are all in or all out."""
    counts = np.unique(hashes, return_counts=True)[1]
    return float(counts[counts > 1].sum() / max(1, len(hashes)))


def _as_rejects(listing: SourceListing, repeats: pa.Table) -> pa.Table:
    rows = repeats.column("row").to_numpy()
    starts = np.array([file.first_row for file in listing.files])
    # Files without rows share their start with the next one; the last of these holds the row.
    files = np.searchsorted(starts, rows, side="right") - 1
    columns = [
        pa.array(rows),
        pa.array([file.key for file in listing.files], pa.string()).take(pa.array(files)),
        pa.array(rows - starts[files]),
        repeats.column("id").cast(pa.string()),
        pa.array([RejectReason.DUPLICATE_ID.value] * len(rows)),
        pa.array(["an earlier row has this id"] * len(rows)),
    ]
    return pa.table(columns, schema=REJECT_SCHEMA)


def _put_vectors(run: Run, name: str, rows: pa.Table, vectors: Float32) -> Ref:
    flat = pa.array(np.ascontiguousarray(vectors[: len(rows)]).ravel())
    column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return run.put_table(f"samples/{name}", rows.add_column(1, "vector", column))


def check_rejects(build: Build, receipt: SampleReceipt) -> None:
    """Whether enough rows satisfied the contract."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(receipt.reject_reasons.items()))
    where = f"see {build.store.url_of(receipt.rejects.key)}"
    if receipt.rejected > build.config.max_reject_fraction * receipt.rows_in:
        raise DataContractError(
            f"{receipt.rejected} of {receipt.rows_in} rows were rejected ({reasons}), more than max_reject_fraction "
            f"{build.config.max_reject_fraction} allows; {where}"
        )
    if receipt.rows_kept == 0:
        raise SourceEmptyError(f"all {receipt.rows_in} rows were rejected ({reasons}); {where}")
    if isinstance(build.config.sharding, ClusterSharding) and receipt.train_rows < build.config.shards:
        raise ConfigError(
            f"WriteConfig.num_dbs: {build.config.shards} shards for {receipt.rows_kept} rows that satisfy the "
            "contract; use fewer shards"
        )
