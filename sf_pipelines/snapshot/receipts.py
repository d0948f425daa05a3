"""Receipts: what each stage did, kept in the store itself, so that anybody can resume from them.

A receipt names the digest of its ``inputs``; a stage that finds a receipt with the inputs it would work from has
nothing to do. Receipts are numbered per stage and part and written by conditional create: two attempts at one thing
have exactly one winner.
"""

import hashlib
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pyarrow as pa
import pyarrow.ipc as pa_ipc
from pydantic import Field, ValidationError

from sf_pipelines.snapshot.config import digest_json
from sf_pipelines.snapshot.errors import (
    DigestMismatchError,
    IntegrityError,
    ObjectMissingError,
    ReceiptMissingError,
)
from sf_pipelines.snapshot.manifest.models import ShardObject
from sf_pipelines.snapshot.model import Model
from sf_pipelines.snapshot.source.contract import IdType
from sf_pipelines.snapshot.source.files import SourceListing, Span
from sf_pipelines.snapshot.store import ObjectInfo, Store

STAGING = "staging"


class Ref(Model):
    """An object and what its bytes must be.

    Attributes:
        key: relative to the store's root.
        size: bytes.
        sha256: hex.
        rows: of a table, else None.
    """

    key: str
    size: int
    sha256: str
    rows: int | None = None


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

    stage: ClassVar[str]

    run_id: str
    inputs: str
    write_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0
    key: str = ""
    reason: str = ""

    def refs(self) -> tuple[Ref, ...]:
        """Objects that later stages read; without them the receipt is of no use."""
        return ()

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
        id_type: type of the ids.
        base_fingerprint: SHA-256 of the pointer's bytes that this build goes out from, None when there is none.
        base_run_id: run that pointer names.
        base_seq: its sequence number.
        record_key: the build's run record.
        published: whether the pointer already names a snapshot of this build.
    """

    stage: ClassVar[str] = "scan"

    build_key: str
    gate_key: str
    listing: SourceListing
    id_type: IdType
    base_fingerprint: str | None
    base_run_id: str | None
    base_seq: int | None
    record_key: str
    published: bool = False

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
        disjoint: whether no query is in the training sample (false for tables of a few rows).
    """

    stage: ClassVar[str] = "sample"

    rows_in: int
    rejected: int
    reject_reasons: dict[str, int]
    rejects: Ref
    training: Ref
    queries: Ref
    disjoint: bool

    def refs(self) -> tuple[Ref, ...]:
        """Reject table and samples."""
        return self.rejects, self.training, self.queries

    @property
    def rows_kept(self) -> int:
        """Rows that go into the snapshot."""
        return self.rows_in - self.rejected

    @property
    def rejects_key(self) -> str:
        """Where the reject table is."""
        return self.rejects.key

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
        ref: the centroids.
        shape: of the array.
        inertia: mean squared distance of a training vector to its centre.
        distinct: different centroids.
        rounds: k-means rounds.
        kept: whether it was taken over from the current snapshot.
    """

    stage: ClassVar[str] = "train"

    ref: Ref
    shape: tuple[int, int]
    inertia: float
    distinct: int
    rounds: int
    kept: bool = False

    def refs(self) -> tuple[Ref, ...]:
        """The centroids."""
        return (self.ref,)


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
        spans: the range.
        routed_key: Arrow file of stored rows; each record batch holds rows of one shard. It is sealed by the digests
            of the shards' rows, not by one of its bytes: nobody reads it whole.
        routed_size: its bytes.
        parts: what each batch holds.
        shards: rows and digest for each shard that got any.
    """

    stage: ClassVar[str] = "range"

    spans: tuple[Span, ...]
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
    """

    stage: ClassVar[str] = "route"

    ranges: tuple[str, ...]
    shards: tuple[RoutedShard, ...]
    index_family: str

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
        rows_digest: digest of the rows, as routed.
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
    rows_digest: str
    truth: Ref | None = None
    witnesses: Ref | None = None

    @property
    def bytes(self) -> int:
        """Size of the shard."""
        return sum(item.size for item in self.objects)


class CurvePoint(Model):
    """Recall of the tuning queries at one number of probes.

    Attributes:
        num_probes: shards asked.
        recall: mean recall@k.
        lower: its lower confidence bound.
        rows_searched: mean share of the snapshot's rows that lie in the asked shards.
    """

    num_probes: int
    recall: float
    lower: float
    rows_searched: float


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
    rows: int
    shards: tuple[str, ...]
    truth: Ref

    def refs(self) -> tuple[Ref, ...]:
        """Manifest and truth."""
        return Ref(key=self.manifest_key, size=self.manifest_size, sha256=self.manifest_digest), self.truth


class PromoteReceipt(Receipt):
    """The moved pointer.

    Attributes:
        manifest_key: the published manifest.
        manifest_ref: its address.
        manifest_digest: SHA-256.
        previous_run_id: snapshot that was served before.
        seq: the pointer's sequence number.
        published: whether this call moved the pointer.
    """

    stage: ClassVar[str] = "promote"

    manifest_key: str
    manifest_ref: str
    manifest_digest: str
    previous_run_id: str | None
    seq: int
    published: bool = True


ReceiptType = TypeVar("ReceiptType", bound=Receipt)


class Ledger:
    """The receipts of one build."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store = store
        self.run_id = run_id
        self.root = f"{STAGING}/run_id={run_id}"

    def find(self, kind: type[ReceiptType], part: str = "", *, inputs: str | None = None) -> ReceiptType | None:
        """The newest receipt of a stage (and part), only such with these inputs where they are given."""
        for number in reversed(self._numbers(kind, part)):
            receipt = self.read(kind, self._key(kind, part, number))
            if inputs is None or receipt.inputs == inputs:
                return receipt
        return None

    def find_whole(self, kind: type[ReceiptType], *, inputs: str, published: bool) -> ReceiptType | None:
        """The newest receipt with these inputs whose objects are still what it says.

        Args:
            kind: of the stage.
            inputs: digest of what the stage would work from.
            published: the run is published; then nobody works on with its intermediate objects.
        """
        receipt = self.find(kind, inputs=inputs)
        if receipt is None or published or all(self._is_whole(ref) for ref in receipt.refs()):
            return receipt
        return None

    def _is_whole(self, ref: Ref) -> bool:
        try:
            return self.store.head(ref.key).size == ref.size and self.store.sha256(ref.key) == ref.sha256
        except ObjectMissingError:
            return False

    def find_parts(self, kind: type[ReceiptType], *, inputs: str) -> dict[str, ReceiptType]:
        """The newest receipt with these inputs of every part of a stage."""
        newest: dict[str, ReceiptType] = {}
        for info in sorted(self.store.objects(self._folder(kind, "")), key=_number_in, reverse=True):
            part = info.key.split("/")[-2]
            if part not in newest:
                receipt = self.read(kind, info.key)
                if receipt.inputs == inputs:
                    newest[part] = receipt
        return newest

    def need(self, kind: type[ReceiptType], part: str = "") -> ReceiptType:
        """The newest receipt of a stage that must have run.

        Raises:
            ReceiptMissingError: it has not.
        """
        receipt = self.find(kind, part)
        if receipt is None:
            what = f"{kind.stage} {part}".strip()
            raise ReceiptMissingError(f"build {self.run_id} has no receipt of stage {what!r} yet; run that stage first")
        return receipt

    def read(self, kind: type[ReceiptType], key: str) -> ReceiptType:
        """One receipt.

        Raises:
            IntegrityError: it cannot be understood.
        """
        try:
            return kind.model_validate_json(self.store.get(key)).model_copy(update={"key": key})
        except ValidationError as error:
            raise IntegrityError(f"receipt {self.store.url_of(key)} cannot be understood: {error}") from error

    def next_number(self, kind: type[Receipt], part: str = "") -> int:
        """Number of the attempt that would come next."""
        numbers = self._numbers(kind, part)
        return numbers[-1] + 1 if numbers else 0

    def commit(self, receipt: ReceiptType, part: str = "", *, number: int) -> ReceiptType:
        """Writes a receipt; if somebody else's for the same inputs is there first, that one is the result.

        Args:
            receipt: of the work.
            part: of the stage.
            number: what ``next_number`` gave before the work began: of several who did the same work, one wins.
        """
        while True:
            key = self._key(type(receipt), part, number)
            data = receipt.model_dump_json(exclude={"key", "reason"}).encode()
            if self.store.create(key, data, content_type="application/json"):
                return receipt.model_copy(update={"key": key})
            winner = self.read(type(receipt), key)
            if winner.inputs == receipt.inputs:
                return winner
            number += 1

    def _numbers(self, kind: type[Receipt], part: str) -> list[int]:
        folder = self._folder(kind, part)
        return sorted(_number_in(info) for info in self.store.objects(folder))

    def _key(self, kind: type[Receipt], part: str, number: int) -> str:
        return f"{self._folder(kind, part)}/{number:04d}.json"

    def _folder(self, kind: type[Receipt], part: str) -> str:
        return f"{self.root}/receipts/{kind.stage}" + (f"/{part}" if part else "")

    # Tables that stages hand to each other.

    def put_table(self, name: str, table: pa.Table) -> Ref:
        """Stores a small table as an Arrow file with a fresh name."""
        sink = pa.BufferOutputStream()
        with pa_ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        data = sink.getvalue().to_pybytes()
        return self.put_bytes(f"{self.root}/{name}-{uuid.uuid4().hex[:8]}.arrow", data, rows=table.num_rows)

    def put_bytes(self, key: str, data: bytes, *, rows: int | None = None) -> Ref:
        """Stores bytes under a key that nobody else uses."""
        self.store.put(key, data)
        return Ref(key=key, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=rows)

    def put_file(self, path: Path, key: str, *, rows: int | None = None) -> Ref:
        """Uploads a file under a key that nobody else uses."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.store.upload(path, key)
        return Ref(key=key, size=path.stat().st_size, sha256=digest, rows=rows)

    def get_table(self, ref: Ref) -> pa.Table:
        """Reads a stored table.

        Raises:
            DigestMismatchError: the bytes are not the ones that were stored.
        """
        with pa_ipc.open_file(pa.BufferReader(get_verified(self.store, ref))) as reader:
            return reader.read_all()


def _number_in(info: ObjectInfo) -> int:
    return int(info.key.rsplit("/", 1)[-1].removesuffix(".json"))


def get_verified(store: Store, ref: Ref) -> bytes:
    """An object's bytes, checked against its reference.

    Raises:
        DigestMismatchError: they differ.
    """
    data = store.get(ref.key)
    found = hashlib.sha256(data).hexdigest()
    if found != ref.sha256:
        raise DigestMismatchError(f"{store.url_of(ref.key)} has SHA-256 {found}, but {ref.sha256} was recorded")
    return data


def inputs_of(**parts: Any) -> str:
    """Digest of a stage's inputs."""
    return digest_json(parts)
