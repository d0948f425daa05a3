"""What the stages of one build share: configuration, stores, scratch space, progress."""

import io
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, cast

import numpy as np
import pyarrow as pa

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError, DiskFullError, IntegrityError, SfPipelinesError, StoreError
from sf_pipelines.snapshot.manifest import record
from sf_pipelines.snapshot.manifest.pointer import Pointer
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.model import digest_json
from sf_pipelines.snapshot.routing import needs_training, routing_for
from sf_pipelines.snapshot.routing.protocol import Int32, Routing, RowRouting
from sf_pipelines.snapshot.run.ledger import Ledger, ReceiptType
from sf_pipelines.snapshot.run.receipts import (
    ManifestReceipt,
    PromoteReceipt,
    RangeReceipt,
    Receipt,
    RouteReceipt,
    SampleReceipt,
    ScanReceipt,
    TrainReceipt,
)
from sf_pipelines.snapshot.sharding import CelSharding, ExplicitSharding
from sf_pipelines.snapshot.source.contract import SHARD_COLUMN, RowContract
from sf_pipelines.snapshot.source.files import SourceListing
from sf_pipelines.snapshot.store import Ref, Store
from sf_pipelines.snapshot.store.client import first_line, is_disk_full

if TYPE_CHECKING:
    from sf_pipelines.snapshot.reader.options import ReaderOptions
    from sf_pipelines.snapshot.reader.reader import ShardedVectorReader, UnifiedShardedReader


_RENEW_SECONDS = 20.0
# As often as a record is renewed at most; a lease outlives several that the store did not take.
_BEAT_SECONDS = record.RENEW_AFTER.total_seconds()
# Each open shard keeps its index in memory, and a snapshot may have any number of shards.
_OPEN_SHARDS = 8
# Tables that a run keeps in memory: queries, truth, and what was read last.
_TABLES = 4


class Progress(Protocol):
    """Told how far a stage is."""

    def __call__(self, stage: str, done: int, total: int | None, unit: str) -> None:
        """``done`` of ``total`` (None: unknown) ``unit`` of a stage."""
        ...


def silent(stage: str, done: int, total: int | None, unit: str) -> None:
    """Progress that nobody watches."""
    del stage, done, total, unit


