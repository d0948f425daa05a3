"""Text that is no UTF-8: files may hold it, and nobody downstream can read it."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sf_pipelines.snapshot.source.rejects import Faults, RejectReason


def without_invalid_text(rows: pa.RecordBatch, faults: Faults) -> pa.RecordBatch:
    """The rows with null in place of values whose text cannot be decoded.

    Args:
        rows: a batch of plain columns.
        faults: is told of the rows that have such values.
    """
    columns, changed = rows.columns, False
    for place, field in enumerate(rows.schema):
        if not _has_text(field.type) or _is_valid(columns[place]):
            continue
        # Taken, not sliced: of a slice of lists all values would be looked at.
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
