"""Where the receipts of a build are kept, and the tables that its stages hand to each other."""

import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.ipc as pa_ipc
from pydantic import ValidationError

from sf_pipelines.snapshot.errors import DigestMismatchError, IntegrityError, ReceiptMissingError
from sf_pipelines.snapshot.run.receipts import Receipt, RouteReceipt, ShardReceipt, shard_part
from sf_pipelines.snapshot.store import ObjectInfo, Ref, Store

STAGING = "staging"

ReceiptType = TypeVar("ReceiptType", bound=Receipt)


class Ledger:
    """The receipts of one build."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store = store
        self.run_id = run_id
        self.root = f"{STAGING}/run_id={run_id}"

    def find(self, kind: type[ReceiptType], part: str = "", *, inputs: str | None = None) -> ReceiptType | None:
        """The newest receipt of a stage (and part), only such with these inputs where they are given."""
        return self.seek(kind, part, inputs=inputs)[0]

    def all_of(self, kind: type[ReceiptType], part: str = "") -> Iterator[ReceiptType]:
        """Receipts of a stage (and part), the newest first."""
        for number in reversed(self._numbers(kind, part)):
            yield self.read(kind, self._key(kind, part, number))

    def seek(self, kind: type[ReceiptType], part: str = "", *, inputs: str | None) -> tuple[ReceiptType | None, int]:
        """The same, and the number of the attempt that would come next."""
        numbers = self._numbers(kind, part)
        receipts = (self.read(kind, self._key(kind, part, number)) for number in reversed(numbers))
        found = next((one for one in receipts if inputs is None or one.inputs == inputs), None)
        return found, numbers[-1] + 1 if numbers else 0

    def seek_whole(self, kind: type[ReceiptType], *, inputs: str, published: bool) -> tuple[ReceiptType | None, int]:
        """The same; a receipt whose objects are not what it says counts only if its run is published.

        Then nobody works on with its intermediate objects.
        """
        receipt, number = self.seek(kind, inputs=inputs)
        usable = receipt is not None and (published or self.is_whole(receipt))
        return receipt if usable else None, number

    def is_whole(self, receipt: Receipt) -> bool:
        """Whether the objects that later stages read are still what a receipt says."""
        return all(self.store.is_whole(ref) for ref in receipt.refs().values())

    def are_there(self, sizes: Mapping[str, int]) -> bool:
        """Whether objects have these sizes, by one listing a folder; their bytes are checked by whoever reads them."""
        folders = {key.rsplit("/", 1)[0] for key in sizes}
        found = {info.key: info.size for folder in folders for info in self.store.objects(folder)}
        return all(found.get(key) == size for key, size in sizes.items())

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
        """The newest receipt of a stage that must have run."""
        receipt = self.find(kind, part)
        if receipt is None:
            what = f"{kind.stage} {part}".strip()
            raise ReceiptMissingError(f"build {self.run_id} has no receipt of stage {what!r} yet; run that stage first")
        return receipt

    def read(self, kind: type[ReceiptType], key: str) -> ReceiptType:
        """One receipt."""
        try:
            return kind.model_validate_json(self.store.get(key)).model_copy(update={"key": key})
        except ValidationError as error:
            raise IntegrityError(f"receipt {self.store.url_of(key)} cannot be understood: {error}") from error

    def commit(self, receipt: ReceiptType, part: str = "", *, number: int) -> ReceiptType:
        """Writes a receipt; if somebody else's for the same inputs is there first, that one is the result."""
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
        data, key = sink.getvalue().to_pybytes(), f"{self.root}/{name}-{uuid.uuid4().hex[:8]}.arrow"
        self.store.put(key, data)
        return Ref.of(key, data, rows=table.num_rows)

    def put_file(self, path: Path, key: str, *, rows: int | None = None) -> Ref:
        """Uploads a file under a key that nobody else uses."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.store.upload(path, key)
        return Ref(key=key, size=path.stat().st_size, sha256=digest, rows=rows)

    def get_table(self, ref: Ref) -> pa.Table:
        """Reads a stored table."""
        with pa_ipc.open_file(pa.BufferReader(self.store.get_sealed(ref))) as reader:
            return reader.read_all()


def _number_in(info: ObjectInfo) -> int:
    return int(info.key.rsplit("/", 1)[-1].removesuffix(".json"))


def copy_verified(store: Store, key: str, target: str, sha256: str) -> None:
    """Copies an object inside the store and checks every byte of the copy."""
    store.copy(key, target)
    found = store.sha256(target)
    if found != sha256:
        raise DigestMismatchError(
            f"{store.url_of(target)}, a copy of {key}, has SHA-256 {found}, but {sha256} was sealed"
        )


def copy_shard(store: Store, shard: ShardReceipt, db_key: str) -> tuple[str | None, ...]:
    """Copies a sealed shard's objects inside the store and checks every byte; the etags of the copies."""
    for item in shard.objects:
        copy_verified(store, f"{shard.db_key}/{item.path}", f"{db_key}/{item.path}", item.sha256)
    return tuple(store.head(f"{db_key}/{item.path}").etag for item in shard.objects)


def is_intact(store: Store, receipt: ShardReceipt) -> bool:
    """Whether every sealed object is still the version that was sealed."""
    return not changed_objects(store, [receipt])


def changed_objects(store: Store, receipts: Sequence[ShardReceipt]) -> list[str]:
    """What is wrong with the objects of sealed shards, one line each; nothing when all are as they were sealed."""
    sealed = {receipt.db_key: receipt for receipt in receipts if receipt.db_key is not None}
    # One listing of a run in place of one for each shard.
    folders = sealed if len(sealed) == 1 else {key.rsplit("/", 2)[0] for key in sealed}
    listed: dict[str, dict[str, ObjectInfo]] = {key: {} for key in sealed}
    for folder in sorted(folders):
        for info in store.objects(folder):
            # shards/run_id=…/db=…/attempt=…
            shard = "/".join(info.key.split("/", 4)[:4])
            if shard in listed:
                listed[shard][info.key] = info
    faults: list[str] = []
    for db_key, receipt in sealed.items():
        found = listed[db_key]
        for item, etag in zip(receipt.objects, receipt.etags, strict=True):
            key = f"{db_key}/{item.path}"
            info = found.pop(key, None)
            if info is None:
                faults.append(f"{store.url_of(key)} is missing")
            elif (info.size, info.etag) != (item.size, etag):
                faults.append(f"{store.url_of(key)} was changed after it was sealed")
        faults.extend(f"{store.url_of(key)} does not belong to the shard" for key in found)
    return faults


def shard_receipts(ledger: Ledger, routed: RouteReceipt) -> list[ShardReceipt]:
    """The newest receipt of every shard, all made from the rows of this routing."""
    found = ledger.find_parts(ShardReceipt, inputs=routed.inputs)
    parts = [shard_part(shard.db_id) for shard in routed.shards]
    missing = [part for part in parts if part not in found]
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise ReceiptMissingError(f"build {ledger.run_id}: {len(missing)} shards have not been built: {shown}")
    return [found[part] for part in parts]
