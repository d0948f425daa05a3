"""Receipts and verdicts as Dagster metadata. No figure is computed here."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from sf_pipelines.snapshot.gate import Verdict
from sf_pipelines.snapshot.receipts import (
    CurvePoint,
    ManifestReceipt,
    PromoteReceipt,
    Receipt,
    RouteReceipt,
    SampleReceipt,
    ScanReceipt,
    ShardReceipt,
    TrainReceipt,
)

Metadata = dict[str, Any]

# Rows of a table that the UI still shows at a glance.
_TABLE_ROWS = 100


def reference(receipt: Receipt) -> dict[str, str]:
    """What is passed to the next asset."""
    return {"run_id": receipt.run_id, "key": receipt.key, "digest": receipt.digest}


def materialized(receipt: Receipt, metadata: Mapping[str, Any]) -> dg.MaterializeResult:
    """A stage's receipt as its asset's materialization; the same receipt again is the same data version."""
    return dg.MaterializeResult(
        value=reference(receipt),
        metadata={**receipt_metadata(receipt), **metadata},
        data_version=dg.DataVersion(data_version(receipt)),
    )


def data_version(receipt: Receipt) -> str:
    """What changes exactly when the asset's content does, and not with the circumstances that a receipt tells too."""
    if isinstance(receipt, ScanReceipt):
        return receipt.build_key
    if isinstance(receipt, ManifestReceipt | PromoteReceipt):
        return receipt.manifest_digest
    return receipt.digest


def receipt_metadata(receipt: Receipt) -> Metadata:
    """What every receipt says."""
    common: Metadata = {
        "run_id": receipt.run_id,
        "receipt": receipt.key,
        "seconds": round(receipt.seconds, 3),
    }
    return common | ({"reason": receipt.reason} if receipt.reason else {})


def scan_metadata(receipt: ScanReceipt) -> Metadata:
    """The pinned source."""
    files = receipt.listing.files
    return {
        "dagster/row_count": receipt.rows,
        "build_key": receipt.build_key,
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "already_published": receipt.published,
        "source_files": table([file.model_dump(mode="json") for file in files[:_TABLE_ROWS]]),
    }


def sample_metadata(receipt: SampleReceipt) -> Metadata:
    """Validated rows and the samples drawn from them."""
    reasons = [{"reason": reason, "rows": rows} for reason, rows in sorted(receipt.reject_reasons.items())]
    return {
        "dagster/row_count": receipt.rows_kept,
        "rows_in": receipt.rows_in,
        "rejected": receipt.rejected,
        "training_rows": receipt.train_rows,
        "query_rows": receipt.query_rows,
        "rejects": receipt.rejects_key,
    } | ({"reject_reasons": table(reasons)} if reasons else {})


def train_metadata(receipt: TrainReceipt) -> Metadata:
    """The routing artifact."""
    return {
        "shape": " x ".join(str(size) for size in receipt.shape),
        **receipt.figures,
        "kept_from_current_snapshot": receipt.kept,
        **({} if receipt.drift is None else {"drift": receipt.drift}),
        **({"trained_anew_because": receipt.retrained} if receipt.retrained else {}),
        receipt.artifact: receipt.ref.key,
    }


def route_metadata(receipt: RouteReceipt) -> Metadata:
    """Rows of each shard."""
    sizes = [shard.rows for shard in receipt.shards]
    rows = [{"shard": shard.db_id, "rows": shard.rows} for shard in receipt.shards[:_TABLE_ROWS]]
    return {
        "dagster/row_count": receipt.rows,
        "index_family": str(receipt.index_family),
        "largest_shard_rows": max(sizes),
        "smallest_shard_rows": min(sizes),
        "empty_shards": sizes.count(0),
        "shards": table(rows),
    }


def shard_metadata(receipt: ShardReceipt) -> Metadata:
    """One shard's index."""
    return receipt_metadata(receipt) | {
        "dagster/row_count": receipt.rows,
        "indexed_rows": receipt.indexed_rows,
        "bytes": receipt.bytes,
        "objects": len(receipt.objects),
        "attempt": receipt.attempt,
        "shard": receipt.db_key or "(empty shard)",
        **({"copied_from": receipt.reused} if receipt.reused else {}),
    }


def manifest_metadata(receipt: ManifestReceipt) -> Metadata:
    """The staged manifest and the measured curve."""
    chosen = next((point for point in receipt.curve if point.num_probes == receipt.num_probes), None)
    figures = {} if chosen is None else {"tuning_recall": chosen.recall, "tuning_recall_lower_bound": chosen.lower}
    return {
        "dagster/row_count": receipt.rows,
        "num_probes": receipt.num_probes,
        **figures,
        "manifest": receipt.manifest_key,
        "manifest_digest": receipt.manifest_digest,
        "recall_curve": curve_table(receipt.curve),
    }


def promote_metadata(receipt: PromoteReceipt) -> Metadata:
    """The pointer."""
    return {
        "published": receipt.published,
        "previous_run_id": receipt.previous_run_id or "(none)",
        "seq": receipt.seq,
        "manifest": receipt.manifest_ref,
    }


def verdict_metadata(verdict: Verdict) -> Metadata:
    """A check's figures."""
    rows = list(verdict.table)[:_TABLE_ROWS]
    reason = {"reason": verdict.reason} if verdict.reason else {}
    return {"message": verdict.message, **verdict.figures, **reason} | ({"table": table(rows)} if rows else {})


def curve_table(curve: Sequence[CurvePoint]) -> dg.TableMetadataValue:
    """Recall by number of probes."""
    return table([point.model_dump(mode="json") for point in curve])


def table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Rows of plain values as a table that the UI shows inline."""
    records = [dg.TableRecord({name: _cell(value) for name, value in row.items()}) for row in rows]
    first = records[0].data if records else {}
    columns = [dg.TableColumn(name, _column_type([record.data[name] for record in records])) for name in first]
    return dg.MetadataValue.table(records, schema=dg.TableSchema(columns=columns))


def _cell(value: Any) -> str | int | float | bool | None:
    if isinstance(value, float):
        return round(value, 6)
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _column_type(values: Sequence[Any]) -> str:
    kinds = {type(value) for value in values}
    return {bool: "bool", int: "int", float: "float"}.get(kinds.pop(), "string") if len(kinds) == 1 else "string"
