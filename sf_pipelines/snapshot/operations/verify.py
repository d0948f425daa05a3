"""Looking at a published snapshot with distrust: every byte hashed again, every row counted, recall measured anew."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import DigestMismatchError, IntegrityError, ObjectMissingError
from sf_pipelines.snapshot.gate.recall import (
    RecallEstimate,
    Truth,
    merge_truth,
    recall_per_query,
    row_numbers,
    truth_table,
)
from sf_pipelines.snapshot.gate.verdicts import RecallFigures, judged_recall
from sf_pipelines.snapshot.index.key_value import KeyValueShard
from sf_pipelines.snapshot.index.ranking import IdArray
from sf_pipelines.snapshot.index.scan import MemoryScan
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.reader.core import open_root
from sf_pipelines.snapshot.reader.reader import ShardedVectorReader, UnifiedShardedReader, open_reader
from sf_pipelines.snapshot.reader.shards import open_index
from sf_pipelines.snapshot.reader.state import ShardEntry, SnapshotState, load_current, load_state
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.explicit import ExplicitRouting
from sf_pipelines.snapshot.routing.protocol import Int32
from sf_pipelines.snapshot.run.build import Progress, scratch, silent
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import ManifestReceipt, PromoteReceipt, ShardReceipt
from sf_pipelines.snapshot.store import Store

_QUERIES = 200
_DEFAULT_K = 10


@dataclass
class Verification:
    """What was found.

    Attributes:
        num_probes: shards that readers ask by default.
        shards: non-empty shards that were opened.
        objects: objects that were hashed, and ``bytes`` their size.
        recall: recall@k at ``num_probes``, measured just now with other rows of the snapshot as queries than the gate
            had, so it is another figure than ``judged``; None where it was not measured.
        recall_lower: its lower confidence bound.
        judged: the recall that the snapshot was published with; None where nobody knows.
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
    judged: RecallFigures | None = None
    min_recall: float | None = None
    faults: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing is off."""
        return not self.faults


@dataclass(frozen=True)
class Wholeness:
    """What a look at a snapshot's objects found.

    Attributes:
        objects: sealed objects of its shards, and ``bytes`` their size.
        hashed: those whose bytes were read, because the store's version is not the one that was sealed.
        faults: everything that is gone or changed, one line each, naming the object.
    """

    objects: int
    bytes: int
    hashed: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class _Queries:
    """Rows of the snapshot to ask for: their ids, vectors, and shards."""

    ids: IdArray
    vectors: Float32
    shards: Int32

    @classmethod
    def of_all(cls, parts: "list[_Queries]") -> "_Queries":
        """Those of all shards; ids as text."""
        ids = _as_text(np.concatenate([part.ids.astype(object) for part in parts]))
        return cls(ids, np.concatenate([part.vectors for part in parts]), np.concatenate([p.shards for p in parts]))


def verify_snapshot(
    root: str | Path,
    *,
    s3: S3Options | None = None,
    manifest_key: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Reads every object of a snapshot anew, opens every shard, and measures recall against exact neighbours.

    Works on copies of its own in a temporary folder: nothing that was cached earlier is believed. Disk for the whole
    snapshot is needed, memory for one shard. ``manifest_key`` None is the current snapshot.
    """
    store = open_root(root, s3)
    state = load_current(store) if manifest_key is None else load_state(store, manifest_key)
    found = Verification(state.manifest.run_id, state.manifest_key, state.default_probes)
    found.judged = judged_recall(store, state.manifest, state.manifest_digest)
    report = progress or silent
    with scratch() as folder:
        cache = ShardCache(Path(folder))
        drawn = _open_shards(store, state, cache, found, report)
        # Without its rows, or with damaged ones, there is no truth to compare with.
        if found.passed and drawn:
            extras = state.manifest.extras
            if extras is not None and extras.recall is not None:
                found.k, found.min_recall = extras.recall.k, extras.recall.min_recall
            queries = _Queries.of_all(drawn)
            parts = _neighbours(store, state, cache, queries, found.k, report)
            options: dict[str, Any] = {"s3": s3, "cache_dir": Path(folder), "manifest_key": state.manifest_key}
            with open_reader(root, **options) as reader:
                _measure(found, reader, queries, _named_shards(state, queries), parts)
    return found


def check_whole(store: Store, state: SnapshotState, *, deep: bool = False) -> Wholeness:
    """Whether every object that was sealed is there with its size, and is the version, or has the bytes, of then.

    Objects that still have the version that the build's receipts name are taken as unchanged; all others are hashed,
    and with ``deep`` these too.
    """
    etags = {} if deep else _sealed_versions(store, state)
    faults: list[str] = []
    objects = size = hashed = 0
    for entry in state.shards:
        if entry.key is None:
            continue
        listed = {info.key: info for info in store.objects(entry.key)}
        for item in entry.objects or ():
            key = f"{entry.key}/{item.path}"
            found, where = listed.get(key), f"shard {entry.db_id}: {store.url_of(key)}"
            objects, size = objects + 1, size + item.size
            if found is None:
                faults.append(f"{where} is missing")
            elif found.size != item.size:
                faults.append(f"{where} has {found.size} bytes, {item.size} were sealed")
            elif found.etag is None or found.etag != etags.get(key):
                hashed += 1
                if store.sha256(key) != item.sha256:
                    faults.append(f"{where} has other bytes than were sealed")
    return Wholeness(objects, size, hashed, tuple(faults))


