"""Receipts and verdicts as Dagster metadata and events."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dagster as dg

from sf_pipelines.orchestration import pictures
from sf_pipelines.orchestration.graph import CODE_VERSION
from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.errors import IntegrityError, ObjectMissingError
from sf_pipelines.snapshot.gate.verdicts import Verdict, judged_recall
from sf_pipelines.snapshot.manifest.pointer import Pointer
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.reader.state import SnapshotState, load_pointed
from sf_pipelines.snapshot.routing.projection import project
from sf_pipelines.snapshot.routing.protocol import VectorRouting
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.ledger import STAGING
from sf_pipelines.snapshot.run.receipts import (
    ManifestReceipt,
    PromoteReceipt,
    Receipt,
    RouteReceipt,
    SampleReceipt,
    ScanReceipt,
    ShardReceipt,
    TrainReceipt,
)
from sf_pipelines.snapshot.store import Store

Metadata = dict[str, Any]

_CONSTANT = frozenset({"compared", "k", "limit", "queries", "min_recall", "fields"})
# Rows of a table that the UI still shows at a glance.
_TABLE_ROWS = 100


def reference(receipt: Receipt) -> dict[str, str]:
    """What is passed to the next asset."""
    return {"run_id": receipt.run_id, "key": receipt.key, "digest": receipt.digest}


def event_metadata(build: Build, receipt: Receipt) -> Metadata:
    """Metadata of an asset's event: its figures first, ids and receipts last; without those that are None."""
    figures = _FIGURES[receipt.stage](build, receipt) | {
        "run_id": receipt.run_id,
        "receipt": receipt.key,
        "seconds": round(receipt.seconds, 3),
        "reason": receipt.reason or None,
    }
    return readable({name: value for name, value in figures.items() if value is not None})


def materialization(
    build: Build,
    receipt: Receipt,
    key: dg.AssetKey,
    parents: Mapping[str, tuple[str, str]],
    partition: str | None = None,
) -> dg.AssetMaterialization:
    """The event of an asset that no step returns.

    Args:
        build: the build.
        receipt: of the stage that made the asset.
        key: the asset.
        parents: data version and event id of each parent asset, by which Dagster sees whether a parent has changed.
        partition: of the asset.
    """
    tags = {
        "dagster/data_version": data_version(receipt),
        "dagster/data_version_is_user_provided": "true",
        "dagster/code_version": CODE_VERSION,
    }
    for name, (version, event) in parents.items():
        tags |= {f"dagster/input_data_version/{name}": version, f"dagster/input_event_pointer/{name}": event}
    return dg.AssetMaterialization(key, partition=partition, metadata=event_metadata(build, receipt), tags=tags)


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
    """Changes exactly when the asset's content does; a receipt also records circumstances."""
    if isinstance(receipt, ScanReceipt):
        return receipt.build_key
    if isinstance(receipt, ManifestReceipt | PromoteReceipt):
        return receipt.manifest_digest
    return receipt.digest


def _scan(build: Build, receipt: ScanReceipt) -> Metadata:
    """The pinned source."""
    files, schema = receipt.listing.files, receipt.listing.arrow_schema
    columns = [dg.TableColumn(name, str(schema.field(name).type)) for name in build.config.row_columns]
    return {
        "dagster/uri": receipt.listing.root,
        "dagster/column_schema": dg.TableSchema(columns=columns),
        "dagster/row_count": receipt.rows,
        "num_dbs": build.config.shards,
        "sizing": receipt.sizing or None,
        "build_key": receipt.build_key,
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "already_published": receipt.published,
        "source_files": table([file.model_dump(mode="json") for file in files[:_TABLE_ROWS]]),
    }


def _sample(build: Build, receipt: SampleReceipt) -> Metadata:
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
        "rejects": build.store.url_of(receipt.rejects.key),
        "reject_reasons": table(reasons) if reasons else None,
    }


def _train(build: Build, receipt: TrainReceipt) -> Metadata:
    """The routing artifact."""
    return {
        "dagster/uri": build.store.url_of(receipt.ref.key),
        "shape": " x ".join(str(size) for size in receipt.shape),
        **receipt.figures,
        "kept_from_current_snapshot": receipt.kept,
        "drift": receipt.drift,
        "trained_anew_because": receipt.retrained or None,
        receipt.artifact: build.store.url_of(receipt.ref.key),
        "training_data_on_a_plane": _plane(build, receipt),
    }


