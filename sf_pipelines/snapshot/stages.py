"""The build as plain functions, in order: scan, sample, train, route, build_shard, assemble, check, promote.

Each reads the receipts of the stages before it from the store and writes its own there; none hands over data. A stage
that finds its receipt for the same inputs does nothing and says so in ``reason``. So a build that was killed goes on
where it was, and the command line, Dagster and the engines run the very same code.
"""

import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any

from sf_pipelines.snapshot import gate as gating
from sf_pipelines.snapshot import routed, runs
from sf_pipelines.snapshot.assembly import assemble_manifest, shard_receipts
from sf_pipelines.snapshot.build import Build, Stopwatch
from sf_pipelines.snapshot.checks import staged_manifest
from sf_pipelines.snapshot.engine import Engine, InProcess, OnDone, Outcome, Task, nobody, spread
from sf_pipelines.snapshot.errors import (
    ConfigError,
    CountMismatchError,
    ObjectMissingError,
)
from sf_pipelines.snapshot.evaluation import stratified_queries
from sf_pipelines.snapshot.forking import fork_run, new_run_id
from sf_pipelines.snapshot.gate import CHECKS, Verdict
from sf_pipelines.snapshot.index.protocol import IndexFamily, choose_family
from sf_pipelines.snapshot.ledger import Ledger
from sf_pipelines.snapshot.manifest import probe, publish, record
from sf_pipelines.snapshot.receipts import (
    ManifestReceipt,
    PromoteReceipt,
    RangeReceipt,
    RoutedShard,
    RouteReceipt,
    SampleReceipt,
    ScanReceipt,
    ShardReceipt,
    TrainReceipt,
    inputs_of,
)
from sf_pipelines.snapshot.routed import read_shard, routing_inputs, spans_of, vectors_of
from sf_pipelines.snapshot.routing import needs_training
from sf_pipelines.snapshot.sealing import is_intact, same_shard, seal_shard
from sf_pipelines.snapshot.sharding import ClusterSharding
from sf_pipelines.snapshot.shuffling import Shuffle
from sf_pipelines.snapshot.sizing import choose_shards
from sf_pipelines.snapshot.source.files import SourceListing, pin
from sf_pipelines.snapshot.source.hashing import RowSetDigest
from sf_pipelines.snapshot.training import is_outworn, train_or_keep
from sf_pipelines.snapshot.validation import check_rejects, validate_and_sample

__all__ = [
    "CHECKS",
    "assemble",
    "build_shard",
    "build_shards",
    "check",
    "gate",
    "promote",
    "route",
    "route_range",
    "sample",
    "scan",
    "train",
]

# Shards in the making at a time: while one is indexed, another is read, uploaded or digested. Each holds its rows.
_SHARDS_AT_A_TIME = 2


# 1. scan


