"""Forks of published runs, which never change.

When a shard of a published run is built anew, the next manifest is that of a fork: a run of its own into which
everything that is published or judged is copied inside the store.
"""

import uuid
from datetime import UTC, datetime

from sf_pipelines.snapshot.errors import DigestMismatchError
from sf_pipelines.snapshot.manifest import publish
from sf_pipelines.snapshot.run.build import Build, Run
from sf_pipelines.snapshot.run.ledger import STAGING, ReceiptType, is_intact
from sf_pipelines.snapshot.run.receipts import (
    PromoteReceipt,
    Receipt,
    Ref,
    SampleReceipt,
    ScanReceipt,
    ShardReceipt,
)
from sf_pipelines.snapshot.store import Store


def new_run_id(build_key: str) -> str:
    """A run id that was never used: the start of the build key and a random part."""
    return f"{build_key[:16]}-{uuid.uuid4().hex[:12]}"


def fork_run(run: Run, shards: list[ShardReceipt]) -> str:
    """Copies a published run, with its newest shards, into a run of its own that goes out from the present pointer.

    A fork of the same shards that was not published, and goes out from this pointer too, is gone on with.

    The routed rows, which nothing published refers to, stay where they are.
    """
    build, scanned, view = run.build, run.scanned, publish.read_pointer(run.store)
    unfinished = _unfinished_fork(run, shards, view)
    if unfinished is not None:
        return unfinished
    fork = _Fork(build, scanned.run_id, new_run_id(scanned.build_key))
    begun = fork.commit(
        scanned,
        base_fingerprint=view.fingerprint,
        base_run_id=view.pointer.run_id if view.pointer else None,
        base_seq=view.seq,
        record_key=build.start_record(fork.run_id),
        published=False,
        held=False,
        forced=False,
    )
    with build.working(begun):
        _copy_run(fork, run, shards)
    return fork.run_id


def _unfinished_fork(run: Run, shards: list[ShardReceipt], view: publish.PointerView) -> str | None:
    """A whole copy of these shards that failed after it was made; what is half made is not worth looking at."""
    for folder in run.store.folders(STAGING):
        run_id = folder.removeprefix("run_id=")
        if run_id == run.run_id or not run_id.startswith(run.scanned.build_key[:16]):
            continue
        ledger = run.build.ledger(run_id)
        begun = ledger.find(ScanReceipt, inputs=run.scanned.build_key)
        # Whatever was served before, and withdrawn, went out from an earlier pointer.
        if begun is None or begun.base_fingerprint != view.fingerprint or ledger.find(PromoteReceipt) is not None:
            continue
        copies = ledger.find_parts(ShardReceipt, inputs=run.routed.inputs)
        found = [copies.get(f"db={shard.db_id:05d}") for shard in shards]
        same = all(
            copy is not None and copy.objects == shard.objects for copy, shard in zip(found, shards, strict=True)
        )
        samples = ledger.seek_whole(SampleReceipt, inputs=begun.build_key, published=False)[0]
        if same and samples is not None and all(copy is not None and is_intact(run.store, copy) for copy in found):
            return run_id
    return None


def _copy_run(fork: "_Fork", run: Run, shards: list[ShardReceipt]) -> None:
    sampled = run.sampled
    fork.commit(
        sampled,
        rejects=fork.copy_ref(sampled.rejects),
        training=fork.copy_ref(sampled.training),
        queries=fork.copy_ref(sampled.queries),
        pool=None if sampled.pool is None else fork.copy_ref(sampled.pool),
    )
    if run.trained is not None:
        fork.commit(run.trained, ref=fork.copy_ref(run.trained.ref))
    queries = run.routed.queries
    fork.commit(run.routed, queries=None if queries is None else fork.copy_ref(queries))
    for number, shard in enumerate(shards, start=1):
        fork.copy_shard(shard)
        run.build.report("fork", number, len(shards), "shards")


class _Fork:
    """Copies receipts and what they refer to from one run to another."""

    def __init__(self, build: Build, old: str, new: str) -> None:
        self.run_id = new
        self._ledger = build.run(new)
        self._store: Store = build.store
        self._segments = (f"run_id={old}/", f"run_id={new}/")

    def commit(self, receipt: ReceiptType, part: str = "", **changes: object) -> ReceiptType:
        """Writes a receipt as one of the new run."""
        fresh = {"run_id": self.run_id, "write_id": uuid.uuid4().hex, "created_at": datetime.now(UTC), "reason": ""}
        return self._ledger.commit(receipt.model_copy(update=fresh | changes), part, number=0)

    def copy_ref(self, ref: Ref) -> Ref:
        """Copies one object that a receipt refers to."""
        return ref.model_copy(update={"key": self._copy(ref.key, ref.sha256)})

    def copy_shard(self, shard: ShardReceipt) -> Receipt:
        """Copies a sealed shard, object by object, and seals the copies."""
        part = f"db={shard.db_id:05d}"
        if shard.db_key is None:
            return self.commit(shard, part)
        etags: list[str | None] = []
        for item in shard.objects:
            key = self._copy(f"{shard.db_key}/{item.path}", item.sha256)
            etags.append(self._store.head(key).etag)
        db_key = shard.db_key.replace(*self._segments)
        return self.commit(
            shard,
            part,
            db_key=db_key,
            etags=tuple(etags),
            truth=None if shard.truth is None else self.copy_ref(shard.truth),
            witnesses=None if shard.witnesses is None else self.copy_ref(shard.witnesses),
        )

    def _copy(self, key: str, sha256: str) -> str:
        target = key.replace(*self._segments)
        self._store.copy(key, target)
        found = self._store.sha256(target)
        if found != sha256:
            raise DigestMismatchError(
                f"{self._store.url_of(target)}, a copy of {key}, has SHA-256 {found}, but {sha256} was sealed"
            )
        return target
