"""Building one shard's index, uploading it, and sealing what was uploaded."""

import hashlib
import uuid
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sf_pipelines.snapshot.arrow import vectors_of
from sf_pipelines.snapshot.config import BUILD_VERSION, KeyEncoding
from sf_pipelines.snapshot.errors import (
    ConfigError,
    CountMismatchError,
    DigestMismatchError,
    IndexBuildError,
    IntegrityError,
    ObjectMissingError,
    StoreError,
)
from sf_pipelines.snapshot.gate.recall import NOBODY, row_numbers, truth_table
from sf_pipelines.snapshot.index import backend_named
from sf_pipelines.snapshot.index.key_value import KeyValueShard, encode_keys, write_key_values
from sf_pipelines.snapshot.index.protocol import IndexFamily
from sf_pipelines.snapshot.index.scan import MemoryScan
from sf_pipelines.snapshot.manifest.models import ShardObject
from sf_pipelines.snapshot.model import digest_json
from sf_pipelines.snapshot.reader.cache import ShardCache
from sf_pipelines.snapshot.run.build import Build, Run, Stopwatch, scratch
from sf_pipelines.snapshot.run.ledger import copy_shard, is_intact
from sf_pipelines.snapshot.run.receipts import RoutedShard, ShardReceipt, attempt_folder, shard_part
from sf_pipelines.snapshot.run.successor import begin_successor, current_of
from sf_pipelines.snapshot.run.tasks import Engine, InProcess, OnDone, Outcome, Task, spread
from sf_pipelines.snapshot.source.hashing import hash_column
from sf_pipelines.snapshot.source.keys import KEY_COLUMN, VALUE_COLUMN
from sf_pipelines.snapshot.stages.route import read_shard
from sf_pipelines.snapshot.store import Store

# Shards in the making at a time: while one is indexed, another is read, uploaded or digested. Each holds its rows.
_SHARDS_AT_A_TIME = 2
# Rows of each shard that the round trip must find again.
_WITNESSES = 4


def build_shard(build: Build, run_id: str, db_id: int, *, rebuild: bool = False) -> ShardReceipt:
    """Builds, uploads, re-opens and seals one shard's index.

    Where the current snapshot holds the same rows in the same kind of index, that is copied inside the store instead.
    A published run never changes: a shard of it is rebuilt in its successor.
    """
    if not 0 <= db_id < build.config.shards:
        raise ConfigError(f"shard {db_id} does not exist; this snapshot has shards 0 to {build.config.shards - 1}")
    run = build.run(run_id)
    shard, part = run.routed.shards[db_id], shard_part(db_id)
    found, attempt = run.seek(ShardReceipt, part, inputs=run.routed.inputs)
    # A cleanup may have taken the tables of a run that nobody seemed to work on any more.
    usable = found is not None and (run.scanned.published or run.is_whole(found))
    if found is not None and usable and not rebuild and (run.scanned.held or is_intact(build.store, found)):
        return found.model_copy(update={"reason": "this shard was built and sealed before"})
    if run.scanned.published:
        current, view = current_of(run)
        target = begin_successor(run, view) if current is run else current
        return build_shard(build, target.run_id, db_id, rebuild=rebuild)
    try:
        rows = read_shard(run.store, run.ranges, db_id, shard) if shard.rows else None
    except ObjectMissingError as error:
        # Those of a successor are in the run before it, which a cleanup may have removed.
        raise IntegrityError(f"the routed rows of run {run_id} are gone: {error}; build again with force") from error
    same = None if rebuild else _same_shard(run, shard)
    with build.working(run.scanned):
        return run.commit(seal_shard(run, shard, rows, attempt, same), part, number=attempt)


def build_shards(
    build: Build,
    run_id: str,
    shards: Sequence[int],
    *,
    engine: Engine | None = None,
    rebuild: bool = False,
    keep_going: bool = False,
    on_done: OnDone | None = None,
) -> list[ShardReceipt]:
    """Builds several shards; see ``build_shard``."""
    tasks = [Task(stage="build_shard", run_id=run_id, number=db_id, rebuild=rebuild) for db_id in shards]
    done = 0

    def one(task: Task) -> ShardReceipt:
        return build_shard(build, run_id, task.number, rebuild=task.rebuild)

    def one_more(task: Task, outcome: Outcome) -> None:
        nonlocal done
        done += 1
        build.report("shards", done, len(tasks), "shards")
        if on_done is not None:
            on_done(task, outcome)

    with nullcontext(engine) if engine else InProcess(_SHARDS_AT_A_TIME, one) as where:
        receipts = spread(build, build.run(run_id).scanned, where, tasks, keep_going=keep_going, on_done=one_more)
    return [receipt for receipt in receipts if isinstance(receipt, ShardReceipt)]