def scan(build: Build, *, force: bool = False, parts: tuple[str, ...] | None = None) -> ScanReceipt:
    """Pins the source and decides which run this is: a new one, an unfinished one, or the published one.

    What a rollback withdrew is not built again from the same source and config: then the run is the withdrawn one,
    whose receipts the stages re-emit.

    Args:
        build: what to build.
        force: build again although nothing is new, and take nothing over from the current snapshot. What a rollback
            holds stays held.
        parts: keys in the store of what a frame was written to, which is the source then; None looks for files at
            ``config.source``.

    Raises:
        SourceError: no file, no row, or a column that cannot be used.
        ConfigError: more shards than rows.
        ConditionalWritesError: the store ignores conditions on writes, so nothing could be published safely.
        StoreError: the store cannot be written.
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
    begun, sizing = runs.begun(build, view, build_key, force=force), ""
    if begun is not None:
        build.resize(begun)
    elif config.shard_count is None:
        sizing = choose_shards(build, listing, None if force else view.pointer)
    contract, shards = build.contract(listing.arrow_schema), build.config.shards
    if isinstance(config.sharding, ClusterSharding) and shards > listing.rows:
        raise ConfigError(f"WriteConfig.num_dbs: {shards} shards for {listing.rows} rows; use fewer shards")
    if begun is not None and begun.published:
        return begun
    if not probe.is_proven(build.store, view.pointer):
        # Told now, and not after hours of work.
        probe.require_conditional_writes(build.store)
    base: dict[str, Any] = {
        "base_fingerprint": view.fingerprint,
        "base_run_id": view.pointer.run_id if view.pointer else None,
        "base_seq": view.seq,
        "gate_key": config.gate_key(),
    }
    if begun is None:
        run_id = new_run_id(build_key)
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
        return build.ledger(run_id).commit(receipt, number=0)
    return _taken_up(build, begun, base)


def _taken_up(build: Build, begun: ScanReceipt, base: dict[str, Any]) -> ScanReceipt:
    """A run that was not finished goes out from the pointer as it is now."""
    if not build.store.exists(begun.record_key):
        base["record_key"] = build.start_record(begun.run_id)
    reason = f"goes on with the unfinished build {begun.run_id}"
    if any(getattr(begun, name) != value for name, value in base.items()):
        fresh = {"write_id": uuid.uuid4().hex, "created_at": datetime.now(UTC), **base}
        ledger = build.ledger(begun.run_id)
        number = ledger.next_number(ScanReceipt)
        begun = ledger.commit(begun.model_copy(update=fresh), number=number)
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


# 2. sample


def sample(build: Build, run_id: str) -> SampleReceipt:
    """Validates every row, writes the reject table, and draws the training and the query sample.

    Raises:
        DataContractError: more rows were rejected than ``max_reject_fraction`` allows.
        SourceEmptyError: no row was left.
        SourceChangedError: a file changed since the scan.
    """
    scanned, ledger = build.scanned(run_id), build.ledger(run_id)
    number = ledger.next_number(SampleReceipt)
    receipt = ledger.find_whole(SampleReceipt, inputs=scanned.build_key, published=scanned.published)
    if receipt is not None:
        receipt = receipt.model_copy(update={"reason": "this source was validated and sampled before"})
    else:
        receipt = ledger.commit(validate_and_sample(build, scanned, ledger), number=number)
    check_rejects(build, receipt)
    return receipt


# 3. train


def train(build: Build, run_id: str) -> TrainReceipt:
    """Trains centroids or hyperplanes, or keeps the current snapshot's, and stores them where the manifest will point.

    Raises:
        ConfigError: fewer training vectors than shards, or a strategy that trains nothing.
    """
    config = build.config
    if not needs_training(config.sharding):
        raise ConfigError(f"snapshot {config.name!r} is sharded by {config.sharding.strategy}, which trains nothing")
    scanned, ledger = build.scanned(run_id), build.ledger(run_id)
    sampled = ledger.need(SampleReceipt)
    inputs = inputs_of(build_key=scanned.build_key, training=sampled.training.sha256)
    number = ledger.next_number(TrainReceipt)
    found = ledger.find_whole(TrainReceipt, inputs=inputs, published=scanned.published)
    # What was kept has had its chance; what was trained for this very sample would come out the same.
    may_go = not scanned.published and config.retrain == "auto"
    if found is not None and not (found.kept and may_go and is_outworn(build, found.ref)):
        what = "kept" if found.kept else "trained"
        return found.model_copy(update={"reason": f"these {found.artifact} were {what} before"})
    vectors = vectors_of(ledger.get_table(sampled.training))
    with build.working(scanned):
        return ledger.commit(train_or_keep(build, scanned, vectors, inputs), number=number)


# 4. route


def route(build: Build, run_id: str, *, engine: Engine | None = None, shuffle: Shuffle | None = None) -> RouteReceipt:
    """Sends every row that satisfies the contract to its shard, range by range.

    Args:
        build: what to build.
        run_id: the build.
        engine: where the ranges are routed; None is this process.
        shuffle: an engine's own shuffle, which routes the ranges and brings each shard's rows together; in place of
            tasks.

    Raises:
        SourceChangedError: a file changed since the scan.
        CountMismatchError: routed and rejected rows do not add up to the rows of the source.
    """
    scanned, ledger = build.scanned(run_id), build.ledger(run_id)
    sampled, trained = ledger.need(SampleReceipt), build.trained(run_id)
    inputs = routing_inputs(scanned, sampled, trained)
    number = ledger.next_number(RouteReceipt)
    found = ledger.find(RouteReceipt, inputs=inputs)
    if found is not None and (scanned.published or all(_is_routed(ledger, key) for key in found.ranges)):
        return found.model_copy(update={"reason": "these rows were routed before"})
    watch = Stopwatch()
    places = len(spans_of(build, scanned))
    if shuffle is not None:
        with build.working(scanned):
            ranges = [ledger.read(RangeReceipt, key) for key in shuffle(build.config, run_id, places)]
    else:
        tasks = [Task(stage="route_range", run_id=run_id, number=place) for place in range(places)]
        with nullcontext(engine) if engine else InProcess(build, slots=1) as where:
            done = spread(build, scanned, where, tasks)
        ranges = [receipt for receipt in done if isinstance(receipt, RangeReceipt)]
    shards = _sum_shards(ranges, build.config.shards)
    rows = sum(shard.rows for shard in shards)
    if rows + sampled.rejected != sampled.rows_in:
        raise CountMismatchError(
            f"build {run_id}: {rows} rows routed and {sampled.rejected} rejected do not make the {sampled.rows_in} read"
        )
    receipt = RouteReceipt(
        run_id=run_id,
        inputs=inputs,
        ranges=tuple(receipt.key for receipt in ranges),
        shards=shards,
        index_family=_family(build, scanned, sampled, shards).value,
        queries=ledger.put_table("samples/asked", stratified_queries(build, ledger, sampled, trained)),
        seconds=watch.seconds,
    )
    return ledger.commit(receipt, number=number)


def route_range(build: Build, run_id: str, place: int) -> RangeReceipt:
    """Sends the rows of one input range to their shards.

    Raises:
        SourceChangedError: a file changed since the scan.
    """
    scanned, ledger = build.scanned(run_id), build.ledger(run_id)
    sampled, trained = ledger.need(SampleReceipt), build.trained(run_id)
    part, inputs = f"range-{place:05d}", routing_inputs(scanned, sampled, trained)
    receipt = ledger.find(RangeReceipt, part, inputs=inputs)
    if receipt is not None and _is_routed(ledger, receipt.key):
        return receipt
    spans = spans_of(build, scanned)[place]
    return routed.route_range(build, scanned, sampled, build.routing(trained), spans, part, inputs)


def _family(build: Build, scanned: ScanReceipt, sampled: SampleReceipt, shards: tuple[RoutedShard, ...]) -> IndexFamily:
    """The one family of a snapshot; sqlite-vec has no other than the exact scan."""
    spec = build.config.vector_spec
    if spec.backend == "sqlite-vec":
        return IndexFamily.FLAT
    base = scanned.base_run_id
    served = None if base is None or scanned.forced else build.ledger(base).find(RouteReceipt)
    return choose_family(
        spec.index_type,
        max(shard.rows for shard in shards),
        eight_bit=spec.quantization == "i8",
        served=None if served is None else served.index_family,
        repeated=sampled.repeated,
    )


def _is_routed(ledger: Ledger, key: str) -> bool:
    """Whether a range's routed file is there; its rows are checked by whoever reads them."""
    receipt = ledger.read(RangeReceipt, key)
    try:
        return ledger.store.head(receipt.routed_key).size == receipt.routed_size
    except ObjectMissingError:
        return False


