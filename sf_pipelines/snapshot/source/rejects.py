"""Why rows are rejected, collected per batch; and text that is not UTF-8, which nobody downstream can read."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

REJECT_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("source_file", pa.string()),
        pa.field("source_row", pa.int64()),
        pa.field("id", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


class RejectReason(StrEnum):
    """Why a row was turned away; of several, the first in this order."""

    INVALID_TEXT = "invalid_text"
    NULL_ID = "null_id"
    KEY_OUT_OF_RANGE = "key_out_of_range"
    NULL_VALUE = "null_value"
    NULL_VECTOR = "null_vector"
    WRONG_DIMENSION = "wrong_dimension"
    NOT_FINITE = "not_finite"
    OUT_OF_RANGE = "norm_out_of_range"
    ZERO_NORM = "zero_norm"
    NO_SHARD = "no_shard"
    DUPLICATE_ID = "duplicate_id"


class Faults:
    """Reason and detail of each faulty row of a batch. The first reason given to a row stays.

    Args:
        rows: rows of the batch.
    """

    def __init__(self, rows: int) -> None:
        self.reasons: NDArray[Any] = np.full(rows, "", dtype=object)
        self.details: NDArray[Any] = np.full(rows, "", dtype=object)

    @property
    def passed(self) -> NDArray[np.bool_]:
        """Which rows have no fault."""
        return np.asarray(self.reasons == "", dtype=bool)

    def add(self, rows: NDArray[np.int64], reason: RejectReason, detail: str) -> None:
        """One reason for several rows."""
        fresh = rows[self.reasons[rows] == ""]
        self.reasons[fresh], self.details[fresh] = reason.value, detail

    def add_each(self, faults: Iterable[tuple[int, str]], reason: RejectReason) -> None:
        """One reason with a detail for each row."""
        for row, detail in faults:
            if not self.reasons[row]:
                self.reasons[row], self.details[row] = reason.value, detail


def without_invalid_text(rows: pa.RecordBatch, faults: Faults) -> pa.RecordBatch:
    """The plain rows with null in place of text that cannot be decoded, which is added to ``faults``."""
    columns, changed = rows.columns, False
    for place, field in enumerate(rows.schema):
        if not _has_text(field.type) or _is_valid(columns[place]):
            continue
        # Taken, not sliced: validating a slice of lists looks at all its values.
        bad = np.array([not _is_valid(columns[place].take(pa.array([row]))) for row in range(len(rows))])
        faults.add(np.flatnonzero(bad), RejectReason.INVALID_TEXT, f"{field.name}: text that is no UTF-8")
        columns[place] = _blanked(columns[place], bad)
        changed = True
    return pa.record_batch(columns, schema=rows.schema) if changed else rows


def _blanked(column: pa.Array, bad: NDArray[np.bool_]) -> pa.Array:
    positions = np.where(bad, -1, np.arange(len(column)))
    return column.take(pc.call_function("if_else", [pa.array(bad), pa.scalar(None, pa.int64()), pa.array(positions)]))


def _is_valid(column: pa.Array) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _has_text(kind: pa.DataType) -> bool:
    """Whether a plain type has strings in it."""
    if isinstance(kind, pa.StructType | pa.MapType | pa.ListType | pa.FixedSizeListType):
        return any(_has_text(kind.field(n).type) for n in range(kind.num_fields))
    return pa.types.is_string(kind)
