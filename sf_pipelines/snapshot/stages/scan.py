"""Stage scan: pins the source and decides which run this is."""

import uuid
from typing import Any

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.manifest import publish
from sf_pipelines.snapshot.run import find
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import ScanReceipt
from sf_pipelines.snapshot.run.sizing import choose_shards
from sf_pipelines.snapshot.sharding import ClusterSharding
from sf_pipelines.snapshot.source.files import SourceListing, pin


def scan(build: Build, *, force: bool = False, parts: tuple[str, ...] | None = None) -> ScanReceipt:
    """Pins the source and decides which run this is: a new one, an unfinished one, or the published one.

    What a rollback withdrew is not built again from the same source and config: then the run is the withdrawn one,
    whose receipts the stages re-emit.
    """
    config = build.config
    listing = pin(
        config.source,
        config.s3,
        config.row_columns,
        optional=config.optional_columns,
        parts=None if parts is None else (build.store, parts),
    )
    if parts is None:
        _check_store_is_outside(build, listing)
    build_key, view = build.key_of(listing), publish.read_pointer(build.store)
    begun, sizing = find.begun(build, view, build_key, force=force), ""
    if begun is not None:
        build.resize(begun)
    elif config.shard_count is None:
        sizing = choose_shards(build, listing, None if force else view.pointer)
    contract, shards = build.contract(listing.arrow_schema), build.config.shards
    if isinstance(config.sharding, ClusterSharding) and shards > listing.rows:
        raise ConfigError(f"WriteConfig.num_dbs: {shards} shards for {listing.rows} rows; use fewer shards")
    if begun is not None and begun.published:
        return begun
    if not publish.is_proven(build.store, view.pointer):
        # Told now, and not after hours of work.
        publish.require_conditional_writes(build.store)
    base: dict[str, Any] = {
        "base_fingerprint": view.fingerprint,
        "base_run_id": view.pointer.run_id if view.pointer else None,
        "base_seq": view.seq,
        "gate_key": config.gate_key(),
    }
    if begun is None:
        run_id = f"{build_key[:16]}-{uuid.uuid4().hex[:12]}"
        receipt = ScanReceipt(
            run_id=run_id,
            inputs=build_key,
            build_key=build_key,
            listing=listing,
            num_dbs=shards,
            sizing=sizing,
            id_type=contract.id_type,
            key_type=contract.keys.key_type if contract.keys else None,
            key_encoding=contract.keys.encoding if contract.keys else None,
            filter_columns=contract.filter_columns,
            record_key=build.start_record(run_id),
            forced=force,
            **base,
        )
        return build.run(run_id).commit(receipt, number=0)
    return _taken_up(build, begun, base)


def _taken_up(build: Build, begun: ScanReceipt, base: dict[str, Any]) -> ScanReceipt:
    """A run that was not finished goes out from the pointer as it is now."""
    if not build.store.exists(begun.record_key):
        base["record_key"] = build.start_record(begun.run_id)
    reason = f"goes on with the unfinished build {begun.run_id}"
    if any(getattr(begun, name) != value for name, value in base.items()):
        begun = build.run(begun.run_id).commit(begun.renewed(**base), number=begun.number + 1)
    return begun.model_copy(update={"reason": reason})


def _check_store_is_outside(build: Build, listing: SourceListing) -> None:
    """What a build writes must not become source of the next one."""
    store = build.store.url + "/"
    inside = [file.key for file in listing.files if f"{listing.root}/{file.key}".startswith(store)]
    recursive = "**" in build.config.source or listing.root.rstrip("/").endswith(build.config.source.rstrip("/"))
    if inside or (recursive and store.startswith(listing.root.rstrip("/") + "/")):
        raise ConfigError(
            f"WriteConfig.store: {build.config.store!r} lies in the source {build.config.source!r}; the next build "
            "would read what this one writes: use another folder"
        )