def _sum_shards(ranges: list[RangeReceipt], num_dbs: int) -> tuple[RoutedShard, ...]:
    digests = [RowSetDigest() for _ in range(num_dbs)]
    for receipt in ranges:
        for shard in receipt.shards:
            digests[shard.db_id].merge(shard.digest, shard.rows)
    return tuple(
        RoutedShard(db_id=db_id, rows=digest.rows, digest=digest.hexdigest()) for db_id, digest in enumerate(digests)
    )


# 5. build_shard


def build_shard(build: Build, run_id: str, db_id: int, *, rebuild: bool = False) -> ShardReceipt:
    """Builds, uploads, re-opens and seals one shard's index.

    Where the current snapshot holds the same rows in the same kind of index, that is copied inside the store instead.

    Args:
        build: what to build.
        run_id: the build.
        db_id: the shard, 0 to num_dbs - 1.
        rebuild: make a new attempt although a sealed one is there. A sealed attempt whose objects are gone or changed
            is made again in any case. A new attempt at a shard of a published run goes into a fork of that run.

    Raises:
        ConfigError: no such shard.
        IndexBuildError: the index does not cover the shard's rows.
        IntegrityError: the routed rows, or what was uploaded, are not what they should be.
    """
    if not 0 <= db_id < build.config.shards:
        raise ConfigError(f"shard {db_id} does not exist; this snapshot has shards 0 to {build.config.shards - 1}")
    run, ledger = build.receipts(run_id), build.ledger(run_id)
    shard, part = run.routed.shards[db_id], f"db={db_id:05d}"
    attempt = ledger.next_number(ShardReceipt, part)
    found = ledger.find(ShardReceipt, part, inputs=run.routed.inputs)
    standing = runs.standing_shards(build, run.scanned)
    if found is not None and standing is not None:
        found = standing.of(ledger, found)
    # A cleanup may have taken the tables of a run that nobody seemed to work on any more.
    usable = found is not None and (run.scanned.published or ledger.is_whole(found))
    if found is not None and usable and not rebuild and (run.scanned.held or is_intact(build.store, found)):
        return found.model_copy(update={"reason": "this shard was built and sealed before"})
    ranges = [ledger.read(RangeReceipt, key) for key in run.routed.ranges]
    rows = read_shard(build.store, ranges, db_id, shard) if shard.rows else None
    same = None if rebuild else same_shard(build, run, shard)
    with build.working(run.scanned):
        return ledger.commit(seal_shard(build, ledger, run, shard, rows, attempt, same), part, number=attempt)


