"""Keys and values of a shard: the table ``kv`` of ``shard.db``, and how keys are turned into bytes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sf_pipelines.snapshot.arrow import is_bytes, is_text
from sf_pipelines.snapshot.config import KeyEncoding
from sf_pipelines.snapshot.errors import IndexBuildError, IntegrityError, QueryError
from sf_pipelines.snapshot.index.sqlite import CREATE_KV, FILE, SqliteFile, writing

Key = int | str | bytes

# Width and largest number of the encodings of integers. Keys are hashed as signed 64-bit numbers, so the upper half of
# u64be has no shard.
_INTEGERS: dict[str, tuple[int, int]] = {"u64be": (8, 2**63 - 1), "u32be": (4, 2**32 - 1)}
# Rows turned into Python objects at a time.
_BATCH = 10_000
# Fewer keys are looked up one by one.
_FEW = 8
_GET_MANY = "SELECT k, v FROM kv WHERE k IN (SELECT unhex(value) FROM json_each(?))"


# Keys.


def encode_key(key: Any, encoding: KeyEncoding) -> bytes:
    """The bytes under which a key is stored."""
    if encoding in _INTEGERS:
        width, largest = _INTEGERS[encoding]
        if isinstance(key, bool | np.bool_) or not isinstance(key, int | np.integer):
            raise QueryError(
                f"key {_shown(key)} is {type(key).__name__}; keys of this snapshot are whole numbers ({encoding})"
            )
        if not 0 <= key <= largest:
            raise QueryError(f"key {key} (int) is not within 0 and {largest} ({encoding})")
        return int(key).to_bytes(width, "big")
    if isinstance(key, str):
        try:
            return key.encode()
        except UnicodeEncodeError as error:
            raise QueryError(f"key {_shown(key)} (str) is no text: {error.reason}") from error
    if isinstance(key, bytes):
        return bytes(key)
    raise QueryError(f"key {_shown(key)} is {type(key).__name__}; keys of this snapshot are str or bytes ({encoding})")


def key_array(keys: Sequence[Any]) -> pa.Array:
    """Keys of one type as int64, string or binary."""
    kinds = {type(key) for key in keys}
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    if kinds and all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        kind: pa.DataType = pa.int64()
    elif kinds <= {str, np.str_}:
        kind = pa.string()
    elif kinds == {bytes}:
        kind = pa.binary()
    else:
        raise QueryError(f"the keys are {names}; keys are all whole numbers, all str or all bytes")
    try:
        return pa.array(keys, type=kind)
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        raise QueryError(f"the keys ({names}) cannot be used: {error}") from error


def encode_keys(keys: pa.Array | pa.ChunkedArray, encoding: KeyEncoding) -> pa.Array:
    """``encode_key`` of a whole column: integers, or strings or bytes, without nulls."""
    array = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    if array.null_count:
        raise QueryError(f"{array.null_count} of {len(array)} keys are null; every row needs a key")
    if encoding in _INTEGERS:
        return _encode_integers(array, encoding)
    if not (is_text(array.type) or is_bytes(array.type)):
        raise QueryError(f"the keys are {array.type}; keys of this snapshot are string or binary ({encoding})")
    return array.cast(pa.binary())


def _encode_integers(array: pa.Array, encoding: str) -> pa.Array:
    width, largest = _INTEGERS[encoding]
    if not pa.types.is_integer(array.type):
        raise QueryError(f"the keys are {array.type}; keys of this snapshot are whole numbers ({encoding})")
    numbers = array.to_numpy(zero_copy_only=False)
    outside = np.flatnonzero((numbers < 0) | (numbers > largest))
    if len(outside):
        raise QueryError(f"key {numbers[outside[0]]} ({array.type}) is not within 0 and {largest} ({encoding})")
    data = numbers.astype(f">u{width}").tobytes()
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(array), [None, pa.py_buffer(data)]).cast(
        pa.binary()
    )


def _shown(key: Any) -> str:
    text = repr(key)
    return text if len(text) <= 80 else f"{text[:80]}…"


# Writing.


def write_key_values(folder: Path, keys: pa.Array | pa.ChunkedArray, values: pa.Array | pa.ChunkedArray) -> None:
    """Writes the table ``kv`` into the folder's ``shard.db``, which is created where it is not there."""
    if len(keys) != len(values) or keys.null_count or values.null_count:
        raise IndexBuildError(
            f"{folder}: {len(keys)} keys ({keys.null_count} null) and {len(values)} values ({values.null_count} null); "
            "there must be one value for each key"
        )
    # A table without rowid is a tree ordered by key: keys in order are appended, others move half of the pages.
    order = pc.call_function("sort_indices", [keys], pc.SortOptions([("", "ascending")]))
    with writing(folder) as connection:
        connection.execute(CREATE_KV)
        for start in range(0, len(order), _BATCH):
            part = order.slice(start, _BATCH)
            pairs = zip(keys.take(part).to_pylist(), values.take(part).to_pylist(), strict=True)
            connection.executemany("INSERT INTO kv (k, v) VALUES (?, ?)", pairs)


# Reading.


class KeyValueShard:
    """The keys and values of a local shard, in the folder's ``shard.db``. Thread-safe.

    Raises:
        IntegrityError: it holds no readable table of keys and values.
    """

    def __init__(self, folder: Path) -> None:
        self._file = SqliteFile(folder / FILE)
        self._rows: int | None = None
        try:
            self._file.require("kv", "k BLOB PRIMARY KEY, v BLOB")
        except IntegrityError:
            self._file.close()
            raise

    @property
    def rows(self) -> int:
        """Number of keys; counted when it is first asked for."""
        if self._rows is None:
            # A row takes more than two bytes: a tree that gives more rows than that is a circle of pages.
            most = self._file.size // 2
            count: int = self._file.query("SELECT count(*) FROM (SELECT 1 FROM kv LIMIT ?)", (most,))[0][0]
            if count == most:
                raise IntegrityError(f"{self._file.path}: table 'kv' has more rows than the file has room for")
            self._rows = count
        return self._rows

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, in their order; None for a key that is not there."""
        if len(keys) <= _FEW:
            each = ((key,) for key in dict.fromkeys(keys))
            found = dict(self._file.query_within("SELECT k, v FROM kv WHERE k = ?", *each))
        else:
            names = json.dumps([key.hex() for key in keys])
            found = dict(self._file.query_within(_GET_MANY, (names,)))
        strange = {type(value) for value in found.values()} - {bytes}
        if strange:
            names = ", ".join(sorted(kind.__name__ for kind in strange))
            raise IntegrityError(f"{self._file.path}: table 'kv' holds values that are {names}, not bytes")
        return [found.get(key) for key in keys]

    def close(self) -> None:
        """Closes the file; later calls raise ``ReaderClosedError``."""
        self._file.close()
