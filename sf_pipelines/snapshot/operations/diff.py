"""What is different between two snapshots: config, rows, shards, routing, recall, bytes, and the answers they give."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import OperationError
from sf_pipelines.snapshot.gate.compare import (
    AnswerOverlap,
    IdChanges,
    RoutingShift,
    compare_answers,
    compare_ids,
    routing_shift,
)
from sf_pipelines.snapshot.gate.verdicts import RecallFigures, judged_recall
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.operations.rollback import ServedHistory, open_published
from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.reader.state import SnapshotState, load_state
from sf_pipelines.snapshot.run.build import Progress, scratch, silent
from sf_pipelines.snapshot.store import Store


@dataclass(frozen=True)
class SnapshotSide:
    """One of the two snapshots, with the recall that its gate judged; None where nobody knows it any more."""

    run_id: str
    manifest_key: str
    created_at: datetime
    rows: int
    shards: int
    bytes: int
    recall: RecallFigures | None


@dataclass(frozen=True)
class FieldChange:
    """A setting that differs."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class ShardChange:
    """One shard; zeros on the side that does not have it."""

    db_id: int
    rows_before: int
    rows_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class SnapshotDiff:
    """What is different.

    Attributes:
        before: the earlier snapshot of the two that were named.
        after: the later one.
        config: settings that differ.
        ids: rows by id; None when they were not compared.
        shards: every shard of either side.
        routing: how far what routes has moved; None where it cannot be compared.
        overlap: how far both give the same answers; None where it was not measured.
        notes: what was not compared, and why.
    """

    before: SnapshotSide
    after: SnapshotSide
    config: tuple[FieldChange, ...]
    ids: IdChanges | None
    shards: tuple[ShardChange, ...] = field(repr=False)
    routing: RoutingShift | None
    overlap: AnswerOverlap | None
    notes: tuple[str, ...]


def diff(
    root: str | Path | Store,
    before: str | None = None,
    after: str | None = None,
    *,
    s3: S3Options | None = None,
    ids: bool = True,
    answers: bool = True,
    progress: Progress | None = None,
) -> SnapshotDiff:
    """Compares two snapshots: by default the current one with what was served before it.

    Args:
        root: the snapshot's root.
        before: run id; None is what was served before the current one.
        after: run id; None is the current one.
        s3: credentials.
        ids: compare the rows by id; fetches every shard of both, one at a time.
        answers: compare the answers to the query sample of the newer one; fetches the shards that are asked.
        progress: told how many shards have been read.

    Raises:
        OperationError: nothing is current, or nothing was served before, and no run was named.
        SfPipelinesError: a run is not published or has no vectors, or a manifest or a shard is damaged.
    """
    store = open_published(root, s3)
    old, new = _two(store, before, after)
    notes: list[str] = []
    sizes = [_sizes(store, state) for state in (old, new)]
    with scratch() as folder:
        changes = None
        if ids:
            # Copies that are read once: what readers keep in their cache is left to them.
            cache = ShardCache(Path(folder), max_bytes=0)
            changes = compare_ids(store, old, new, cache, _counter(progress or silent, old, new))
        overlap = None
        if answers:
            overlap = compare_answers(store, s3, old, new, Path(folder), notes)
    return SnapshotDiff(
        before=_side(store, old, sizes[0]),
        after=_side(store, new, sizes[1]),
        config=_config_changes(old, new),
        ids=changes,
        shards=_shard_changes(old, new, sizes),
        routing=routing_shift(old, new, notes),
        overlap=overlap,
        notes=tuple(notes),
    )