def build_shards(
    build: Build,
    run_id: str,
    shards: Sequence[int],
    *,
    engine: Engine | None = None,
    rebuild: bool = False,
    keep_going: bool = False,
    on_done: OnDone = nobody,
) -> list[ShardReceipt]:
    """Builds several shards; see ``build_shard``.

    Args:
        build: what to build.
        run_id: the build.
        shards: their numbers.
        engine: where they are built; None is this process, a few at a time.
        rebuild: make new attempts although sealed ones are there.
        keep_going: build all others although one has failed; those that are built need not be built again.
        on_done: told of each shard that is built.

    Raises:
        TasksFailedError: shards failed; names each with its cause.
        SfPipelinesError: in this process, the error of the one that failed.
    """
    tasks = [Task(stage="build_shard", run_id=run_id, number=db_id, rebuild=rebuild) for db_id in shards]
    done = 0

    def one_more(task: Task, outcome: Outcome) -> None:
        nonlocal done
        done += 1
        build.report("shards", done, len(tasks), "shards")
        on_done(task, outcome)

    with nullcontext(engine) if engine else InProcess(build, slots=_SHARDS_AT_A_TIME) as where:
        receipts = spread(build, build.scanned(run_id), where, tasks, keep_going=keep_going, on_done=one_more)
    return [receipt for receipt in receipts if isinstance(receipt, ShardReceipt)]


# 6. assemble