def _route(build: Build, receipt: RouteReceipt) -> Metadata:
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


def _shard(build: Build, receipt: ShardReceipt) -> Metadata:
    """One shard's index."""
    return {
        "dagster/row_count": receipt.rows,
        "indexed_rows": receipt.indexed_rows,
        "bytes": receipt.bytes,
        "objects": len(receipt.objects),
        "attempt": receipt.attempt,
        "copied_from": receipt.reused,
        "dagster/uri": build.store.url_of(receipt.db_key) if receipt.db_key else None,
        "shard": receipt.db_key or "(empty shard)",
    }


def _manifest(build: Build, receipt: ManifestReceipt) -> Metadata:
    """The staged manifest and the measured curve."""
    chosen = next((point for point in receipt.curve if point.num_probes == receipt.num_probes), None)
    gate = build.config.recall_gate
    picture = pictures.recall_by_probes(receipt.curve, receipt.latencies, receipt.num_probes, gate.min_recall, gate.k)
    return {
        "dagster/uri": build.store.url_of(receipt.manifest_key),
        "dagster/row_count": receipt.rows,
        "num_probes": receipt.num_probes,
        "tuning_recall": chosen.recall if chosen else None,
        "tuning_recall_lower_bound": chosen.lower if chosen else None,
        "manifest": receipt.manifest_key,
        "manifest_digest": receipt.manifest_digest,
        "recall_curve": table([point.model_dump(mode="json") for point in receipt.curve]),
        "recall_and_latency_by_probes": picture,
        **_cost(build, receipt),
    }


def _promote(build: Build, receipt: PromoteReceipt) -> Metadata:
    """The pointer: what readers get, then how it got there."""
    pointer = read_pointer(build.store).pointer
    try:
        served = served_metadata(build.store, pointer, load_pointed(build.store, pointer)) if pointer else {}
    except (IntegrityError, ObjectMissingError):
        # Readers and verify report it.
        served = {}
    return {
        **served,
        "published": receipt.published,
        "seq": receipt.seq,
        "dagster/uri": build.store.url,
        "manifest": receipt.manifest_ref,
        "previous_run_id": receipt.previous_run_id or "(none)",
    }


_FIGURES: dict[str, Callable[[Build, Any], Metadata]] = {
    ScanReceipt.stage: _scan,
    SampleReceipt.stage: _sample,
    TrainReceipt.stage: _train,
    RouteReceipt.stage: _route,
    ShardReceipt.stage: _shard,
    ManifestReceipt.stage: _manifest,
    PromoteReceipt.stage: _promote,
}


def served_metadata(store: Store, pointer: Pointer, state: SnapshotState) -> Metadata:
    """What readers get now: recall, rows, bytes, since when."""
    try:
        recall = judged_recall(store, state.manifest, state.manifest_digest)
    except (IntegrityError, ObjectMissingError):
        recall = None
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


def _plane(build: Build, receipt: TrainReceipt) -> dg.MarkdownMetadataValue | None:
    """The training data as a picture; None where it is gone or damaged: the stages report that."""
    run = build.run(receipt.run_id)
    try:
        routing = run.routing
        sample = vectors_of(run.get_table(run.sampled.training))
    except (ObjectMissingError, IntegrityError):
        return None
    if not isinstance(routing, VectorRouting):
        raise TypeError(f"{routing.strategy} was trained, and does not route by vector")
    return pictures.projection(project(sample, routing, build.config.vector_spec.metric))


def _cost(build: Build, receipt: ManifestReceipt) -> Metadata:
    """What the build has taken so far: work of all stages, wherever it was done, and bytes stored."""
    run = build.run(receipt.run_id)
    shards = [run.read(ShardReceipt, key) for key in receipt.shards]
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


def table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Rows of plain values as a table that the UI shows inline."""
    records = [dg.TableRecord({name: _cell(value) for name, value in readable(row).items()}) for row in rows]
    # Dagster takes the columns from the first row.
    return dg.MetadataValue.table(records, schema=None if records else dg.TableSchema(columns=[]))


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
