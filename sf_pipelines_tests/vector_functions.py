"""Functions that configurations in tests name as ``vector_fn``."""

import numpy as np
import pyarrow as pa


def doubled(rows: pa.RecordBatch) -> pa.Array:
    """Twice the number in ``x``, and ``y``, as lists of two."""
    x, y = (rows.column(name).to_numpy(zero_copy_only=False) for name in ("x", "y"))
    matrix = np.stack([2 * x, y], axis=1).astype(np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), 2)


def as_matrix(rows: pa.RecordBatch) -> np.ndarray:
    """The same as a matrix."""
    return np.stack([2 * rows.column("x").to_numpy(), rows.column("y").to_numpy()], axis=1)


def fails(rows: pa.RecordBatch) -> pa.Array:
    """Cannot do it."""
    raise ValueError(f"no model for {rows.num_rows} rows")


def too_few(rows: pa.RecordBatch) -> pa.Array:
    """Leaves one out."""
    return doubled(rows.slice(1))


def no_lists(rows: pa.RecordBatch) -> pa.Array:
    """Gives numbers."""
    return rows.column("x")


NOT_CALLABLE = 3
