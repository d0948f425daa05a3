"""The drift check: how the staged snapshot differs from the one that is served now."""

from pathlib import Path
from typing import Any

from sf_pipelines.snapshot.config import DriftLimits
from sf_pipelines.snapshot.errors import IntegrityError, SfPipelinesError
from sf_pipelines.snapshot.gate.checks import Figures, Finding, Judged
from sf_pipelines.snapshot.gate.compare import compare_answers, compare_ids, routing_shift, rows_to_read
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.reader.state import SnapshotState, load_pointed, load_state
from sf_pipelines.snapshot.run.build import scratch

# Beyond so many rows in shards that have changed, of both snapshots, ids are not compared: it would take over a minute.
MOST_ROWS = 2_000_000


def drift(judged: Judged) -> Finding:
    """What changes for those who search: answers, rows, routing; against what the pointer names now.

    A current snapshot that cannot be read is no reason to keep a good one back: the message says so. That it is damaged
    is a warning.
    """
    new = load_state(judged.build.store, judged.receipt.manifest_key)
    limits = judged.build.config.drift
    try:
        return _against_current(judged, new)
    except SfPipelinesError as error:
        damaged = isinstance(error, IntegrityError) and not (limits and limits.blocking)
        why = f"the current snapshot cannot be compared with: {type(error).__name__}: {error}"
        return Finding(not damaged, why, {"compared": 0, "error": error.kind})


def _against_current(judged: Judged, new: SnapshotState) -> Finding:
    store = judged.build.store
    pointer = read_pointer(store).pointer
    if pointer is None:
        return _nothing("nothing is published yet, so there is nothing to compare with")
    if pointer.manifest_digest == judged.receipt.manifest_digest:
        return _nothing("this is the current snapshot itself")
    old = load_pointed(store, pointer)
    if reason := _incomparable(old, new):
        return _nothing(f"{pointer.run_id} cannot be compared with: {reason}")
    figures, notes = _compared(judged, old, new)
    limits = _limits(judged.build.config.drift)
    faults = _faults(limits, figures)
    message = f"compared with {pointer.run_id}: {_summary(figures)}"
    return Finding(not faults, "; ".join([*faults, message, *notes]), figures, _table(limits, figures))


def _nothing(why: str) -> Finding:
    return Finding(True, why, {"compared": 0})


def _incomparable(old: SnapshotState, new: SnapshotState) -> str:
    """Why nothing can be compared; empty where it can."""
    for name, before, after in (
        ("kind", old.kind, new.kind),
        ("dim", old.dim, new.dim),
        ("metric", old.metric.value, new.metric.value),
    ):
        if before != after:
            return f"its {name} is {before!r}, here it is {after!r}"
    return ""


def _compared(judged: Judged, old: SnapshotState, new: SnapshotState) -> tuple[Figures, list[str]]:
    build, notes = judged.build, list[str]()
    figures: Figures = {
        "compared": 1,
        "rows": new.manifest.row_count,
        "rows_before": old.manifest.row_count,
        "shards_reused": sum(shard.reused is not None for shard in judged.shards),
    }
    if (rows := rows_to_read(old, new)) > MOST_ROWS:
        notes.append(f"ids are not compared: {rows:,} rows would be read, more than {MOST_ROWS:,}")
    else:
        figures |= _rows(judged, old, new)
    overlap = compare_answers(build.store, build.config.s3, old, new, build.cache_dir, notes)
    if overlap is not None:
        figures |= {
            "overlap": overlap.mean,
            "overlap_lowest_tenth": overlap.lowest_tenth,
            "same_answers": overlap.same,
            "k": overlap.k,
            "queries": overlap.queries,
        }
    shift = routing_shift(old, new, notes)
    if shift is not None:
        figures |= {f"{shift.artifact}_shift_mean": shift.mean, f"{shift.artifact}_shift_largest": shift.largest}
    return figures, notes


def _rows(judged: Judged, old: SnapshotState, new: SnapshotState) -> Figures:
    """Rows that came and went, by id."""
    build = judged.build
    with scratch() as folder:
        # Copies that are read once: what readers keep in their cache is left to them.
        cache = ShardCache(Path(folder), max_bytes=0)
        changes = compare_ids(build.store, old, new, cache, lambda: build.renew(judged.run.scanned))
    rows = max(1, old.manifest.row_count)
    figures: Figures = {
        "rows_added": changes.added,
        "rows_gone": changes.gone,
        "rows_kept": changes.kept,
        "added_fraction": changes.added / rows,
        "gone_fraction": changes.gone / rows,
    }
    if changes.changed is not None:
        figures |= {"rows_changed": changes.changed, "changed_fraction": changes.changed / rows}
    return figures


def _limits(chosen: DriftLimits | None) -> dict[str, tuple[float, bool]]:
    """For each figure that is limited: the limit, and whether it is the least that is allowed."""
    if chosen is None:
        return {}
    limits = {
        "overlap": (chosen.min_overlap, True),
        "gone_fraction": (chosen.max_gone_fraction, False),
        "added_fraction": (chosen.max_added_fraction, False),
        "changed_fraction": (chosen.max_changed_fraction, False),
        "centroids_shift_largest": (chosen.max_routing_shift, False),
        "hyperplanes_shift_largest": (chosen.max_routing_shift, False),
    }
    return {name: (limit, is_floor) for name, (limit, is_floor) in limits.items() if limit is not None}


def _faults(limits: dict[str, tuple[float, bool]], figures: Figures) -> list[str]:
    """Which limits are passed; a figure that was not measured passes none."""
    faults: list[str] = []
    for name, (limit, is_floor) in limits.items():
        found = figures.get(name)
        if not isinstance(found, int | float):
            continue
        if found < limit if is_floor else found > limit:
            faults.append(f"{name} {found:.4f} is {'below' if is_floor else 'above'} the limit {limit:g}")
    return faults


def _table(limits: dict[str, tuple[float, bool]], figures: Figures) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"figure": name, "value": value, "limit": limits[name][0] if name in limits else None}
        for name, value in figures.items()
    )


def _summary(figures: Figures) -> str:
    parts: list[str] = []
    if "rows_added" in figures:
        changed = f", {figures['rows_changed']} changed" if "rows_changed" in figures else ""
        parts.append(f"{figures['rows_added']} rows came, {figures['rows_gone']} went{changed}")
    else:
        parts.append(f"{figures['rows']} rows, {figures['rows_before']} before")
    if "overlap" in figures:
        parts.append(f"the answers overlap by {figures['overlap']:.4f}")
    shifts = {name: figures.get(f"{name}_shift_mean") for name in ("centroids", "hyperplanes")}
    parts += [f"{name} moved by {shift:.4f} in the mean" for name, shift in shifts.items() if shift is not None]
    return ", ".join(parts)
