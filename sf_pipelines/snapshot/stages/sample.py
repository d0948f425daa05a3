"""The first pass over the source: every row against the contract, rejects with their reason, samples by hash."""

import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError, DataContractError, SourceEmptyError
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.run.build import Build, Stopwatch, scratch
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import Ref, SampleReceipt, ScanReceipt
from sf_pipelines.snapshot.sharding import ClusterSharding, LshSharding
from sf_pipelines.snapshot.source.contract import RowContract
from sf_pipelines.snapshot.source.duplicates import DuplicateFinder
from sf_pipelines.snapshot.source.files import SourceListing, Span, read_span
from sf_pipelines.snapshot.source.hashing import UInt64, hash_column, hash_vectors
from sf_pipelines.snapshot.source.rejects import REJECT_SCHEMA, RejectReason
from sf_pipelines.snapshot.source.sampling import SmallestHashSample
from sf_pipelines.snapshot.store import Store

# Half of them judge; with fewer than 100 a lucky sample passes too easily.
_FEWEST_QUERIES = 200
# Different vectors that are looked at, at least, to tell how many rows are equal to others.
_DISTINCT = 100_000
# Rows beside the samples, for each sample query: small shards get more queries from them. At most a fifth of the rows.
_POOL, _POOL_SHARE = 4, 0.2


def sample(build: Build, run_id: str) -> SampleReceipt:
    """Validates every row, writes the reject table, and draws the training and the query sample.

    Raises:
        DataContractError: more rows were rejected than ``max_reject_fraction`` allows.
        SourceEmptyError: no row was left.
        SourceChangedError: a file changed since the scan.
    """
    scanned, ledger = build.scanned(run_id), build.ledger(run_id)
    number = ledger.next_number(SampleReceipt)
    receipt = ledger.find_whole(SampleReceipt, inputs=scanned.build_key, published=scanned.published)
    if receipt is not None:
        receipt = receipt.model_copy(update={"reason": "this source was validated and sampled before"})
    else:
        receipt = ledger.commit(validate_and_sample(build, scanned, ledger), number=number)
    check_rejects(build, receipt)
    return receipt


def validate_and_sample(build: Build, scanned: ScanReceipt, ledger: Ledger) -> SampleReceipt:
    """Streams the whole source once; see ``stages.sample``."""
    config, watch = build.config, Stopwatch()
    contract = build.contract(scanned.listing.arrow_schema)
    training_rows = _training_rows(config)
    query_rows = config.recall_gate.query_rows
    drawn = SmallestHashSample(
        max(training_rows + (1 + _POOL) * query_rows, 2 * _FEWEST_QUERIES), config.vector_spec.dim, contract.kept_schema
    )
    with scratch() as folder:
        path = folder / "rejects.parquet"
        reasons, repeated = _first_pass(build, scanned, contract, drawn, folder, path)
        key = f"{ledger.root}/rejects-{uuid.uuid4().hex[:8]}.parquet"
        rejects = ledger.put_file(path, key, rows=reasons.total())
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
        run_id=ledger.run_id,
        inputs=scanned.build_key,
        rows_in=scanned.rows,
        rejected=reasons.total(),
        reject_reasons=dict(reasons),
        rejects=rejects,
        training=_put_vectors(ledger, "training", rows.select(["id"]).slice(rest, training_rows), vectors[rest:]),
        queries=_put_vectors(ledger, "queries", rows.slice(0, queries if disjoint else len(rows)), vectors),
        pool=_put_vectors(ledger, "pool", pool, vectors[first:]) if len(pool) else None,
        disjoint=disjoint,
        # One value that many rows have is rarely among those drawn by its hash, but often among the rows drawn.
        repeated=max(repeated, _repeated(hash_vectors(vectors))),
        seconds=watch.seconds,
    )


def _training_rows(config: WriteConfig) -> int:
    """Size of the training sample; 0 where there is nothing to train."""
    if not isinstance(config.sharding, ClusterSharding | LshSharding):
        return 0
    return config.sharding.training_rows or max(256 * config.shards, 10_000)


def _first_pass(
    build: Build, scanned: ScanReceipt, contract: RowContract, drawn: SmallestHashSample, folder: Path, path: Path
) -> tuple[Counter[str], float]:
    """Validates all rows, writes the rejects to ``path``, fills the sample.

    Returns:
        Rejected rows by reason, and the part of the rows whose vector another row has, too.
    """
    reasons: Counter[str] = Counter()
    listing = scanned.listing
    store = Store.open(listing.root, build.config.s3)
    duplicates = DuplicateFinder(folder, scanned.rows, contract.stored_schema.field("id").type)
    done, step = 0, np.uint64(max(1, scanned.rows // _DISTINCT))
    seen: list[UInt64] = []
    with pq.ParquetWriter(path, REJECT_SCHEMA) as rejects:
        for number, file in enumerate(listing.files):
            span = Span(file=number, first_unit=0, last_unit=len(file.unit_rows))
            for batch in read_span(store, file, span, listing.arrow_schema, build.config.batch_rows):
                checked = contract.check(batch)
                hashes = hash_column(checked.ids)
                duplicates.add(checked.ids, hashes, checked.rows)
                drawn.add(checked.kept, hashes, checked.rows, checked.vectors)
                vectors = hash_vectors(checked.vectors)
                seen.append(vectors[vectors % step == 0])
                if checked.rejects.num_rows:
                    reasons.update(checked.count_reasons())
                    rejects.write_batch(checked.rejects)
                done += batch.rows.num_rows
                build.report("sample", done, scanned.rows)
                build.renew(scanned)
        for repeats in duplicates.repeats():
            if repeats.num_rows:
                reasons[RejectReason.DUPLICATE_ID.value] += repeats.num_rows
                rejects.write_table(_as_rejects(listing, repeats))
    return reasons, _repeated(np.concatenate(seen) if seen else np.empty(0, np.uint64))


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


def _put_vectors(ledger: Ledger, name: str, rows: pa.Table, vectors: Float32) -> Ref:
    flat = pa.array(np.ascontiguousarray(vectors[: len(rows)]).ravel())
    column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return ledger.put_table(f"samples/{name}", rows.add_column(1, "vector", column))


def check_rejects(build: Build, receipt: SampleReceipt) -> None:
    """Whether enough rows satisfied the contract.

    Raises:
        DataContractError: more rows were rejected than ``max_reject_fraction`` allows.
        SourceEmptyError: no row was left.
        ConfigError: fewer rows than shards were left.
    """
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