def _same_shard(run: Run, shard: RoutedShard) -> ShardReceipt | None:
    """The current snapshot's shard that holds the same rows in the same kind of index, if there is one."""
    base = run.scanned.base_run_id
    if base is None or run.scanned.forced or not shard.rows:
        return None
    found = run.build.ledger(base).find(ShardReceipt, shard_part(shard.db_id))
    if found is None or (found.rows, found.rows_digest, found.recipe) != (
        shard.rows,
        shard.digest,
        _recipe(run),
    ):
        return None
    return found if is_intact(run.store, found) else None


def seal_shard(
    run: Run, shard: RoutedShard, rows: pa.Table | None, attempt: int, same: ShardReceipt | None
) -> ShardReceipt:
    """Puts the index of some rows into the store and re-opens it there to count and digest it."""
    watch = Stopwatch()
    part = shard_part(shard.db_id)
    made: dict[str, Any] = {"db_key": None, "indexed_rows": 0}
    if rows is not None:
        token = uuid.uuid4().hex
        db_key = attempt_folder(run.run_id, shard.db_id, attempt, token)
        copied = None if same is None else _copy(run.store, same, db_key)
        objects, etags = copied or _build_and_upload(run, rows, db_key)
        witnesses = _witnesses(rows)
        indexed = _reopen(run, db_key, objects, witnesses, expected_rows=shard.rows)
        made = {
            "db_key": db_key,
            "indexed_rows": indexed,
            "objects": objects,
            "etags": etags,
            "checkpoint_id": token,
            "reused": same.db_key if same is not None and copied else None,
            "truth": run.put_table(f"truth/{part}", _truth(run, rows, shard.db_id)),
            "witnesses": run.put_table(f"witnesses/{part}", witnesses),
            **_key_range(rows),
        }
    return ShardReceipt(
        run_id=run.run_id,
        inputs=run.routed.inputs,
        db_id=shard.db_id,
        attempt=attempt,
        rows=shard.rows,
        rows_digest=shard.digest,
        recipe=_recipe(run),
        seconds=watch.seconds,
        **made,
    )


def _recipe(run: Run) -> str:
    """Digest of everything beside its rows that decides what a shard holds."""
    config = run.build.config
    spec = config.vector_spec
    return digest_json(
        {
            "build_version": BUILD_VERSION,
            "backend": spec.backend,
            "metric": spec.metric.value,
            "dim": spec.dim,
            "vector_type": spec.vector_type,
            "index_family": run.routed.index_family,
            "index_params": spec.index_params.model_dump(mode="json"),
            "id_type": run.scanned.id_type,
            "filter_columns": run.scanned.filter_columns,
            "payload_columns": config.payload_cols,
            "key_encoding": run.scanned.key_encoding,
            "key_value": None if config.key_value is None else config.key_value.model_dump(mode="json"),
        }
    )


def _copy(
    store: Store, same: ShardReceipt, db_key: str
) -> tuple[tuple[ShardObject, ...], tuple[str | None, ...]] | None:
    """Copies a sealed shard inside the store and looks at every byte of the copy; None where that fails.

    The shard is then built: what went wrong with the current snapshot must not stop the next one.
    """
    try:
        return same.objects, copy_shard(store, same, db_key)
    except (StoreError, DigestMismatchError):
        # Gone, changed, or larger than the store copies in one go.
        store.delete_many([info.key for info in store.objects(db_key)])
        return None


def _build_and_upload(run: Run, rows: pa.Table, db_key: str) -> tuple[tuple[ShardObject, ...], tuple[str | None, ...]]:
    with scratch() as folder:
        _build_in(run, rows, folder)
        objects: list[ShardObject] = []
        etags: list[str | None] = []
        for path in sorted(item for item in folder.rglob("*") if item.is_file()):
            name = path.relative_to(folder).as_posix()
            objects.append(ShardObject(path=name, size=path.stat().st_size, sha256=_sha256(path)))
            etags.append(run.store.upload(path, f"{db_key}/{name}"))
    return tuple(objects), tuple(etags)