def assemble(build: Build, run_id: str) -> ManifestReceipt:
    """Joins the shards of one run into a manifest under ``staging/`` and chooses ``num_probes``.

    A published run never changes: if a shard of it was built anew, the manifest is that of a fork (a copy under a new
    run id), and checks and promotion go on with the receipt's ``run_id``.

    Raises:
        ReceiptMissingError: a shard has not been built.
        CountMismatchError: the shards' rows and the rejects do not add up to the rows of the source.
    """
    run, ledger = build.receipts(run_id), build.ledger(run_id)
    scanned, sampled = run.scanned, run.sampled
    shards, standing = shard_receipts(ledger, run.routed), runs.standing_shards(build, scanned)
    if standing is not None:
        shards = [standing.of(ledger, shard) for shard in shards]
    inputs = inputs_of(
        queries=sampled.queries.sha256,
        routing=run.routing_digest,
        gate_key=build.config.gate_key(),
        root=build.store.url,
        shards=[(shard.db_id, shard.digest) for shard in shards],
    )
    number = ledger.next_number(ManifestReceipt)
    found = ledger.find_whole(ManifestReceipt, inputs=inputs, published=scanned.published)
    if found is None and scanned.held:
        # Under another gate, or with a shard built anew, it would be that of a fork, which is held back as well.
        found = ledger.find(ManifestReceipt)
    if found is not None:
        return found.model_copy(update={"reason": "this manifest was assembled before"})
    if ledger.find(PromoteReceipt) is not None:
        return assemble(build, fork_run(build, run, shards))
    rows = sum(shard.rows for shard in shards)
    if rows + sampled.rejected != sampled.rows_in:
        raise CountMismatchError(
            f"build {run_id}: {rows} rows in shards and {sampled.rejected} rejected do not make the "
            f"{sampled.rows_in} read"
        )
    with build.working(scanned):
        return ledger.commit(assemble_manifest(build, run, shards, inputs), number=number)


# 7. gate


def check(build: Build, run_id: str, name: str) -> Verdict:
    """Runs one check on the run's staged manifest and stores its verdict.

    A manifest that is published already was judged before; its verdict is re-emitted.

    Raises:
        ConfigError: no such check.
        ReceiptMissingError: there is no manifest yet.
    """
    scanned = build.scanned(run_id)
    with build.working(scanned):
        return gating.run_check(build, run_id, name, held=scanned.held)


def gate(build: Build, run_id: str) -> list[Verdict]:
    """All checks, in order."""
    verdicts: list[Verdict] = []
    for number, name in enumerate(CHECKS):
        verdicts.append(check(build, run_id, name))
        build.report("gate", number + 1, len(CHECKS), "checks")
    return verdicts


# 8. promote


def promote(build: Build, run_id: str) -> PromoteReceipt:
    """Publishes the run's manifest: the current pointer moves, if every required check has passed on these very bytes.

    The verdicts are read from the store and from nowhere else, so it does not matter who calls this, or when. What a
    rollback holds is not published; the receipt then is of what stays current.

    Raises:
        GateMissingError: a required check has not been run on this manifest.
        GateFailedError: a required check has failed.
        PublishConflictError: the pointer moved since the scan.
        IntegrityError: the staged manifest, a shard or the centroids are no longer what the checks have seen.
    """
    scanned, ledger = build.scanned(run_id), build.ledger(run_id)
    manifest = ledger.need(ManifestReceipt)
    inputs = inputs_of(manifest=manifest.manifest_digest)
    pointer = publish.read_pointer(build.store).pointer
    if pointer is not None and build.is_held(scanned, pointer):
        return runs.held_back(build, scanned, pointer, inputs)
    found = ledger.find(PromoteReceipt, inputs=inputs)
    if found is not None:
        reason = f"run {run_id} was published before; nothing is new"
        ref = build.store.url_of(found.manifest_key)
        return found.model_copy(update={"published": False, "reason": reason, "manifest_ref": ref})
    gating.require_passed(build, run_id, manifest)
    with build.working(scanned):
        gating.require_whole(build, run_id, manifest)
    data = staged_manifest(build.store, manifest)
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
    return ledger.commit(receipt, number=ledger.next_number(PromoteReceipt))
