"""The drift check: how the staged snapshot differs from the one that is served now."""

import tempfile
from pathlib import Path

from sf_pipelines.snapshot.checks import Figures, Finding, Judged
from sf_pipelines.snapshot.comparison.answers import compare_answers
from sf_pipelines.snapshot.comparison.ids import compare_ids
from sf_pipelines.snapshot.comparison.routing import routing_shift
from sf_pipelines.snapshot.config import DriftLimits
from sf_pipelines.snapshot.errors import IntegrityError, ObjectMissingError, SnapshotKindError
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.reader.state import SnapshotState, load_pointed, load_state

# Beyond so many rows the ids are not compared: shards that have changed would all be fetched, of both snapshots.
MOST_ROWS = 5_000_000


def drift(judged: Judged) -> Finding:
    """What changes for those who search: answers, rows, routing; against what the pointer names now.

    A current snapshot that cannot be read is no reason to keep a good one back: the message says so.
    """
    store = judged.build.store
    try:
        pointer = read_pointer(store).pointer
        if pointer is None:
            return _nothing("nothing is published yet, so there is nothing to compare with")
        if pointer.manifest_digest == judged.receipt.manifest_digest:
            return _nothing("this is the current snapshot itself")
        old = load_pointed(store, pointer)
        figures, notes = _compared(judged, old, load_state(store, judged.receipt.manifest_key))
    except (IntegrityError, ObjectMissingError, SnapshotKindError) as error:
        return _nothing(f"the current snapshot cannot be compared with: {error}")
    faults = _faults(judged.build.config.drift, figures)
    said = f"compared with {pointer.run_id}: {_told(figures)}"
    return Finding(not faults, "; ".join([*faults, said, *notes]), figures)


def _nothing(why: str) -> Finding:
    return Finding(True, why, {"compared": 0})


def _compared(judged: Judged, old: SnapshotState, new: SnapshotState) -> tuple[Figures, list[str]]:
    build, notes = judged.build, list[str]()
    figures: Figures = {
        "compared": 1,
        "rows": new.manifest.row_count,
        "rows_before": old.manifest.row_count,
        "shards_reused": sum(shard.reused is not None for shard in judged.shards),
    }
    if max(old.manifest.row_count, new.manifest.row_count) > MOST_ROWS:
        notes.append(f"ids of more than {MOST_ROWS:,} rows are not compared")
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
    with tempfile.TemporaryDirectory(prefix="sf_pipelines-drift-") as folder:
        # Copies that are read once: what readers keep in their cache is left to them.
        cache = ShardCache(Path(folder), max_bytes=0)
        changes = compare_ids(build.store, old, new, cache, lambda: build.renew(judged.run.scanned))
    rows = max(1, old.manifest.row_count)
    return {
        "rows_added": changes.added,
        "rows_gone": changes.gone,
        "rows_kept": changes.kept,
        "added_fraction": changes.added / rows,
        "gone_fraction": changes.gone / rows,
    }


def _faults(limits: DriftLimits | None, figures: Figures) -> list[str]:
    """Which limits are passed; a figure that was not measured passes none."""
    if limits is None:
        return []
    faults: list[str] = []
    for name, limit, is_floor in (
        ("overlap", limits.min_overlap, True),
        ("gone_fraction", limits.max_gone_fraction, False),
        ("added_fraction", limits.max_added_fraction, False),
    ):
        found = figures.get(name)
        if limit is None or not isinstance(found, int | float):
            continue
        if found < limit if is_floor else found > limit:
            faults.append(f"{name} {found:.4f} is {'below' if is_floor else 'above'} the limit {limit:g}")
    return faults


def _told(figures: Figures) -> str:
    parts: list[str] = []
    if "rows_added" in figures:
        parts.append(f"{figures['rows_added']} rows came, {figures['rows_gone']} went")
    else:
        parts.append(f"{figures['rows']} rows, {figures['rows_before']} before")
    if "overlap" in figures:
        parts.append(f"the answers overlap by {figures['overlap']:.4f}")
    shifts = {name: figures.get(f"{name}_shift_mean") for name in ("centroids", "hyperplanes")}
    parts += [f"{name} moved by {shift:.4f} in the mean" for name, shift in shifts.items() if shift is not None]
    return ", ".join(parts)
