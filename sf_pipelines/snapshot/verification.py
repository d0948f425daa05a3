"""Looking at a published snapshot with distrust: every byte hashed again, every row counted, recall measured anew."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sf_pipelines.snapshot.build import Progress, silent
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import IntegrityError, ObjectMissingError
from sf_pipelines.snapshot.evaluation import RecallEstimate, Truth, merge_truth, recall_per_query, truth_table
from sf_pipelines.snapshot.index import backend_named
from sf_pipelines.snapshot.index.protocol import IdArray, ShardIndex
from sf_pipelines.snapshot.index.scan import MemoryScan
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.reader.state import ShardEntry, SnapshotState, load_current, load_state
from sf_pipelines.snapshot.reader.sync import ShardedVectorReader
from sf_pipelines.snapshot.store import Store

_QUERIES = 200
_DEFAULT_K = 10


@dataclass
class Verification:
    """What was found.

    Attributes:
        run_id: the snapshot that was looked at.
        manifest_key: its manifest.
        num_probes: shards that readers ask by default.
        shards: non-empty shards that were opened.
        rows: rows that were counted.
        objects: objects that were hashed.
        bytes: their size.
        k: neighbours asked for.
        recall: recall@k at ``num_probes`` of rows of the snapshot as queries; None where it was not measured.
        recall_lower: its lower confidence bound.
        min_recall: what the snapshot was published for; None where its writer did not say.
        faults: everything that is off, one line each; empty when all is well.
    """

    run_id: str
    manifest_key: str
    num_probes: int
    shards: int = 0
    rows: int = 0
    objects: int = 0
    bytes: int = 0
    k: int = _DEFAULT_K
    recall: float | None = None
    recall_lower: float | None = None
    min_recall: float | None = None
    faults: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing is off."""
        return not self.faults


def verify_snapshot(
    root: str | Path,
    *,
    s3: S3Options | None = None,
    manifest_key: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Reads every object of a snapshot anew, opens every shard, and measures recall against exact neighbours.

    Works on copies of its own in a temporary folder: nothing that was cached earlier is believed. Disk for the whole
    snapshot is needed, memory for one shard.

    Args:
        root: the snapshot's root.
        s3: credentials.
        manifest_key: manifest to look at; None is the current one.
        progress: told how many shards are done.

    Raises:
        SnapshotNotFoundError: nothing is published there.
        ManifestError: the manifest cannot be understood.
    """
    store = Store.open(root, s3)
    state = load_current(store) if manifest_key is None else load_state(store, manifest_key)
    found = Verification(state.manifest.run_id, state.manifest_key, state.vector.num_probes)
    report = progress or silent
    with tempfile.TemporaryDirectory(prefix="sf_pipelines-verify-") as folder:
        cache = ShardCache(Path(folder))
        drawn = _first_look(store, state, cache, found, report)
        # Without its rows, or with damaged ones, there is no truth to compare with.
        if found.passed and drawn:
            ids, queries = np.concatenate([pair[0] for pair in drawn]), np.concatenate([pair[1] for pair in drawn])
            extras = state.manifest.extras
            gate: dict[str, Any] = extras.recall if extras else {}
            found.k, found.min_recall = int(gate.get("k", _DEFAULT_K)), gate.get("min_recall")
            parts = _neighbours(store, state, cache, queries, found.k, report)
            with ShardedVectorReader(root, s3=s3, cache_dir=Path(folder), manifest_key=state.manifest_key) as reader:
                _measure(found, reader, queries, ids, parts)
    return found


def _opened(store: Store, state: SnapshotState, cache: ShardCache, entry: ShardEntry) -> Iterator[ShardIndex]:
    """Yields the index of a verified copy, once."""
    if entry.key is None:
        return
    with cache.checkout(store, entry.key, entry.objects) as folder:
        index = backend_named(state.backend).open(folder, metric=state.metric, dim=state.dim)
        try:
            yield index
        finally:
            index.close()


def _first_look(
    store: Store, state: SnapshotState, cache: ShardCache, found: Verification, report: Progress
) -> list[tuple[IdArray, Float32]]:
    """Hashes, opens and counts every shard; rows of each, in proportion to its size, to ask for later."""
    total = sum(entry.rows for entry in state.shards)
    drawn: list[tuple[IdArray, Float32]] = []
    for number, entry in enumerate(state.shards, start=1):
        try:
            for index in _opened(store, state, cache, entry):
                found.shards += 1
                found.rows += index.rows
                found.objects += len(entry.objects or ())
                found.bytes += sum(item.size for item in entry.objects or ())
                _count(found, entry, index)
                drawn.append(index.sample(max(1, round(_QUERIES * entry.rows / max(1, total)))))
        except (IntegrityError, ObjectMissingError) as error:
            found.faults.append(f"shard {entry.db_id}: {error}")
        report("verify", number, 2 * len(state.shards), "shards")
    extras = state.manifest.extras
    if extras is not None and found.passed and found.rows != extras.row_count:
        found.faults.append(f"{found.rows} rows are stored, the manifest says {extras.row_count}")
    return drawn


def _count(found: Verification, entry: ShardEntry, index: ShardIndex) -> None:
    if index.rows != entry.rows:
        found.faults.append(f"shard {entry.db_id}: {index.rows} rows are stored, the manifest says {entry.rows}")
    # Stock writers leave small shards without an index; ours never do.
    if entry.objects is not None and index.indexed_rows != index.rows:
        found.faults.append(f"shard {entry.db_id}: the index covers {index.indexed_rows} of {index.rows} rows")


def _neighbours(
    store: Store, state: SnapshotState, cache: ShardCache, queries: Float32, k: int, report: Progress
) -> list[pa.Table]:
    """Each query's exact neighbours within every shard."""
    parts: list[pa.Table] = []
    for number, entry in enumerate(state.shards, start=1):
        for index in _opened(store, state, cache, entry):
            ids, vectors = index.sample(index.rows)
            scan = MemoryScan(pa.array(ids), np.arange(len(ids)), vectors, state.metric)
            parts.append(truth_table(scan.ids, scan.search(queries, k + 1)))
        report("verify", len(state.shards) + number, 2 * len(state.shards), "shards")
    return parts


def _measure(
    found: Verification, reader: ShardedVectorReader, queries: Float32, ids: IdArray, parts: list[pa.Table]
) -> None:
    truth = Truth.of(merge_truth(parts, pa.array(ids), found.k), len(ids))
    answers = reader.search_arrays(queries, found.k + 1)
    estimate = RecallEstimate.of(recall_per_query(answers.ids, answers.scores, ids, truth))
    found.recall, found.recall_lower = estimate.mean, estimate.lower
    # Other queries than those of the gate: only what chance does not explain is a fault.
    if found.min_recall is not None and estimate.upper < found.min_recall:
        found.faults.append(
            f"recall@{found.k} is {estimate.mean:.4f} (at most {estimate.upper:.4f} with 95 % confidence), below the "
            f"{found.min_recall} that the snapshot was published for"
        )
