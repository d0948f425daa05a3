"""Receipts: what each stage did, kept in the store itself, so that anybody can resume from them.

A receipt names the digest of its ``inputs``; a stage that finds a receipt with the inputs it would work from has
nothing to do. Receipts are numbered per stage and part and written by conditional create: two attempts at one thing
have exactly one winner.
"""

import uuid
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field

from sf_pipelines.snapshot.config import KeyEncoding
from sf_pipelines.snapshot.manifest.models import CurvePoint, ShardObject
from sf_pipelines.snapshot.model import Model, digest_json
from sf_pipelines.snapshot.source.columns import IdType
from sf_pipelines.snapshot.source.files import SourceListing
from sf_pipelines.snapshot.source.keys import KeyType
from sf_pipelines.snapshot.store import Ref

SQLITE_FILE = "shard.db"


class Receipt(Model):
    """What every receipt says.

    Attributes:
        run_id: the build.
        inputs: digest of all that the stage worked from.
        write_id: unique to this writing.
        created_at: when, UTC.
        seconds: how long the work took.
        key: the receipt's own object; filled in when it is read.
        reason: why nothing was done this time; never stored.
    """

    # Older and newer versions may say more.
    model_config = ConfigDict(extra="ignore")

    stage: ClassVar[str]

    run_id: str
    inputs: str
    write_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0
    key: str = ""
    reason: str = ""

    def refs(self) -> dict[str, Ref]:
        """Objects that later stages read, by field; without them the receipt is of no use."""
        return {name: value for name, value in self if isinstance(value, Ref)}

    @property
    def number(self) -> int:
        """Place among the receipts of its stage and part."""
        return int(self.key.rsplit("/", 1)[-1].removesuffix(".json"))

    def renewed(self, **changes: Any) -> Self:
        """The receipt with these changes, to be written again."""
        fresh = {"write_id": uuid.uuid4().hex, "created_at": datetime.now(UTC), "reason": ""}
        return self.model_copy(update=fresh | changes)

    @property
    def digest(self) -> str:
        """Digest of what the receipt says, apart from when and by whom it was written."""
        content = self.model_dump(mode="json", exclude={"write_id", "created_at", "seconds", "key", "reason"})
        return digest_json(content)


class ScanReceipt(Receipt):
    """The pinned source.

    Attributes:
        build_key: digest of source version and config: says whether anything is new.
        gate_key: digest of what decides ``num_probes`` and the verdicts.
        listing: pinned files.
        num_dbs: number of shards, as said or as ``auto`` has chosen it; None in receipts of old.
        sizing: why ``auto`` has chosen it.
        id_type: type of the ids.
        key_type: type of the keys; None without keys.
        key_encoding: how keys are stored.
        filter_columns: filter columns with their stored types.
        base_fingerprint: SHA-256 of the pointer's bytes that this build goes out from, None when there is none.
        base_run_id: run that pointer names.
        base_seq: its sequence number.
        record_key: the build's run record.
        forced: whether everything is made anew, nothing taken over from the current snapshot.
        published: whether a snapshot of this build was published before.
        held: whether a rollback withdrew that snapshot and keeps it from coming back; never stored.
    """

    stage: ClassVar[str] = "scan"

    build_key: str
    gate_key: str
    listing: SourceListing
    num_dbs: int | None = None
    sizing: str = ""
    id_type: IdType
    key_type: KeyType | None = None
    key_encoding: KeyEncoding | None = None
    filter_columns: dict[str, str] = Field(default_factory=dict)
    base_fingerprint: str | None
    base_run_id: str | None
    base_seq: int | None
    record_key: str
    forced: bool = False
    published: bool = False
    held: bool = False

    @property
    def rows(self) -> int:
        """Rows of the source."""
        return self.listing.rows


class SampleReceipt(Receipt):
    """The validated source and its samples.

    Attributes:
        rows_in: rows read.
        rejected: rows turned away.
        reject_reasons: by reason.
        rejects: Parquet table of them.
        training: Arrow table (id, vector) to train on.
        queries: Arrow table (id, vector) of sample queries; even rows tune, odd rows judge.
        pool: rows that are neither, from which shards with few sample queries get more; None where there is no need.
        disjoint: whether no query is in the training sample (false for tables of a few rows).
        repeated: part of the rows whose vector another row has, too.
        parts: the rows that passed, a file for each input range; None in builds that were begun before there were any.
    """

    stage: ClassVar[str] = "sample"

    rows_in: int
    rejected: int
    reject_reasons: dict[str, int]
    rejects: Ref
    training: Ref
    queries: Ref
    pool: Ref | None = None
    disjoint: bool
    repeated: float = 0.0
    parts: tuple[Ref, ...] | None = None

    @property
    def rows_kept(self) -> int:
        """Rows that go into the snapshot."""
        return self.rows_in - self.rejected

    @property
    def train_rows(self) -> int:
        """Rows of the training sample."""
        return self.training.rows or 0

    @property
    def query_rows(self) -> int:
        """Rows of the query sample."""
        return self.queries.rows or 0


class TrainReceipt(Receipt):
    """The routing artifact.

    Attributes:
        artifact: ``centroids`` or ``hyperplanes``.
        ref: the matrix.
        shape: of the matrix.
        figures: how well it fitted the training sample when it was trained.
        recipe: digest of the configuration that it was trained for.
        kept: whether it was taken over from the current snapshot.
        drift: how badly the current snapshot's fits this run's sample, as a part of what is still good enough: above 1
            it is replaced. None where there was none to look at.
        retrained: why the current snapshot's was not kept; empty where it was, or where there is none.
    """

    stage: ClassVar[str] = "train"

    artifact: Literal["centroids", "hyperplanes"]
    ref: Ref
    shape: tuple[int, int]
    figures: dict[str, float | int]
    recipe: str = ""
    kept: bool = False
    drift: float | None = None
    retrained: str = ""