def _two(store: Store, before: str | None, after: str | None) -> tuple[SnapshotState, SnapshotState]:
    pointer = read_pointer(store).pointer
    past = ServedHistory.of(store, pointer)
    if pointer is None and after is None:
        raise OperationError(f"nothing is current under {store.url}; name two runs")
    if before is None:
        previous = pointer.previous if pointer is not None else None
        if previous is not None:
            before = previous.run_id
        elif len(past.served) > 1:
            # Moved by a writer that does not say what was served before.
            before = past.served[-2].run_id
        else:
            raise OperationError(f"nothing was served before the current snapshot of {store.url}; name a run")
    if after is None and pointer is not None:
        after = pointer.run_id
    old, new = (past.find(run_id or "") for run_id in (before, after))
    return load_state(store, old.manifest_key), load_state(store, new.manifest_key)


def _counter(report: Progress, *states: SnapshotState) -> Callable[[], None]:
    total = sum(1 for state in states for entry in state.shards if entry.key is not None)
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        report("diff", done, total, "shards")

    return one_more


# Sides.


def _sizes(store: Store, state: SnapshotState) -> dict[int, int]:
    """Bytes of each shard: as sealed, else as they are stored."""
    sizes: dict[int, int] = {}
    for entry in state.shards:
        if entry.objects is not None:
            sizes[entry.db_id] = sum(item.size for item in entry.objects)
        elif entry.key is not None:
            sizes[entry.db_id] = sum(info.size for info in store.objects(entry.key))
    return sizes


def _side(store: Store, state: SnapshotState, sizes: dict[int, int]) -> SnapshotSide:
    return SnapshotSide(
        run_id=state.manifest.run_id,
        manifest_key=state.manifest_key,
        created_at=state.manifest.created_at,
        rows=state.manifest.row_count,
        shards=sum(1 for entry in state.shards if entry.key is not None),
        bytes=sum(sizes.values()),
        recall=judged_recall(store, state.manifest, state.manifest_digest),
    )


def _config_changes(old: SnapshotState, new: SnapshotState) -> tuple[FieldChange, ...]:
    before, after = _settings(old), _settings(new)
    return tuple(FieldChange(name, before[name], after[name]) for name in before if before[name] != after[name])


def _settings(state: SnapshotState) -> dict[str, Any]:
    """What a snapshot says of how it was built, in the words of the configuration."""
    extras, vector = state.manifest.extras, state.vector
    described = {
        name: value
        for name, value in state.routing.describe().items()
        if name not in {"sharding_strategy", "num_hash_bits"}
    }
    return {
        "kind": state.kind,
        "num_dbs": state.manifest.num_dbs,
        "strategy": state.routing.strategy,
        "dim": state.dim,
        "metric": state.metric.value,
        "backend": state.backend,
        "index_type": vector.index_type,
        "quantization": vector.quantization,
        "vector_type": state.vector_type,
        "num_probes": None if state.kind == "unified" else vector.num_probes,
        "num_hash_bits": vector.num_hash_bits,
        "cel_expr": described.get("cel_expr"),
        "cel_columns": described.get("cel_columns"),
        "routing_values": described.get("routing_values"),
        "key_encoding": state.key_encoding if state.kind == "unified" else None,
        "id_type": extras.id_type if extras else None,
        "key_type": extras.key_type if extras else None,
        "value_format": extras.value_format if extras else None,
        "filter_columns": dict(extras.filter_columns) if extras else None,
        "recall_gate.k": extras.recall.k if extras and extras.recall else None,
        "recall_gate.min_recall": extras.recall.min_recall if extras and extras.recall else None,
        "writer": "sf_pipelines" if extras else "another",
    }


# Shards.


def _shard_changes(old: SnapshotState, new: SnapshotState, sizes: list[dict[int, int]]) -> tuple[ShardChange, ...]:
    rows = [{entry.db_id: entry.rows for entry in state.shards} for state in (old, new)]
    return tuple(
        ShardChange(
            db_id=db_id,
            rows_before=rows[0].get(db_id, 0),
            rows_after=rows[1].get(db_id, 0),
            bytes_before=sizes[0].get(db_id, 0),
            bytes_after=sizes[1].get(db_id, 0),
        )
        for db_id in range(max(old.manifest.num_dbs, new.manifest.num_dbs))
    )