class Build:
    """A configuration with what is needed to work on it. Cheap to make; close it to free cached shards.

    Attributes:
        config: what to build; once a scan is known, with its number of shards.
        cache_dir: folder for verified local copies of shards; None is the readers' default.
    """

    def __init__(self, config: WriteConfig, *, progress: Progress | None = None, cache_dir: Path | None = None) -> None:
        self.config = config
        self._progress: Progress = progress or silent
        self.cache_dir = cache_dir
        self._renewed: dict[str, float] = {}
        self._leases: set[str] = set()
        self._runs: dict[str, Run] = {}
        self._reader: tuple[str, ShardedVectorReader | UnifiedShardedReader] | None = None

    @cached_property
    def store(self) -> Store:
        """The snapshot's root."""
        return Store.open(self.config.store, self.config.s3, create=True)

    def ledger(self, run_id: str) -> Ledger:
        """Receipts of a run, whoever's it is; each is read when it is asked for."""
        return Ledger(self.store, run_id)

    def run(self, run_id: str) -> "Run":
        """A run of this build."""
        return self._runs.setdefault(run_id, Run(self, run_id))

    def key_of(self, listing: SourceListing) -> str:
        """The build key: digest of the source's version and of the config fields that change bytes."""
        return digest_json({"source": listing.model_dump(mode="json"), "config": self.config.build_fields()})

    def resize(self, scanned: ScanReceipt) -> None:
        """Takes over the number of shards that a scan has come to."""
        if scanned.num_dbs is not None:
            self.config = self.config.sized(scanned.num_dbs)

    def is_held(self, scanned: ScanReceipt, pointer: Pointer | None) -> bool:
        """Whether a rollback keeps what this build makes, or has made, from being published; force does not help."""
        return pointer is not None and pointer.is_held(scanned.build_key, self.config.gate_key())

    def start_record(self, run_id: str) -> str:
        """Says that a build begins; the key of its record."""
        key = record.start_record(self.store, run_id)
        self._leases.add(key)
        return key

    def drop_record(self, key: str) -> None:
        """Takes back the record of a build that somebody else has begun at the same time."""
        self._leases.discard(key)
        self.store.delete(key)

    def give_up(self, error: BaseException) -> None:
        """Says that the builds that were worked on have ended, and gives back their leases: nothing waits for them."""
        for key in sorted(self._leases):
            try:
                record.finish(self.store, key, "failed", error=error)
            except (StoreError, IntegrityError) as second:
                # What stopped the build matters more than that it could not be written down.
                error.add_note(f"the build record {key} could not be updated: {second}")
        self._leases.clear()

    def renew(self, scanned: ScanReceipt) -> None:
        """Says that a build goes on; cheap enough to call for every batch."""
        self._leases.add(scanned.record_key)
        now = time.monotonic()
        if now - self._renewed.get(scanned.record_key, -_RENEW_SECONDS) >= _RENEW_SECONDS:
            record.renew(self.store, scanned.record_key)
            self._renewed[scanned.record_key] = now

    @contextmanager
    def working(self, scanned: ScanReceipt) -> Iterator[None]:
        """Says that a build goes on for as long as one piece of work takes that does not say so itself."""
        if scanned.published:
            yield
            return
        ended = threading.Event()
        beat = threading.Thread(target=self._beat, args=(scanned, ended), name="sf-pipelines-lease", daemon=True)
        beat.start()
        try:
            yield
        finally:
            # Joined: nobody must find a build running that was just said to have ended.
            ended.set()
            beat.join()

    def _beat(self, scanned: ScanReceipt, ended: threading.Event) -> None:
        while not ended.wait(_BEAT_SECONDS):
            # A store that fails just now, or a record that is gone, does not end the work: the next beat tries again,
            # and the stage that needs the store says what is wrong.
            with suppress(StoreError, IntegrityError):
                record.renew(self.store, scanned.record_key)

    def contract(self, schema: pa.Schema) -> RowContract:
        """The data contract for a source of this schema."""
        if needs_training(self.config.sharding):
            return RowContract(self.config, schema)
        routing = self.routing(None)
        if not isinstance(routing, RowRouting):
            raise TypeError(f"{routing.strategy} is trained on nothing and routes no rows")
        return RowContract(self.config, schema, routing)

    def routing(self, matrix: Float32 | None) -> Routing:
        """How rows find their shard: by what was trained, or by the configuration alone."""
        config = self.config
        return routing_for(config.sharding, num_dbs=config.shards, metric=config.vector_spec.metric, matrix=matrix)

    def own_shards(self, rows: pa.Table) -> Int32 | None:
        """Shards that sampled rows lie in, where a query must say so itself; None where it is routed or asks all."""
        if isinstance(self.config.sharding, ExplicitSharding | CelSharding):
            return rows.column(SHARD_COLUMN).to_numpy()
        return None

    def report(self, stage: str, done: int, total: int | None, unit: str = "rows") -> None:
        """Tells the watcher how far a stage is."""
        self._progress(stage, done, total, unit)

    @property
    def reader_options(self) -> "ReaderOptions":
        """Of every reader that measures: it asks the index of every shard.

        What is proven must hold where shards are too large to be scanned, too.
        """
        return {
            "s3": self.config.s3,
            "cache_dir": self.cache_dir,
            "max_cached_shards": _OPEN_SHARDS,
            "exact_scan": False,
        }

    def reader(self, manifest_key: str) -> "ShardedVectorReader | UnifiedShardedReader":
        """A reader of one manifest, kept open for the next caller."""
        from sf_pipelines.snapshot.reader.reader import ShardedVectorReader, UnifiedShardedReader

        if self._reader is None or self._reader[0] != manifest_key:
            self.close()
            face = ShardedVectorReader if self.config.key_value is None else UnifiedShardedReader
            options: ReaderOptions = {**self.reader_options, "manifest_key": manifest_key}
            self._reader = manifest_key, face(self.config.store, **options)
        return self._reader[1]

    def close(self) -> None:
        """Closes the reader."""
        if self._reader is not None:
            self._reader[1].close()
            self._reader = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes it; where it ends by an error or is interrupted, the build has failed."""
        try:
            if error is not None:
                self.give_up(error)
        finally:
            self.close()


class Run(Ledger):
    """One run of a build: the receipt of each of its stages, read from the store once, and what follows from them.

    What another process writes meanwhile changes nothing here: a stage works from one set of receipts.

    Attributes:
        build: that it is a run of.
    """

    def __init__(self, build: Build, run_id: str) -> None:
        super().__init__(build.store, run_id)
        self.build = build
        self._known: dict[type[Receipt], Receipt] = {}
        self._read: dict[str, Receipt] = {}
        self._tables: dict[str, pa.Table] = {}

    @property
    def scanned(self) -> ScanReceipt:
        """The newest scan; renews the build's lease."""
        receipt = self._scan
        if not receipt.published:
            self.build.renew(receipt)
        return receipt

    @cached_property
    def _scan(self) -> ScanReceipt:
        receipt, build = self.need(ScanReceipt), self.build
        build.resize(receipt)
        if receipt.build_key != build.key_of(receipt.listing):
            raise ConfigError(
                f"run {self.run_id} was begun with another configuration than snapshot {build.config.name!r} has now; "
                "scan again (in Dagster: materialize source_vectors and what follows)"
            )
        if self.find(PromoteReceipt) is None:
            return receipt
        held = build.is_held(receipt, read_pointer(self.store).pointer)
        return receipt.model_copy(update={"published": True, "held": held})

    @property
    def sampled(self) -> SampleReceipt:
        """Validated rows and samples."""
        return self.need(SampleReceipt)

    @property
    def trained(self) -> TrainReceipt | None:
        """Centroids or hyperplanes; None for strategies that train nothing."""
        return self.need(TrainReceipt) if needs_training(self.build.config.sharding) else None

    @property
    def routed(self) -> RouteReceipt:
        """Rows of each shard."""
        return self.need(RouteReceipt)

    @cached_property
    def manifest(self) -> ManifestReceipt:
        """The newest staged manifest for this gate; where there is none, the newest one."""
        newest = self.need(ManifestReceipt)
        gate_key = self.build.config.gate_key()
        if newest.gate_key == gate_key:
            return newest
        return next((one for one in self.all_of(ManifestReceipt) if one.gate_key == gate_key), newest)

    @property
    def routing_digest(self) -> str:
        """Digest of what was trained; empty where the configuration alone decides, which the build key covers."""
        return self.trained.ref.sha256 if self.trained else ""

    @cached_property
    def routing(self) -> Routing:
        """How rows and queries find their shard."""
        matrix = None
        if self.trained is not None:
            matrix = np.load(io.BytesIO(self.store.get_sealed(self.trained.ref)), allow_pickle=False)
        return self.build.routing(matrix)

    @cached_property
    def ranges(self) -> list[RangeReceipt]:
        """Where the routed rows are."""
        return [self.read(RangeReceipt, key) for key in self.routed.ranges]

    @cached_property
    def queries(self) -> pa.Table:
        """The queries that the truth is of; see ``gate.recall.stratified_queries``."""
        return self.get_table(self.routed.queries or self.sampled.queries)

    def need(self, kind: type[ReceiptType], part: str = "") -> ReceiptType:
        if part:
            return super().need(kind, part)
        if kind not in self._known:
            self._known[kind] = super().need(kind)
        return cast("ReceiptType", self._known[kind])

    def read(self, kind: type[ReceiptType], key: str) -> ReceiptType:
        # Receipts are never written again.
        if key not in self._read:
            self._read[key] = super().read(kind, key)
        return cast("ReceiptType", self._read[key])

    def get_table(self, ref: Ref) -> pa.Table:
        """A stored table; the last few are kept: several checks look at the same queries and truth."""
        table = self._tables.get(ref.key)
        if table is None:
            table = self._tables[ref.key] = super().get_table(ref)
            for key in list(self._tables)[:-_TABLES]:
                self._tables.pop(key, None)
        return table

    def commit(self, receipt: ReceiptType, part: str = "", *, number: int) -> ReceiptType:
        done = super().commit(receipt, part, number=number)
        self._read[done.key] = done
        if not part:
            self.take(done)
        return done

    def take(self, receipt: Receipt) -> None:
        """Goes on from this receipt."""
        self._known[type(receipt)] = receipt
        for name in ("_scan", "manifest", "routing", "ranges", "queries"):
            self.__dict__.pop(name, None)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one piece of work, gone afterwards; so is the memory that Arrow's allocator kept for reuse.

    What comes next is another library with its own allocator: without this, their leftovers add up.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="sf_pipelines-build-") as folder:
            yield Path(folder)
    except (SfPipelinesError, GeneratorExit):
        raise
    except Exception as error:
        # Every library has an error of its own for it.
        if not is_disk_full(error):
            raise
        raise DiskFullError(
            f"the disk of scratch files is full: {first_line(error)}; free it, or name a larger one in TMPDIR"
        ) from error
    pa.default_memory_pool().release_unused()


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far."""
        return round(time.perf_counter() - self._start, 6)
