"""Runs that a scan finds again: the published one, one that a rollback holds, one that was not finished."""

from sf_pipelines.snapshot.errors import GateError, IntegrityError, ObjectMissingError
from sf_pipelines.snapshot.manifest import publish, record
from sf_pipelines.snapshot.manifest.pointer import Pointer
from sf_pipelines.snapshot.reader.state import load_pointed
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.ledger import STAGING, Ledger
from sf_pipelines.snapshot.run.receipts import ManifestReceipt, PromoteReceipt, ScanReceipt, inputs_of
from sf_pipelines.snapshot.store import Store


def begun(build: Build, view: publish.PointerView, build_key: str, *, force: bool) -> ScanReceipt | None:
    """The scan of the run that a build of this key is: published or held ones are marked so; None begins a new one."""
    known = held_run(build, view, build_key)
    if known is not None or force:
        return known
    return published_run(build, view, build_key) or newest_run(build.store, build_key, promoted=False)


def published_run(build: Build, view: publish.PointerView, build_key: str) -> ScanReceipt | None:
    """The scan of the published run, if it is of this source and config, and manifest and routing can be read."""
    pointer = view.pointer
    if pointer is None or (pointer.build_key, pointer.gate_key) != (build_key, build.config.gate_key()):
        return None
    ledger = build.ledger(pointer.run_id)
    receipt = ledger.find(ScanReceipt, inputs=build_key)
    try:
        load_pointed(build.store, pointer)
    except (IntegrityError, ObjectMissingError):
        # Damaged beyond what building single shards anew can heal.
        return None
    if receipt is not None and ledger.find(PromoteReceipt) is None:
        _say_promoted(build, ledger, pointer)
    reason = f"nothing is new: {pointer.run_id} is published and was built from this source and config"
    return receipt.model_copy(update={"published": True, "reason": reason}) if receipt else None


def _say_promoted(build: Build, ledger: Ledger, pointer: Pointer) -> None:
    """Writes what a builder did not live to write: its run is served, so its stages are at their end."""
    manifest = ledger.find(ManifestReceipt)
    if manifest is None or manifest.manifest_digest != pointer.manifest_digest:
        return
    ledger.commit(_as_pointed(build, pointer, inputs_of(manifest=manifest.manifest_digest)), number=0)


def _as_pointed(build: Build, pointer: Pointer, inputs: str) -> PromoteReceipt:
    """The receipt of what is current, as the pointer says it."""
    key = publish.manifest_key(pointer)
    return PromoteReceipt(
        run_id=pointer.run_id,
        inputs=inputs,
        manifest_key=key,
        manifest_ref=build.store.url_of(key),
        manifest_digest=pointer.manifest_digest or "",
        previous_run_id=pointer.previous.run_id if pointer.previous else None,
        seq=pointer.seq or 0,
    )


def held_run(build: Build, view: publish.PointerView, build_key: str) -> ScanReceipt | None:
    """The scan of the run that a rollback withdrew, where it holds this build; None once that run was cleaned up."""
    if view.pointer is None or not view.pointer.is_held(build_key, build.config.gate_key()):
        return None
    # What is served may be of the same build, under another gate.
    receipt = newest_run(build.store, build_key, promoted=True, besides=view.pointer.run_id)
    if receipt is None:
        return None
    reason = hold_reason(build, receipt, view.pointer)
    return receipt.model_copy(update={"published": True, "held": True, "reason": reason})


def hold_reason(build: Build, scanned: ScanReceipt, pointer: Pointer) -> str:
    """Why a build ends without publishing, and what can be done about it."""
    return (
        "nothing is published: a rollback withdrew what was built from this source and config and holds it (build key "
        f"{scanned.build_key[:16]}); {pointer.run_id} stays current. Change the source or the config, or lift "
        f"the hold: sf-pipelines release {build.config.store}"
    )


def newest_run(store: Store, build_key: str, *, promoted: bool, besides: str = "") -> ScanReceipt | None:
    """The newest run of the same build that was, or was not, published; another one than ``besides``."""
    found: list[ScanReceipt] = []
    for folder in store.folders(STAGING):
        run_id = folder.removeprefix("run_id=")
        if not run_id.startswith(build_key[:16]) or run_id == besides:
            continue
        ledger = Ledger(store, run_id)
        receipt = ledger.find(ScanReceipt, inputs=build_key)
        if receipt is not None and (ledger.find(PromoteReceipt) is not None) == promoted:
            found.append(receipt)
    return max(found, key=lambda receipt: receipt.created_at, default=None)


def held_back(build: Build, scanned: ScanReceipt, pointer: Pointer, inputs: str) -> PromoteReceipt:
    """What stays current, in place of what a rollback holds; the build's record says why it ended."""
    reason = hold_reason(build, scanned, pointer)
    if not scanned.published:
        record.finish(build.store, scanned.record_key, "failed", error=GateError(reason))
    return _as_pointed(build, pointer, inputs).model_copy(update={"published": False, "held": True, "reason": reason})