class RoutedShard(Model):
    """What was routed to one shard."""

    db_id: int
    rows: int
    digest: str


class RoutedPart(Model):
    """Rows of one shard in one record batch of a routed file."""

    db_id: int
    batch: int
    rows: int


class RangeReceipt(Receipt):
    """One input range, sorted by shard.

    Attributes:
        routed_key: Arrow file of stored rows; each record batch holds rows of one shard. It is sealed by the digests
            of the shards' rows, not by one of its bytes: nobody reads it whole.
        routed_size: its bytes.
        parts: what each batch holds.
        shards: rows and digest for each shard that got any.
    """

    stage: ClassVar[str] = "range"

    routed_key: str
    routed_size: int
    parts: tuple[RoutedPart, ...]
    shards: tuple[RoutedShard, ...]


class RouteReceipt(Receipt):
    """All input ranges.

    Attributes:
        ranges: keys of the range receipts, in source order.
        shards: one entry per shard, empty ones too.
        index_family: chosen for all shards.
        queries: the sample queries, and after them more rows of shards that have few; None in builds that were begun
            before there were any.
    """

    stage: ClassVar[str] = "route"

    ranges: tuple[str, ...]
    shards: tuple[RoutedShard, ...]
    index_family: str
    queries: Ref | None = None

    @property
    def rows(self) -> int:
        """Rows routed."""
        return sum(shard.rows for shard in self.shards)


class ShardReceipt(Receipt):
    """One shard's index, sealed.

    Attributes:
        db_id: shard.
        db_key: the shard's directory below the root; None for an empty shard.
        attempt: number of this attempt.
        rows: rows in the index.
        indexed_rows: rows that the trained index covers.
        objects: every object with size and SHA-256.
        etags: the store's version of each object when it was sealed.
        checkpoint_id: opaque id of these bytes.
        min_key: smallest key, where keys are integers or strings.
        max_key: largest key.
        rows_digest: digest of the rows, as routed.
        recipe: digest of everything else that decides what the shard holds.
        reused: directory of the current snapshot that the shard is a copy of; None where it was built.
        truth: exact nearest rows of each sample query within this shard.
        witnesses: a few rows that must be found again.
    """

    stage: ClassVar[str] = "shard"

    db_id: int
    db_key: str | None
    attempt: int
    rows: int
    indexed_rows: int
    objects: tuple[ShardObject, ...] = ()
    etags: tuple[str | None, ...] = ()
    checkpoint_id: str | None = None
    min_key: int | str | None = None
    max_key: int | str | None = None
    rows_digest: str
    recipe: str = ""
    reused: str | None = None
    truth: Ref | None = None
    witnesses: Ref | None = None

    @property
    def part(self) -> str:
        """Name of the shard's part of the stage."""
        return shard_part(self.db_id)

    @property
    def bytes(self) -> int:
        """Size of the shard."""
        return sum(item.size for item in self.objects)

    @property
    def db_bytes(self) -> int:
        """Size that the manifest gives: of the SQLite file where there is one, which readers go by."""
        return next((item.size for item in self.objects if item.path == SQLITE_FILE), self.bytes)


class ManifestReceipt(Receipt):
    """The staged manifest.

    Attributes:
        manifest_key: its bytes under ``staging/``.
        manifest_digest: SHA-256 of them.
        manifest_size: how many they are.
        manifest_created_at: the manifest's own date, part of its published name.
        gate_key: gate that it was assembled for.
        num_probes: default of readers.
        curve: recall by number of probes.
        latencies: median milliseconds of single searches through the index, by some numbers of probes.
        rows: rows of the snapshot.
        shards: receipts of all shards, by db_id.
        truth: merged exact neighbours of the sample queries.
    """

    stage: ClassVar[str] = "manifest"

    manifest_key: str
    manifest_digest: str
    manifest_size: int
    manifest_created_at: datetime
    gate_key: str
    num_probes: int
    curve: tuple[CurvePoint, ...]
    latencies: dict[int, float] = Field(default_factory=dict)
    rows: int
    shards: tuple[str, ...]
    truth: Ref

    @property
    def staged(self) -> Ref:
        """The staged bytes."""
        return Ref(key=self.manifest_key, size=self.manifest_size, sha256=self.manifest_digest)

    def refs(self) -> dict[str, Ref]:
        return {"manifest": self.staged, "truth": self.truth}


class PromoteReceipt(Receipt):
    """The moved pointer.

    Attributes:
        manifest_key: the published manifest.
        manifest_ref: its address.
        manifest_digest: SHA-256.
        previous_run_id: snapshot that was served before.
        seq: the pointer's sequence number.
        published: whether this call moved the pointer.
        held: whether it did not because a rollback holds this build; never stored.
    """

    stage: ClassVar[str] = "promote"

    manifest_key: str
    manifest_ref: str
    manifest_digest: str
    previous_run_id: str | None
    seq: int
    published: bool = True
    held: bool = False


def attempt_folder(run_id: str, db_id: int, attempt: int, token: str) -> str:
    """Where one attempt at a shard puts its objects; no other attempt writes there."""
    return f"shards/run_id={run_id}/{shard_part(db_id)}/attempt={attempt:02d}-{token[:8]}"


def shard_part(db_id: int) -> str:
    """Name of a shard among the parts of its stage, and of its folder."""
    return f"db={db_id:05d}"


def inputs_of(**parts: Any) -> str:
    """Digest of a stage's inputs."""
    return digest_json(parts)
