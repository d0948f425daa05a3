"""Successors of published runs, which never change: a shard that is rebuilt belongs to a run of its own."""

import uuid

from sf_pipelines.snapshot.manifest.publish import PointerView, read_pointer
from sf_pipelines.snapshot.model import digest_json
from sf_pipelines.snapshot.run.build import Run
from sf_pipelines.snapshot.run.ledger import ReceiptType, copy_shard, copy_verified, is_intact
from sf_pipelines.snapshot.run.receipts import ScanReceipt, ShardReceipt, attempt_folder
from sf_pipelines.snapshot.store import Ref


def current_of(run: Run) -> tuple[Run, PointerView]:
    """The run that is served, if it is of the same build as this published one, else this one; and the pointer."""
    view = read_pointer(run.store)
    if view.pointer is None or view.pointer.build_key != run.scanned.build_key or run.scanned.held:
        return run, view
    return run.build.run(view.pointer.run_id), view


def has_successor(run: Run, view: PointerView) -> bool:
    """Whether a shard of this published run was rebuilt under this pointer."""
    return _successor(run, view).find(ScanReceipt) is not None


def begin_successor(run: Run, view: PointerView) -> Run:
    """Copies all receipts of a published run but those of its shards; every attempt comes to the same successor.

    The routed rows, which nothing published refers to, stay where they are.
    """
    build, successor = run.build, _successor(run, view)
    if successor.find(ScanReceipt) is None:
        base = {
            "base_fingerprint": view.fingerprint,
            "base_run_id": view.pointer.run_id if view.pointer else None,
            "base_seq": view.seq,
        }
        record_key = build.start_record(successor.run_id)
        states = {"record_key": record_key, "published": False, "held": False, "forced": False}
        if _copy(successor, run.scanned, number=0, **base, **states).record_key != record_key:
            build.drop_record(record_key)
    with build.working(successor.scanned):
        for receipt in (run.sampled, run.trained, run.routed):
            if receipt is None:
                continue
            whole, number = successor.seek_whole(type(receipt), inputs=receipt.inputs, published=False)
            if whole is None:
                _copy(successor, receipt, number=number)
    return successor


def complete_successor(successor: Run, shards: list[ShardReceipt]) -> None:
    """Copies those shards of the published run that were not rebuilt."""
    sealed = successor.find_parts(ShardReceipt, inputs=successor.routed.inputs)
    with successor.build.working(successor.scanned):
        for done, shard in enumerate(shards, start=1):
            found = sealed.get(shard.part)
            if found is None or not (successor.is_whole(found) and is_intact(successor.store, found)):
                _copy_shard(successor, shard, number=0 if found is None else found.number + 1)
            successor.build.report("copy", done, len(shards), "shards")


def _successor(run: Run, view: PointerView) -> Run:
    digest = digest_json({"run_id": run.run_id, "pointer": view.fingerprint})
    return run.build.run(f"{run.scanned.build_key[:16]}-{digest[:12]}")


def _copy_shard(successor: Run, shard: ShardReceipt, *, number: int) -> None:
    if shard.db_key is None:
        _copy(successor, shard, shard.part, number=number)
        return
    db_key = attempt_folder(successor.run_id, shard.db_id, number, uuid.uuid4().hex)
    etags = copy_shard(successor.store, shard, db_key)
    _copy(successor, shard, shard.part, number=number, attempt=number, db_key=db_key, etags=etags)


def _copy(successor: Run, receipt: ReceiptType, part: str = "", *, number: int, **changes: object) -> ReceiptType:
    """Writes a receipt as one of the successor; the objects that it refers to are copied."""
    refs = {name: _copy_ref(successor, receipt.run_id, ref) for name, ref in receipt.refs().items()}
    copied = receipt.renewed(run_id=successor.run_id, **refs, **changes)
    return successor.commit(copied, part, number=number)


def _copy_ref(successor: Run, old: str, ref: Ref) -> Ref:
    key = ref.key.replace(f"run_id={old}/", f"run_id={successor.run_id}/")
    copy_verified(successor.store, ref.key, key, ref.sha256)
    return ref.model_copy(update={"key": key})
