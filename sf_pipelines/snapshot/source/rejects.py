"""Why rows are turned away, collected per batch."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
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