def _sealed_versions(store: Store, state: SnapshotState) -> dict[str, str | None]:
    """The store's version of each object when it was sealed; nothing where the receipts are gone."""
    ledger = Ledger(store, state.manifest.run_id)
    try:
        promoted, assembled = ledger.find(PromoteReceipt), ledger.find(ManifestReceipt)
        if promoted is not None and promoted.manifest_digest != state.manifest_digest:
            raise DigestMismatchError(
                f"manifest {store.url_of(state.manifest_key)} has SHA-256 {state.manifest_digest}, "
                f"{promoted.manifest_digest} was published"
            )
        if assembled is None or assembled.manifest_digest != state.manifest_digest:
            return {}
        shards = [ledger.read(ShardReceipt, key) for key in assembled.shards]
    except ObjectMissingError:
        return {}
    return {
        f"{shard.db_key}/{item.path}": etag
        for shard in shards
        for item, etag in zip(shard.objects, shard.etags, strict=True)
    }


def _named_shards(state: SnapshotState, queries: _Queries) -> Int32 | None:
    """The queries' shards, where a query must say them."""
    return queries.shards if isinstance(state.routing, ExplicitRouting | CelRouting) else None


def _as_text(ids: IdArray) -> IdArray:
    """Ids as JSON texts: so numbers, strings and both together can be compared."""
    return np.array([json.dumps(value) for value in ids.ravel().tolist()], dtype=object).reshape(ids.shape)


@contextmanager
def _copied(store: Store, cache: ShardCache, entry: ShardEntry) -> Iterator[Path | None]:
    """A verified copy of a shard; None for an empty one."""
    if entry.key is None:
        yield None
        return
    with cache.checkout(store, entry.key, entry.objects) as folder:
        yield folder


def _open_shards(
    store: Store, state: SnapshotState, cache: ShardCache, found: Verification, report: Progress
) -> list[_Queries]:
    """Hashes, opens and counts every shard; rows of each, in proportion to its size, to ask for later."""
    total = sum(entry.rows for entry in state.shards)
    drawn: list[_Queries] = []
    for number, entry in enumerate(state.shards, start=1):
        try:
            with _copied(store, cache, entry) as folder:
                if folder is not None:
                    wanted = max(1, round(_QUERIES * entry.rows / max(1, total)))
                    drawn.extend(_open_shard(state, entry, folder, found, wanted))
        except (IntegrityError, ObjectMissingError) as error:
            found.faults.append(f"shard {entry.db_id}: {error}")
        report("verify", number, 2 * len(state.shards), "shards")
    extras = state.manifest.extras
    if extras is not None and found.passed and found.rows != extras.row_count:
        found.faults.append(f"{found.rows} rows are stored, the manifest says {extras.row_count}")
    return drawn


def _open_shard(
    state: SnapshotState, entry: ShardEntry, folder: Path, found: Verification, wanted: int
) -> Iterator[_Queries]:
    """Counts the rows and the keys of one shard, and draws some rows."""
    found.shards += 1
    found.objects += len(entry.objects or ())
    found.bytes += sum(item.size for item in entry.objects or ())
    with closing(open_index(state, folder)) as index:
        found.rows += index.rows
        counted = {"rows": index.rows}
        if state.kind == "unified":
            with closing(KeyValueShard(folder)) as keys:
                counted["keys"] = keys.rows
        for what, count in counted.items():
            # Stock writers count keys once for each time that they were written, and need not give every one a vector.
            if count != entry.rows and (state.is_ours or state.kind == "vector"):
                found.faults.append(f"shard {entry.db_id}: {count} {what} are stored, the manifest says {entry.rows}")
        # Stock writers leave small shards without an index; ours never do.
        if entry.objects is not None and index.indexed_rows != index.rows:
            found.faults.append(f"shard {entry.db_id}: the index covers {index.indexed_rows} of {index.rows} rows")
        ids, vectors = index.sample(wanted)
        yield _Queries(ids, vectors, np.full(len(ids), entry.db_id, dtype=np.int32))


def _neighbours(
    store: Store, state: SnapshotState, cache: ShardCache, queries: _Queries, k: int, report: Progress
) -> list[pa.Table]:
    """Each query's exact neighbours within every shard that it may see."""
    parts, named = list[pa.Table](), _named_shards(state, queries)
    for number, entry in enumerate(state.shards, start=1):
        mine = np.arange(len(queries.ids)) if named is None else np.flatnonzero(named == entry.db_id)
        with _copied(store, cache, entry) as folder:
            if folder is not None and len(mine):
                with closing(open_index(state, folder)) as index:
                    ids, vectors = index.sample(index.rows)
                scan = MemoryScan(row_numbers(_as_text(ids)), np.arange(len(ids)), vectors, state.metric)
                parts.append(truth_table(mine, scan.search(queries.vectors[mine], k + 1)))
        report("verify", len(state.shards) + number, 2 * len(state.shards), "shards")
    return parts


def _measure(
    found: Verification,
    reader: ShardedVectorReader | UnifiedShardedReader,
    queries: _Queries,
    named: Int32 | None,
    parts: list[pa.Table],
) -> None:
    truth = Truth.of(merge_truth(parts, row_numbers(queries.ids), found.k), len(queries.ids))
    answers = reader.search_arrays(queries.vectors, found.k + 1, shard_of=named)
    estimate = RecallEstimate.of(recall_per_query(_as_text(answers.ids), answers.distances, queries.ids, truth))
    found.recall, found.recall_lower = estimate.mean, estimate.lower
    # Other queries than those of the gate: only what chance does not explain is a fault.
    if found.min_recall is not None and estimate.upper < found.min_recall:
        found.faults.append(
            f"recall@{found.k} is {estimate.mean:.4f} (at most {estimate.upper:.4f} with 95 % confidence), below the "
            f"{found.min_recall} that the snapshot was published for"
        )
