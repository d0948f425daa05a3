"""An executable model of what a stock shardyfusion 0.1.0 reader reads.

``check_format`` walks a published snapshot as such a reader does: pointer, manifest, routing arrays, shards; and it
looks at what the reader takes for granted. It shares no code with the writer and the readers of this package, so
that a mistake in those does not excuse itself.
"""

import io
import struct
import tempfile
import tokenize
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sf_pipelines.snapshot.errors import ObjectMissingError
from sf_pipelines.snapshot.store import ObjectInfo, Store
from sf_pipelines.snapshot.store.client import S3Options
from sf_pipelines_tests.format_checker.lance import DATASET, StoredVectors, check_lance, check_one_family
from sf_pipelines_tests.format_checker.manifest import (
    ManifestContent,
    Place,
    check_history,
    check_pointer,
    is_int,
    read_manifest,
)
from sf_pipelines_tests.format_checker.report import (
    STOCK_DEFECTS,
    CannotGoOnError,
    Duty,
    Findings,
    FormatReport,
    some,
)
from sf_pipelines_tests.format_checker.routing import (
    check_cel_key,
    check_cluster,
    check_hash,
    check_ids,
    check_lsh,
    decode_keys,
)
from sf_pipelines_tests.format_checker.shard_rows import ShardEntry, check_shard_rows, other_runs
from sf_pipelines_tests.format_checker.sqlite import DATABASE, SqliteShard, check_sqlite
from sf_pipelines_tests.format_checker.vector_fields import VectorFields, check_vector_fields

_COMPOSITE = "vector"
# What numpy raises for damaged headers, which it parses as Python, and for archives; warnings where they are errors.
_UNREADABLE = (
    *(ObjectMissingError, ValueError, EOFError, TypeError, LookupError, OverflowError, MemoryError, RecursionError),
    *(SyntaxError, tokenize.TokenError, struct.error, zipfile.BadZipFile, UserWarning),
)
_SIDECAR = "shard.sidecar"


def check_format(
    root: str | Path,
    *,
    s3: S3Options | None = None,
    manifest_key: str | None = None,
    sample: int = 5,
    writer: Literal["ours", "stock"] = "ours",
) -> FormatReport:
    """Checks a published snapshot against what a stock reader reads and what a writer owes it.

    Everything is downloaded and every row is looked at: meant for tests, not for large snapshots.

    Args:
        root: ``s3://bucket/prefix``, ``file:///path`` or a path; where its ``_CURRENT`` is.
        s3: credentials and endpoint; None takes the environment's.
        manifest_key: manifest to check instead of the one that the pointer names, which is then not looked at.
        sample: stored vectors and keys of each shard that are searched for.
        writer: ``"stock"`` moves faults that the stock writer is known for to ``excused``.

    Returns:
        The report; its ``faults`` are empty for a snapshot that is in order.

    Raises:
        ConfigError: the root has an unknown scheme.
        StoreError: the store cannot be read.
    """
    place = Place(Store.open(root, s3))
    findings = Findings(place.store.url, STOCK_DEFECTS if writer == "stock" else frozenset())
    try:
        _check_snapshot(findings, place, manifest_key, sample, ids_are_keys=writer == "ours")
    except CannotGoOnError:
        # The fault that stopped the walk is in the report.
        return findings.report
    return findings.report


def assert_format(
    root: str | Path,
    *,
    s3: S3Options | None = None,
    manifest_key: str | None = None,
    sample: int = 5,
    writer: Literal["ours", "stock"] = "ours",
) -> None:
    """Like ``check_format``, for tests.

    Raises:
        AssertionError: there are faults; the message lists them.
    """
    report = check_format(root, s3=s3, manifest_key=manifest_key, sample=sample, writer=writer)
    if not report.passed:
        raise AssertionError("\n- ".join([f"{report.root} is not what a stock reader reads:", *report.faults]))