def _build_in(run: Run, rows: pa.Table, folder: Path) -> None:
    """Writes keys and values, where there are any, and the index."""
    spec, backend = run.build.config.vector_spec, backend_named(run.build.config.vector_spec.backend)
    encoding, place = run.scanned.key_encoding, folder
    if encoding is not None:
        # Values of one shard may be more than the 2 GiB that plain binary can point into.
        values = rows.column(VALUE_COLUMN).cast(pa.large_binary()).combine_chunks()
        write_key_values(folder, encode_keys(_one(rows, KEY_COLUMN), encoding), values)
        rows, place = rows.drop_columns([KEY_COLUMN, VALUE_COLUMN]), folder / backend.subfolder
    backend.build(
        rows,
        place,
        family=IndexFamily(run.routed.index_family),
        metric=spec.metric,
        params=spec.index_params,
        vector_type=spec.vector_type,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reopen(
    run: Run,
    db_key: str,
    objects: tuple[ShardObject, ...],
    witnesses: pa.Table,
    *,
    expected_rows: int,
) -> int:
    """Opens a verified copy of what was uploaded, counts, and looks some keys up; indexed rows."""
    spec, backend = run.build.config.vector_spec, backend_named(run.build.config.vector_spec.backend)
    where, encoding = run.store.url_of(db_key), run.scanned.key_encoding
    with ShardCache(run.build.cache_dir).checkout(run.store, db_key, objects) as folder:
        place = folder
        if encoding is not None:
            _look_up(folder, where, witnesses, encoding, expected_rows)
            place = folder / backend.subfolder
        with closing(backend.open(place, metric=spec.metric, dim=spec.dim)) as index:
            if index.rows != expected_rows:
                raise CountMismatchError(f"{where}: {expected_rows} rows were routed, {index.rows} are stored")
            if index.indexed_rows != expected_rows:
                raise IndexBuildError(f"{where}: the index covers {index.indexed_rows} of {index.rows} rows")
            return index.indexed_rows


def _look_up(folder: Path, where: str, witnesses: pa.Table, encoding: KeyEncoding, expected_rows: int) -> None:
    with closing(KeyValueShard(folder)) as stored:
        if stored.rows != expected_rows:
            raise CountMismatchError(f"{where}: {expected_rows} rows were routed, {stored.rows} keys are stored")
        keys = encode_keys(_one(witnesses, KEY_COLUMN), encoding).to_pylist()
        values = witnesses.column(VALUE_COLUMN).to_pylist()
        for key, value, found in zip(keys, values, stored.get_many(keys), strict=True):
            if found != value:
                raise IntegrityError(f"{where}: key {key.hex()} has another value than was routed")


def _truth(run: Run, rows: pa.Table, db_id: int) -> pa.Table:
    """While the rows are in memory: the exact neighbours among them of each sample query that may see them."""
    queries, config = run.queries, run.build.config
    own = run.build.own_shards(queries)
    asked = np.arange(queries.num_rows) if own is None else np.flatnonzero(own == db_id)
    # One more than k: a query's own row is left out when the shards are merged.
    k = config.recall_gate.k + 1
    ids = _one(rows, "id")
    _check_sampled(queries, ids, rows)
    if not len(asked):
        return truth_table(asked, NOBODY)
    scan = MemoryScan(row_numbers(ids), np.arange(len(ids)), vectors_of(rows), config.vector_spec.metric)
    return truth_table(asked, scan.search(vectors_of(queries)[asked], k))


def _check_sampled(queries: pa.Table, ids: pa.Array, rows: pa.Table) -> None:
    """Sampled rows must have the vectors that they had then: what is trained and measured rests on them."""
    place = pc.call_function("index_in", [ids], pc.SetLookupOptions(_one(queries, "id")))
    here = np.flatnonzero(np.asarray(place.is_valid()))
    if not len(here):
        return
    sampled = vectors_of(queries)[place.take(pa.array(here)).to_numpy()]
    changed = here[(vectors_of(rows)[here] != sampled).any(axis=1)]
    if len(changed):
        shown = ids[int(changed[0])].as_py()
        raise IntegrityError(f"row {shown!r} has another vector than when it was sampled; build again with force")


def _witnesses(rows: pa.Table) -> pa.Table:
    """Rows that must be found again: always the same ones."""
    chosen = np.argsort(hash_column(_one(rows, "id")), kind="stable")[:_WITNESSES]
    # Row by row: taking them at once would join all payloads and values, which may be more than 2 GiB.
    return pa.concat_tables([rows.slice(row, 1) for row in chosen.tolist()]).combine_chunks()


def _key_range(rows: pa.Table) -> dict[str, int | str]:
    """Smallest and largest key; the manifest has no way to say bytes."""
    if KEY_COLUMN not in rows.column_names or pa.types.is_binary(rows.schema.field(KEY_COLUMN).type):
        return {}
    ends = pc.call_function("min_max", [rows.column(KEY_COLUMN)])
    return {"min_key": ends["min"].as_py(), "max_key": ends["max"].as_py()}


def _one(rows: pa.Table, name: str) -> pa.Array:
    """A column in one piece."""
    column = rows.column(name).combine_chunks()
    return cast("pa.Array", column)
