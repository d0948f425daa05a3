"""Stage promote: moves the current pointer."""

from sf_pipelines.snapshot.gate.verdicts import require_passed, require_whole
from sf_pipelines.snapshot.manifest import publish, record
from sf_pipelines.snapshot.run import find
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import PromoteReceipt, inputs_of


def promote(build: Build, run_id: str) -> PromoteReceipt:
    """Publishes the run's manifest: the current pointer moves, if every required check has passed on these very bytes.

    The verdicts are read from the store and from nowhere else, so it does not matter who calls this, or when. What a
    rollback holds is not published; the receipt then is of what stays current.
    """
    run = build.run(run_id)
    scanned, manifest = run.scanned, run.manifest
    inputs = inputs_of(manifest=manifest.manifest_digest)
    pointer = publish.read_pointer(build.store).pointer
    if pointer is not None and build.is_held(scanned, pointer):
        return find.held_back(build, scanned, pointer, inputs)
    found, number = run.seek(PromoteReceipt, inputs=inputs)
    if found is not None:
        reason = f"run {run_id} was published before; nothing is new"
        ref = build.store.url_of(found.manifest_key)
        return found.model_copy(update={"published": False, "reason": reason, "manifest_ref": ref})
    require_passed(build, run_id, manifest)
    with build.working(scanned):
        require_whole(run, manifest)
    data = build.store.get_sealed(manifest.staged)
    pointer, before = publish.publish(
        build.store,
        manifest=data,
        run_id=run_id,
        created_at=manifest.manifest_created_at,
        build_key=scanned.build_key,
        gate_key=manifest.gate_key,
        base_fingerprint=scanned.base_fingerprint,
    )
    receipt = PromoteReceipt(
        run_id=run_id,
        inputs=inputs,
        manifest_key=publish.manifest_key(pointer),
        manifest_ref=pointer.manifest_ref,
        manifest_digest=manifest.manifest_digest,
        previous_run_id=before.before(run_id),
        seq=pointer.seq or 0,
    )
    record.finish(build.store, scanned.record_key, "succeeded", manifest_ref=pointer.manifest_ref)
    return run.commit(receipt, number=number)