def _check_snapshot(
    findings: Findings, place: Place, manifest_key: str | None, sample: int, *, ids_are_keys: bool
) -> None:
    named = None
    key = manifest_key
    if key is None:
        key, named = check_pointer(findings, place)
    manifest = read_manifest(findings, place, key)
    findings.expect(
        Duty.MANIFEST_KEY,
        named in {None, manifest.run_id},
        f"_CURRENT.run_id is {named!r}, but build_meta.run_id is {manifest.run_id!r}",
    )
    check_history(findings, place, key, manifest.run_id)
    fields = check_vector_fields(findings, place, manifest)
    shards = check_shard_rows(findings, place, manifest, unified=fields.unified)
    other_runs(findings, place, key, manifest)
    array = _routing_array(findings, place, fields)
    with tempfile.TemporaryDirectory(prefix="format_checker_") as folder:
        check = _ShardCheck(
            findings, place, manifest, fields, array, sample, Path(folder), ids_are_keys=ids_are_keys and fields.unified
        )
        check.run(shards)


def _routing_array(findings: Findings, place: Place, fields: VectorFields) -> NDArray[Any] | None:
    """Centroids or hyperplanes; None where there are none or they cannot be used."""
    key = fields.array_key
    if key is None:
        return None
    expect, duty = findings.expect, Duty.ROUTING_ARRAYS
    try:
        array = np.load(io.BytesIO(place.store.get(key)))
    except _UNREADABLE as error:
        expect(duty, False, f"{key} cannot be loaded ({error}): ReaderStateError at open")
        return None
    rows = fields.num_dbs if fields.strategy == "cluster" else fields.num_hash_bits
    good = expect(
        duty,
        isinstance(array, np.ndarray) and array.shape == (rows, fields.dim),
        f"{key} has the shape {getattr(array, 'shape', None)}, must be ({rows}, {fields.dim}); stock does not check",
    )
    if not good:
        return None
    expect(duty, str(array.dtype) == "float32", f"{key} is {array.dtype}, must be float32: routing differs")
    return array if expect(duty, bool(np.isfinite(array).all()), f"{key} has NaN or infinity") else None


