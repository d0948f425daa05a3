"""Building one shard's index, uploading it, and sealing what was uploaded."""

import hashlib
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sf_pipelines.snapshot.build import Build, Stopwatch, scratch
from sf_pipelines.snapshot.errors import CountMismatchError, IndexBuildError
from sf_pipelines.snapshot.evaluation import truth_table
from sf_pipelines.snapshot.index import backend_named
from sf_pipelines.snapshot.index.protocol import IndexFamily
from sf_pipelines.snapshot.index.scan import MemoryScan
from sf_pipelines.snapshot.manifest.models import ShardObject
from sf_pipelines.snapshot.reader.cache import ShardCache, shard_digest
from sf_pipelines.snapshot.receipts import Ledger, Ref, RoutedShard, RouteReceipt, SampleReceipt, ShardReceipt
from sf_pipelines.snapshot.routed import vectors_of
from sf_pipelines.snapshot.source.hashing import hash_column
from sf_pipelines.snapshot.store import Store

# Rows of each shard that the round trip must find again.
_WITNESSES = 4


def is_intact(store: Store, receipt: ShardReceipt) -> bool:
    """Whether every sealed object is still the version that was sealed."""
    return not changed_objects(store, receipt)


def changed_objects(store: Store, receipt: ShardReceipt) -> list[str]:
    """What is wrong with a sealed shard's objects, one line each; nothing when all are as they were sealed."""
    if receipt.db_key is None:
        return []
    found = {info.key: info for info in store.objects(receipt.db_key)}
    faults: list[str] = []
    for item, etag in zip(receipt.objects, receipt.etags, strict=True):
        key = f"{receipt.db_key}/{item.path}"
        info = found.pop(key, None)
        if info is None:
            faults.append(f"{store.url_of(key)} is missing")
        elif (info.size, info.etag) != (item.size, etag):
            faults.append(f"{store.url_of(key)} was changed after it was sealed")
    faults.extend(f"{store.url_of(key)} does not belong to the shard" for key in found)
    return faults


def seal_shard(
    build: Build, ledger: Ledger, routed: RouteReceipt, shard: RoutedShard, rows: pa.Table | None, attempt: int
) -> ShardReceipt:
    """Builds the index from its rows, uploads it, and re-opens what was uploaded to count and digest it."""
    watch = Stopwatch()
    part = f"db={shard.db_id:05d}"
    made: dict[str, Any] = {"db_key": None, "indexed_rows": 0}
    if rows is not None:
        token = uuid.uuid4().hex
        db_key = f"shards/run_id={ledger.run_id}/{part}/attempt={attempt:02d}-{token[:8]}"
        objects, etags = _build_and_upload(build, routed, rows, db_key)
        indexed = _reopen(build, db_key, objects, expected_rows=shard.rows)
        truth, witnesses = _evidence(build, ledger, rows, part)
        made = {
            "db_key": db_key,
            "indexed_rows": indexed,
            "objects": objects,
            "etags": etags,
            "checkpoint_id": token,
            "truth": truth,
            "witnesses": witnesses,
        }
    return ShardReceipt(
        run_id=ledger.run_id,
        inputs=routed.inputs,
        db_id=shard.db_id,
        attempt=attempt,
        rows=shard.rows,
        rows_digest=shard.digest,
        seconds=watch.seconds,
        **made,
    )


def _build_and_upload(
    build: Build, routed: RouteReceipt, rows: pa.Table, db_key: str
) -> tuple[tuple[ShardObject, ...], tuple[str | None, ...]]:
    spec = build.config.vector_spec
    with scratch() as folder:
        report = backend_named(spec.backend).build(
            rows, folder, family=IndexFamily(routed.index_family), metric=spec.metric, params=spec.index_params
        )
        if report.indexed_rows != rows.num_rows:
            raise IndexBuildError(
                f"{build.store.url_of(db_key)}: the index covers {report.indexed_rows} of {rows.num_rows} rows"
            )
        objects: list[ShardObject] = []
        etags: list[str | None] = []
        for path in sorted(item for item in folder.rglob("*") if item.is_file()):
            name = path.relative_to(folder).as_posix()
            objects.append(ShardObject(path=name, size=path.stat().st_size, sha256=_sha256(path)))
            build.store.upload(path, f"{db_key}/{name}")
            etags.append(build.store.head(f"{db_key}/{name}").etag)
    return tuple(objects), tuple(etags)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reopen(build: Build, db_key: str, objects: tuple[ShardObject, ...], *, expected_rows: int) -> int:
    """Opens a verified copy of what was uploaded; indexed rows."""
    spec = build.config.vector_spec
    where = build.store.url_of(db_key)
    with ShardCache(build.cache_dir).checkout(build.store, db_key, objects, shard_digest(objects)) as folder:
        index = backend_named(spec.backend).open(folder, metric=spec.metric, dim=spec.dim)
        try:
            if index.rows != expected_rows:
                raise CountMismatchError(f"{where}: {expected_rows} rows were routed, {index.rows} are stored")
            if index.indexed_rows != expected_rows:
                raise IndexBuildError(f"{where}: the index covers {index.indexed_rows} of {index.rows} rows")
            return index.indexed_rows
        finally:
            index.close()


def _evidence(build: Build, ledger: Ledger, rows: pa.Table, part: str) -> tuple[Ref, Ref]:
    """While the rows are in memory: each sample query's exact neighbours among them, and rows to find again."""
    sampled = ledger.need(SampleReceipt)
    queries = vectors_of(ledger.get_table(sampled.queries))
    # One more than k: a query's own row is left out when the shards are merged.
    k = build.config.recall_gate.k + 1
    ids = rows.column("id").combine_chunks()
    scan = MemoryScan(ids, np.arange(len(ids)), vectors_of(rows), build.config.vector_spec.metric)
    truth = truth_table(ids, scan.search(queries, k))
    chosen = np.argsort(hash_column(ids), kind="stable")[:_WITNESSES]
    witnesses = rows.take(pa.array(chosen)).combine_chunks()
    return ledger.put_table(f"truth/{part}", truth), ledger.put_table(f"witnesses/{part}", witnesses)
