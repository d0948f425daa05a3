"""Hashes of rows, one column at a time: the same on every machine, whatever the order of files and batches.

A hash is 64 bits, made by the SplitMix64 finaliser (Steele, Lea and Flood, Fast splittable pseudorandom number
generators, 2014). It decides samples and tells changed rows from unchanged ones; objects are sealed by SHA-256.
"""

import hashlib
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sf_pipelines.snapshot.metric import Float32

UInt64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

# Bytes of the longest string that is hashed together with the others of its batch.
_LONGEST_TOGETHER = 256


def mix(values: UInt64) -> UInt64:
    """SplitMix64's finaliser: a bijection, so different integers keep different hashes."""
    x = values + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def hash_column(column: pa.Array) -> UInt64:
    """Hash of each value of an integer, string or binary column; a null has a hash of its own."""
    if pa.types.is_integer(column.type):
        plain = cast("NDArray[np.int64]", pc.fill_null(column, 0).to_numpy(zero_copy_only=False))
        hashes = mix(plain.astype(np.int64).view(np.uint64))
    else:
        wide = pa.large_binary() if pa.types.is_binary(column.type) else pa.large_string()
        hashes = _hash_strings(pc.fill_null(column.cast(wide), b"" if wide == pa.large_binary() else ""))
    if column.null_count:
        hashes[np.asarray(column.is_null())] = _GOLDEN
    return hashes


def _hash_strings(column: pa.LargeStringArray | pa.LargeBinaryArray) -> UInt64:
    _, offset_buffer, data_buffer = column.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)[column.offset : column.offset + len(column) + 1]
    data = np.frombuffer(data_buffer, dtype=np.uint8) if data_buffer else np.zeros(0, dtype=np.uint8)
    lengths = np.diff(offsets)
    hashes = mix(lengths.astype(np.uint64))
    long = np.flatnonzero(lengths > _LONGEST_TOGETHER)
    if len(long):
        hashes[long] = mix(hashes[long] ^ _hash_long(data, offsets[long], lengths[long]))
    lanes = np.arange(8)
    active = np.flatnonzero((lengths > 0) & (lengths <= _LONGEST_TOGETHER))
    start = 0
    # One round for each eight bytes of the longest of these strings, over all rows that are that long at once.
    while len(active):
        places = start + lanes[None, :]
        inside = places < lengths[active][:, None]
        words = np.where(inside, data[np.where(inside, offsets[active][:, None] + places, 0)], 0).astype(np.uint8)
        hashes[active] = mix(hashes[active] ^ np.ascontiguousarray(words).view("<u8")[:, 0])
        start += 8
        active = active[lengths[active] > start]
    return hashes


def _hash_long(data: NDArray[np.uint8], offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> UInt64:
    # Row by row: each outweighs the call, and rounds over all of them would be as many as the longest needs.
    ends = offsets + lengths
    digests = [
        hashlib.blake2b(data[start:end].data, digest_size=8).digest()
        for start, end in zip(offsets.tolist(), ends.tolist(), strict=True)
    ]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def hash_vectors(vectors: Float32) -> UInt64:
    """Hash of each vector's bits: multilinear hashing with odd weights from a fixed seed."""
    words = np.ascontiguousarray(vectors, dtype="<f4").view("<u4")
    weights = mix(np.arange(words.shape[1], dtype=np.uint64)) | np.uint64(1)
    out = np.empty(len(words), dtype=np.uint64)
    step = max(1, 1_000_000 // max(1, words.shape[1]))
    for start in range(0, len(words), step):
        part = words[start : start + step].astype(np.uint64)
        # The low half of a product hardly depends on a word's high bits: mix before adding up.
        part = (part + np.uint64(1)) * weights
        out[start : start + step] = (part ^ (part >> np.uint64(32))).sum(axis=1, dtype=np.uint64)
    return mix(out)


class RowSetDigest:
    """Digest of a set of rows, independent of their order: sums, modulo 2**64, of two hashes of each row.

    A lost, doubled or changed row changes it.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._sums = [0, 0]

    def add(self, ids: UInt64, vectors: UInt64, extras: list[UInt64]) -> None:
        """Adds rows by the hashes of their id, their vector and their other columns."""
        row = mix(ids ^ mix(vectors))
        for extra in extras:
            row = mix(row ^ mix(extra + _MIX_1))
        self.rows += len(row)
        for place, salted in enumerate((mix(row), mix(row ^ _MIX_2))):
            self._sums[place] = (self._sums[place] + int(salted.sum(dtype=np.uint64))) % 2**64

    def merge(self, hexdigest: str, rows: int) -> None:
        """Adds another set's digest."""
        self.rows += rows
        for place in range(2):
            part = int(hexdigest[16 * place : 16 * place + 16], 16)
            self._sums[place] = (self._sums[place] + part) % 2**64

    def hexdigest(self) -> str:
        """32 hex digits."""
        return "".join(f"{part:016x}" for part in self._sums)