class _ShardCheck:
    """Looks into every shard that the manifest lists."""

    def __init__(
        self,
        findings: Findings,
        place: Place,
        manifest: ManifestContent,
        fields: VectorFields,
        array: NDArray[Any] | None,
        sample: int,
        folder: Path,
        *,
        ids_are_keys: bool,
    ) -> None:
        self._findings = findings
        self._place = place
        self._fields = fields
        self._array = array
        self._sample = sample
        self._folder = folder
        self._ids_are_keys = ids_are_keys
        self._sidecars = "sqlite_sidecar" in manifest.custom
        self._families: dict[str, str | None] = {}
        self._backends: set[str] = set()
        self._ids: Counter[tuple[type, Any]] = Counter()

    def run(self, shards: list[ShardEntry]) -> None:
        """Checks them one by one, then what must be the same in all."""
        expect = self._findings.expect
        for shard in shards:
            self._check(shard)
        check_one_family(self._findings, self._families)
        expect(
            Duty.SHARD_ROWS, len(self._backends) <= 1, f"shards are of {sorted(self._backends)}, must be of one kind"
        )
        twice = [row_id for (_, row_id), times in self._ids.items() if times > 1]
        expect(Duty.ROWS, not twice, f"the ids {some(twice)} are stored more than once: they come back repeatedly")

    def _check(self, shard: ShardEntry) -> None:
        objects = {item.key.removeprefix(f"{shard.key}/"): item for item in self._place.store.objects(shard.key)}
        backend = self._backend(shard, set(objects))
        if backend is None:
            return
        self._backends.add(backend)
        local = self._folder / str(shard.db_id)
        for name, item in objects.items():
            self._place.store.download(item.key, local / name)
        fields = self._fields
        with_database = fields.unified or backend == "sqlite-vec"
        database = self._database(shard, local, vectors=backend == "sqlite-vec") if with_database else None
        stored = database.stored if database is not None else None
        if backend == "lancedb":
            found = check_lance(
                self._findings,
                str(shard),
                local / _COMPOSITE if fields.unified else local,
                dim=fields.dim,
                metric=fields.metric,
                sample=self._sample,
            )
            if found is not None:
                self._families[str(shard)] = found.family
                stored = found.stored
        if stored is not None:
            self._vectors(shard, stored)
            if self._ids_are_keys and database is not None:
                check_ids(self._findings, str(shard), database.keys, stored.ids, fields.key_encoding)
        self._weigh(shard, objects, with_database=with_database)

    def _backend(self, shard: ShardEntry, names: set[str]) -> str | None:
        """What the directory holds; None, with a fault, when it is not what the manifest says."""
        expect, fields = self._findings.expect, self._fields
        dataset = f"{_COMPOSITE}/{DATASET}/" if fields.unified else f"{DATASET}/"
        lance = any(name.startswith(dataset) for name in names)
        backend = fields.backend or ("lancedb" if lance else "sqlite-vec")
        needed = [(DATABASE, DATABASE in names)] if fields.unified or backend == "sqlite-vec" else []
        needed += [(dataset, lance)] if backend == "lancedb" else []
        missing = [name for name, there in needed if not there]
        duty = Duty.LANCE_TABLE if backend == "lancedb" else Duty.SQLITE_FILE
        there = expect(duty, not missing, f"{shard}: {shard.key} has no {' or '.join(missing)}: stock answers []")
        expect(
            duty,
            not (there and not fields.unified and lance and DATABASE in names),
            f"{shard}: {shard.key} has both {DATASET} and {DATABASE}, and nothing says which one counts",
        )
        return backend if there else None

    def _database(self, shard: ShardEntry, local: Path, *, vectors: bool) -> SqliteShard | None:
        fields, findings = self._fields, self._findings
        found = check_sqlite(
            findings,
            str(shard),
            local / DATABASE,
            vectors=vectors,
            dim=fields.dim,
            metric=fields.metric,
            sample=self._sample,
        )
        if found is None:
            return None
        wanted = shard.row_count if fields.unified else 0
        findings.expect(
            Duty.KEY_VALUES,
            len(found.keys) == wanted,
            f"{shard}: kv has {len(found.keys)} rows, must have {wanted}",
        )
        if fields.unified:
            self._keys(shard, found.keys)
        return found

    def _keys(self, shard: ShardEntry, keys: list[bytes]) -> None:
        fields, findings = self._fields, self._findings
        decoded = decode_keys(findings, str(shard), keys, fields.key_encoding)
        if len(decoded) < len(keys):
            return
        if fields.strategy == "hash":
            check_hash(findings, str(shard), decoded, shard.db_id, fields.num_dbs)
        elif fields.formula is not None:
            check_cel_key(findings, str(shard), decoded, shard.db_id, fields.formula)
        for name, value, found in (("min_key", shard.min_key, decoded[:1]), ("max_key", shard.max_key, decoded[-1:])):
            typed = [key.decode(errors="replace") if isinstance(key, bytes) else key for key in found]
            findings.expect(
                Duty.SHARD_ROWS,
                value is None or [value] == typed,
                f"{shard}: {name} is {value!r}, the keys begin or end with {typed}",
            )

    def _vectors(self, shard: ShardEntry, stored: StoredVectors) -> None:
        fields, findings = self._fields, self._findings
        findings.expect(
            Duty.ROWS,
            len(stored.ids) == shard.row_count,
            f"{shard}: row_count is {shard.row_count}, but there are {len(stored.ids)} vectors",
        )
        self._ids.update((type(row_id), row_id) for row_id in stored.ids)
        if self._array is None:
            return
        vectors = stored.vectors
        if fields.strategy == "cluster":
            check_cluster(findings, str(shard), vectors, shard.db_id, self._array, fields.metric)
        else:
            check_lsh(findings, str(shard), vectors, shard.db_id, self._array, fields.num_dbs)

    def _weigh(self, shard: ShardEntry, objects: dict[str, ObjectInfo], *, with_database: bool) -> None:
        """Composite shards count ``shard.db`` alone: readers choose how to open that by this number."""
        expect = self._findings.expect
        counted = [item.size for name, item in objects.items() if not with_database or name == DATABASE]
        what = DATABASE if with_database else "the objects"
        expect(
            Duty.DB_BYTES,
            is_int(shard.db_bytes) and shard.db_bytes == sum(counted),
            f"{shard}: db_bytes is {shard.db_bytes}, {what} weigh {sum(counted)}: readers choose by it how to open",
        )
        if with_database:
            expect(
                Duty.SIDECAR,
                not self._sidecars or _SIDECAR in objects,
                f"{shard}: custom.sqlite_sidecar is there, but no {_SIDECAR}",
            )
