"""Key and value of each row, in snapshots that serve both."""

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sf_pipelines.snapshot.arrow import hex_texts, plain_column, plain_type
from sf_pipelines.snapshot.config import KeyEncoding, KeyValueSpec
from sf_pipelines.snapshot.errors import SourceSchemaError
from sf_pipelines.snapshot.source.columns import as_int64, require_json
from sf_pipelines.snapshot.source.json_text import json_objects
from sf_pipelines.snapshot.source.rejects import Faults, RejectReason

KeyType = Literal["int64", "string", "bytes"]

KEY_COLUMN = "_kv_key"
VALUE_COLUMN = "_kv_value"

_STORED: dict[KeyType, pa.DataType] = {"int64": pa.int64(), "string": pa.string(), "bytes": pa.binary()}
_ENCODINGS: dict[KeyType, tuple[KeyEncoding, ...]] = {
    "int64": ("u64be", "u32be"),
    "string": ("utf8", "raw"),
    "bytes": ("raw",),
}
_LARGEST: dict[KeyEncoding, int] = {"u64be": 2**63 - 1, "u32be": 2**32 - 1}


class KeyValueColumns:
    """Reads keys and values and says which keys cannot be stored.

    Attributes:
        key_type: type of the keys.
        encoding: how they are stored.
        fields: stored columns.

    Raises:
        SourceSchemaError: a column's type cannot be used.
    """

    def __init__(self, spec: KeyValueSpec, schema: pa.Schema) -> None:
        self._spec = spec
        self.key_type: KeyType = _key_type(schema.field(spec.key_col))
        self.encoding: KeyEncoding = _encoding(spec, self.key_type)
        for name in spec.value_cols:
            require_json(schema.field(name), "key_value.value_cols")
        if spec.value_col is not None:
            _require_bytes(schema.field(spec.value_col))
        self.fields = [pa.field(KEY_COLUMN, _STORED[self.key_type]), pa.field(VALUE_COLUMN, pa.binary())]

    def keys(self, rows: pa.RecordBatch) -> pa.Array:
        """The keys, with their stored type."""
        column = plain_column(rows.column(self._spec.key_col), uuids=False)
        return as_int64(column) if self.key_type == "int64" else column

    def ids(self, rows: pa.RecordBatch) -> pa.Array:
        """The keys as ids of vectors: bytes as hex digits."""
        keys = self.keys(rows)
        return hex_texts(keys) if self.key_type == "bytes" else keys

    def values(self, rows: pa.RecordBatch) -> pa.Array:
        """The values as bytes."""
        if self._spec.value_col is None:
            return json_objects(rows, self._spec.value_cols).cast(pa.binary())
        return plain_column(rows.column(self._spec.value_col), uuids=False).cast(pa.binary())

    def check(self, rows: pa.RecordBatch, faults: Faults) -> None:
        """Tells ``faults`` which keys and values cannot be stored."""
        if self.encoding in _LARGEST:
            keys, largest = self.keys(rows), _LARGEST[self.encoding]
            numbers = pc.fill_null(keys, 0).to_numpy(zero_copy_only=False)
            outside = np.flatnonzero((numbers < 0) | (numbers > largest))
            texts = [f"key {number} is not within 0 and {largest} ({self.encoding})" for number in numbers[outside]]
            faults.add_each(zip(outside.tolist(), texts, strict=True), RejectReason.KEY_OUT_OF_RANGE)
        if self._spec.value_col is not None:
            missing = np.asarray(rows.column(self._spec.value_col).is_null())
            faults.add(np.flatnonzero(missing), RejectReason.NULL_VALUE, f"{self._spec.value_col}: no value")


def _key_type(field: pa.Field) -> KeyType:
    kind = plain_type(field.type, uuids=False)
    if pa.types.is_string(kind):
        return "string"
    if pa.types.is_binary(kind):
        return "bytes"
    if pa.types.is_integer(kind):
        return "int64"
    raise SourceSchemaError(
        f"key_value.key_col {field.name!r} is {field.type}; keys are integers, strings or bytes: cast it"
    )


def _encoding(spec: KeyValueSpec, key_type: KeyType) -> KeyEncoding:
    fitting = _ENCODINGS[key_type]
    if spec.key_encoding == "auto":
        return fitting[0]
    if spec.key_encoding not in fitting:
        raise SourceSchemaError(
            f"key_value.key_encoding {spec.key_encoding!r} does not fit the keys in {spec.key_col!r}, which are "
            f"{key_type}; use {' or '.join(fitting)}"
        )
    return spec.key_encoding


def _require_bytes(field: pa.Field) -> None:
    kind = plain_type(field.type, uuids=False)
    if not (pa.types.is_string(kind) or pa.types.is_binary(kind)):
        raise SourceSchemaError(
            f"key_value.value_col names {field.name!r}, which is {field.type}; a value is bytes or a string, or use "
            "value_cols"
        )
