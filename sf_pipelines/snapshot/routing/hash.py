"""HASH: the key's hash modulo the number of shards.

What is hashed follows from the key's type alone, not from how it is stored: a number as 8 bytes, little-endian two's
complement; text as UTF-8; bytes as they are.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import is_bytes, is_text, plain_column
from sf_pipelines.snapshot.errors import QueryError, SourceSchemaError
from sf_pipelines.snapshot.routing.protocol import Placement, RowRouting

UInt64 = NDArray[np.uint64]

_INT64 = np.iinfo(np.int64)


class HashRouting(RowRouting):
    """The shard is ``xxh3_64(key) mod num_dbs``."""

    strategy = "hash"
    columns = ("key",)

    def __init__(self, num_dbs: int) -> None:
        self.num_dbs = num_dbs

    def check_schema(self, schema: pa.Schema) -> None:
        kind = self._column_type(schema, "key")
        if not (pa.types.is_integer(kind) or is_text(kind) or is_bytes(kind)):
            raise SourceSchemaError(f"key has type {kind}; a key is a 64-bit integer, a string or bytes")

    def place(self, rows: pa.RecordBatch) -> Placement:
        self.check_schema(rows.schema)
        keys = plain_column(rows.column("key"), uuids=False)
        good = keys.is_valid().to_numpy(zero_copy_only=False)
        if pa.types.is_uint64(keys.type):
            good &= pc.fill_null(keys, 0).to_numpy(zero_copy_only=False) <= _INT64.max
        shards = np.full(len(keys), -1, dtype=np.int32)
        if good.all():
            shards[:] = hash_keys(keys) % np.uint64(self.num_dbs)
            return Placement(shards)
        shards[good] = hash_keys(keys.filter(pa.array(good))) % np.uint64(self.num_dbs)
        faults = {
            row: "key is null" if key is None else f"key {key} is beyond a signed 64-bit number"
            for row, key in ((row, keys[row].as_py()) for row in np.flatnonzero(~good).tolist())
        }
        return Placement(shards, faults)

    def locate(self, context: Mapping[str, Any]) -> int:
        if set(context) != {"key"}:
            names = ", ".join(map(repr, context)) or "nothing"
            raise QueryError(
                f"rows are sharded by the hash of their key: routing_context must be {{'key': …}}, not {names}"
            )
        return hash_key(context["key"]) % self.num_dbs

    def describe(self) -> dict[str, Any]:
        return {"sharding_strategy": self.strategy}


def hash_key(key: object) -> int:
    """Unsigned 64-bit hash of one key (xxh3, seed 0).

    Raises:
        QueryError: it is no int of 64 signed bits, str or bytes.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        number = int(key)
        if not _INT64.min <= number <= _INT64.max:
            raise QueryError(f"key {number} is beyond a signed 64-bit number")
        return xxhash.xxh3_64_intdigest(number.to_bytes(8, "little", signed=True))
    if isinstance(key, str):
        try:
            return xxhash.xxh3_64_intdigest(key.encode())
        except UnicodeEncodeError as error:
            raise QueryError(f"key {key!r} cannot be written as UTF-8: {error.reason}") from error
    if isinstance(key, bytes | bytearray | memoryview):
        return xxhash.xxh3_64_intdigest(key)
    raise QueryError(f"a key is an int, str or bytes, not {type(key).__name__} ({key!r})")


def hash_keys(keys: pa.Array) -> UInt64:
    """Unsigned 64-bit hash of each key (xxh3, seed 0): integers, strings or bytes without nulls.

    Raises:
        SourceSchemaError: keys of another type, nulls among them, or integers beyond 64 signed bits.
    """
    if keys.null_count:
        raise SourceSchemaError(f"{keys.null_count} of {len(keys)} keys are null")
    if pa.types.is_integer(keys.type):
        try:
            numbers = keys.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid as error:
            raise SourceSchemaError(f"a key is beyond a signed 64-bit number: {error}") from error
        # Void items become bytes, with all their zeros.
        hashed: list[Any] = np.ascontiguousarray(numbers, dtype="<i8").view("V8").tolist()
    elif is_text(keys.type) or is_bytes(keys.type):
        hashed = keys.cast(pa.large_binary()).to_pylist()
    else:
        raise SourceSchemaError(f"keys have type {keys.type}; a key is a 64-bit integer, a string or bytes")
    return np.fromiter(map(xxhash.xxh3_64_intdigest, hashed), dtype=np.uint64, count=len(keys))
