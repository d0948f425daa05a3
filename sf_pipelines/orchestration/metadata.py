"""Receipts and verdicts as Dagster metadata."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from sf_pipelines.orchestration import pictures
from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.errors import IntegrityError, ObjectMissingError
from sf_pipelines.snapshot.gate.verdicts import Verdict, judged_recall
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.reader.state import load_pointed
from sf_pipelines.snapshot.routing.projection import project
from sf_pipelines.snapshot.routing.protocol import VectorRouting
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.ledger import STAGING
from sf_pipelines.snapshot.run.receipts import (
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

_CONSTANT = frozenset({"compared", "k", "limit", "queries", "min_recall", "fields"})
# Rows of a table that the UI still shows at a glance.
_TABLE_ROWS = 100


def reference(receipt: Receipt) -> dict[str, str]:
    """What is passed to the next asset."""
    return {"run_id": receipt.run_id, "key": receipt.key, "digest": receipt.digest}


def materialized(receipt: Receipt, metadata: Mapping[str, Any]) -> dg.MaterializeResult:
    """A stage's receipt as its asset's materialization; the same receipt again is the same data version."""
    return dg.MaterializeResult(
        value=reference(receipt),
        metadata=told(receipt, metadata),
        data_version=dg.DataVersion(data_version(receipt)),
    )


def told(receipt: Receipt, metadata: Mapping[str, Any]) -> Metadata:
    """What an asset's event says: its figures first, ids and receipts last."""
    return readable({**metadata, **receipt_metadata(receipt)})


def readable(metadata: Mapping[str, Any]) -> Metadata:
    """Numbers as a person reads them: four digits, and MiB in place of bytes."""
    shown: Metadata = {}
    for name, value in metadata.items():
        if name.endswith("bytes") and isinstance(value, int | float):
            shown[f"{name.removesuffix('bytes')}MiB"] = _short(value / 2**20)
        else:
            shown[name] = _short(value) if isinstance(value, float) else value
    return shown


def _short(value: float) -> float:
    return round(value, 4) if abs(value) >= 1e-3 else float(f"{value:.3g}")


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


def scan_metadata(build: Build, receipt: ScanReceipt) -> Metadata:
    """The pinned source."""
    files = receipt.listing.files
    sizing = {"sizing": receipt.sizing} if receipt.sizing else {}
    return {
        "dagster/uri": receipt.listing.root,
        "dagster/column_schema": _columns(receipt, build.config.row_columns),
        "dagster/row_count": receipt.rows,
        "num_dbs": build.config.shards,
        **sizing,
        "build_key": receipt.build_key,
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "already_published": receipt.published,
        "source_files": table([file.model_dump(mode="json") for file in files[:_TABLE_ROWS]]),
    }


def sample_metadata(build: Build, receipt: SampleReceipt) -> Metadata:
    """Validated rows and the samples drawn from them."""
    reasons = [{"reason": reason, "rows": rows} for reason, rows in sorted(receipt.reject_reasons.items())]
    return {
        "dagster/uri": build.store.url_of(receipt.training.key),
        "dagster/row_count": receipt.rows_kept,
        "rows_in": receipt.rows_in,
        "rejected": receipt.rejected,
        "reject_rate": receipt.rejected / max(1, receipt.rows_in),
        "training_rows": receipt.train_rows,
        "query_rows": receipt.query_rows,
        "rejects": build.store.url_of(receipt.rejects_key),
    } | ({"reject_reasons": table(reasons)} if reasons else {})


def train_metadata(build: Build, receipt: TrainReceipt) -> Metadata:
    """The routing artifact."""
    return {
        "dagster/uri": build.store.url_of(receipt.ref.key),
        "shape": " x ".join(str(size) for size in receipt.shape),
        **receipt.figures,
        "kept_from_current_snapshot": receipt.kept,
        **({} if receipt.drift is None else {"drift": receipt.drift}),
        **({"trained_anew_because": receipt.retrained} if receipt.retrained else {}),
        receipt.artifact: build.store.url_of(receipt.ref.key),
        **_plane(build, receipt),
    }


def route_metadata(build: Build, receipt: RouteReceipt) -> Metadata:
    """Rows of each shard."""
    sizes = [shard.rows for shard in receipt.shards]
    rows = [{"shard": shard.db_id, "rows": shard.rows} for shard in receipt.shards[:_TABLE_ROWS]]
    return {
        "dagster/uri": build.store.url_of(f"{STAGING}/run_id={receipt.run_id}"),
        "dagster/row_count": receipt.rows,
        "index_family": str(receipt.index_family),
        "largest_shard_rows": max(sizes),
        "smallest_shard_rows": min(sizes),
        "empty_shards": sizes.count(0),
        "shards": table(rows),
        "shard_sizes": pictures.shard_sizes(receipt.shards),
    }


def shard_metadata(build: Build, receipt: ShardReceipt) -> Metadata:
    """One shard's index."""
    facts = {
        "dagster/row_count": receipt.rows,
        "indexed_rows": receipt.indexed_rows,
        "bytes": receipt.bytes,
        "objects": len(receipt.objects),
        "attempt": receipt.attempt,
        **({"copied_from": receipt.reused} if receipt.reused else {}),
        **({"dagster/uri": build.store.url_of(receipt.db_key)} if receipt.db_key else {}),
        "shard": receipt.db_key or "(empty shard)",
    }
    return told(receipt, facts)


def manifest_metadata(build: Build, receipt: ManifestReceipt) -> Metadata:
    """The staged manifest and the measured curve."""
    chosen = next((point for point in receipt.curve if point.num_probes == receipt.num_probes), None)
    figures = {} if chosen is None else {"tuning_recall": chosen.recall, "tuning_recall_lower_bound": chosen.lower}
    gate = build.config.recall_gate
    picture = pictures.recall_by_probes(receipt.curve, receipt.latencies, receipt.num_probes, gate.min_recall, gate.k)
    return {
        "dagster/uri": build.store.url_of(receipt.manifest_key),
        "dagster/row_count": receipt.rows,
        "num_probes": receipt.num_probes,
        **figures,
        "manifest": receipt.manifest_key,
        "manifest_digest": receipt.manifest_digest,
        "recall_curve": curve_table(receipt.curve),
        "recall_and_latency_by_probes": picture,
        **_cost(build, receipt),
    }


def promote_metadata(build: Build, receipt: PromoteReceipt) -> Metadata:
    """The pointer: what readers get first, then how it came there."""
    return {
        **served_metadata(build),
        "published": receipt.published,
        "seq": receipt.seq,
        "dagster/uri": build.store.url,
        "manifest": receipt.manifest_ref,
        "previous_run_id": receipt.previous_run_id or "(none)",
    }


def served_metadata(build: Build) -> Metadata:
    """What readers get now: recall, rows, bytes, since when; nothing where the pointer cannot be followed."""
    pointer = read_pointer(build.store).pointer
    if pointer is None:
        return {}
    try:
        state = load_pointed(build.store, pointer)
        recall = judged_recall(build.store, state.manifest, state.manifest_digest)
    except (IntegrityError, ObjectMissingError):
        # For readers and for verify to say; here it is not what was asked.
        return {}
    return {
        **({"recall": recall.recall, "recall_lower_bound": recall.lower} if recall else {}),
        "dagster/row_count": state.manifest.row_count,
        "bytes": sum(shard.db_bytes or 0 for shard in state.manifest.shards),
        "since": dg.MetadataValue.timestamp(pointer.updated_at),
    }


def verdict_metadata(verdict: Verdict) -> Metadata:
    """A check's figures."""
    rows = list(verdict.table)[:_TABLE_ROWS]
    reason = {"reason": verdict.reason} if verdict.reason else {}
    # What the configuration says is text: Dagster plots every number over time.
    figures = {name: str(value) if name in _CONSTANT else value for name, value in verdict.figures.items()}
    return readable({**figures, **reason}) | ({"table": table(rows)} if rows else {})


def _columns(receipt: ScanReceipt, wanted: Sequence[str]) -> dg.TableSchema:
    """The source columns that a build reads."""
    schema = receipt.listing.arrow_schema
    return dg.TableSchema(columns=[dg.TableColumn(name, str(schema.field(name).type)) for name in wanted])


def _plane(build: Build, receipt: TrainReceipt) -> Metadata:
    """The training data as a picture; nothing where it is gone or damaged, which is for the stages to mind."""
    ledger = build.ledger(receipt.run_id)
    try:
        routing = build.routing(receipt)
        sample = vectors_of(ledger.get_table(ledger.need(SampleReceipt).training))
    except (ObjectMissingError, IntegrityError):
        return {}
    if not isinstance(routing, VectorRouting):
        raise TypeError(f"{routing.strategy} was trained, and does not route by vector")
    return {"training_data_on_a_plane": pictures.projection(project(sample, routing, build.config.vector_spec.metric))}


def _cost(build: Build, receipt: ManifestReceipt) -> Metadata:
    """What the build has taken so far: work of all stages, wherever it was done, and bytes stored."""
    run, ledger = build.receipts(receipt.run_id), build.ledger(receipt.run_id)
    shards = [ledger.read(ShardReceipt, key) for key in receipt.shards]
    seconds = {
        "sample_seconds": run.sampled.seconds,
        **({"train_seconds": run.trained.seconds} if run.trained else {}),
        "route_seconds": run.routed.seconds,
        "shards_seconds": sum(shard.seconds for shard in shards),
        "assemble_seconds": receipt.seconds,
    }
    return {
        **{name: round(value, 3) for name, value in seconds.items()},
        "build_seconds": round(run.scanned.seconds + sum(seconds.values()), 3),
        "stored_bytes": sum(shard.bytes for shard in shards),
        "shards_copied": sum(shard.reused is not None for shard in shards),
    }


def curve_table(curve: Sequence[CurvePoint]) -> dg.TableMetadataValue:
    """Recall by number of probes."""
    return table([point.model_dump(mode="json") for point in curve])


def table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Rows of plain values as a table that the UI shows inline."""
    records = [dg.TableRecord({name: _cell(value) for name, value in readable(row).items()}) for row in rows]
    first = records[0].data if records else {}
    columns = [dg.TableColumn(name, _column_type([record.data[name] for record in records])) for name in first]
    return dg.MetadataValue.table(records, schema=dg.TableSchema(columns=columns))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of plain values as a table in markdown, for the log and the UI."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([_text(row[name]) for name in names] for row in map(readable, rows))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(value: Any) -> str:
    shown = "" if value is None else f"{value:,}" if isinstance(value, int | float) else str(value)
    return shown.replace("|", "\\|").replace("\n", " ")


def _cell(value: Any) -> str | int | float | bool | None:
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _column_type(values: Sequence[Any]) -> str:
    kinds = {type(value) for value in values}
    return {bool: "bool", int: "int", float: "float"}.get(kinds.pop(), "string") if len(kinds) == 1 else "string"
