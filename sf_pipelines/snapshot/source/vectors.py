"""The vector of each row, as it is stored: from its column, or from a function over other columns."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sf_pipelines.snapshot.arrow import is_list, plain_column
from sf_pipelines.snapshot.config import VectorSpec
from sf_pipelines.snapshot.errors import ConfigError, VectorFunctionError
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, as_float16
from sf_pipelines.snapshot.source.columns import check_vector_type
from sf_pipelines.snapshot.source.rejects import Faults, RejectReason

# Squared norms must stay normal float32 numbers: index libraries add up squares in float32.
_LARGEST_SQUARE = 1e37
_SMALLEST_SQUARE = 1e-36


class VectorColumn:
    """Reads vectors and says which cannot be stored.

    Args:
        spec: of the vector.
        schema: of the source's columns.

    Raises:
        SourceSchemaError: the column's type cannot be used.
        ConfigError: the function cannot be imported.
    """

    def __init__(self, spec: VectorSpec, schema: pa.Schema) -> None:
        self._spec = spec
        self._half = spec.quantization == "fp16"
        self._function: Callable[[pa.RecordBatch], Any] | None = None
        if spec.vector_fn is None:
            check_vector_type(schema.field(spec.vector_col), spec.dim)
        else:
            self._function = _imported(spec.vector_fn)

    def read(self, rows: pa.RecordBatch, faults: Faults) -> tuple[Float32, NDArray[np.bool_]]:
        """Those vectors that are there and have the right length, and which rows these are."""
        column = self._column(rows)
        present = np.asarray(column.is_valid())
        if pa.types.is_fixed_size_list(column.type):
            lengths = np.full(len(column), self._spec.dim)
        else:
            counted = pc.fill_null(pc.call_function("list_value_length", [column]), 0)
            lengths = cast("NDArray[np.int64]", counted.to_numpy())
        sized = lengths == self._spec.dim
        faults.add(np.flatnonzero(~present), RejectReason.NULL_VECTOR, "no vector")
        wrong = np.flatnonzero(present & ~sized)
        texts = [f"{lengths[row]} numbers, expected {self._spec.dim}" for row in wrong]
        faults.add_each(zip(wrong.tolist(), texts, strict=True), RejectReason.WRONG_DIMENSION)
        usable = present & sized
        if not usable.all():
            column = column.filter(pa.array(usable))
        # A null among the numbers becomes NaN and is rejected as such.
        values = column.flatten().to_numpy(zero_copy_only=False)
        with np.errstate(over="ignore"):
            vectors = values.astype(np.float32, copy=False).reshape(len(column), self._spec.dim)
        return (self._rounded(vectors, usable, faults) if self._half else vectors), usable

    def _rounded(self, vectors: Float32, present: NDArray[np.bool_], faults: Faults) -> Float32:
        """As float16 holds them; tells ``faults`` of those that would lose their direction."""
        rounded, kept = as_float16(vectors, self._spec.metric)
        # What is too large, or becomes zero, is told by ``check``.
        turned = ~kept & np.isfinite(rounded).all(axis=1) & rounded.any(axis=1)
        detail = "numbers too small for float16, which would turn the vector; scale the vectors up"
        faults.add(np.flatnonzero(present)[turned], RejectReason.OUT_OF_RANGE, detail)
        return rounded

    def check(self, vectors: Float32, present: NDArray[np.bool_], faults: Faults) -> None:
        """Tells ``faults`` which of the present vectors cannot be stored or searched."""
        where = np.flatnonzero(present)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
        finite = np.isfinite(squares)
        kind = "float16" if self._half else "float32"
        faults.add(where[~finite], RejectReason.NOT_FINITE, f"NaN or infinity (as {kind})")
        large = finite & (squares > _LARGEST_SQUARE)
        faults.add(where[large], RejectReason.OUT_OF_RANGE, "squared norm above 1e37 overflows float32")
        if self._spec.metric.normalises:
            small = finite & (squares < _SMALLEST_SQUARE)
            detail = "a vector without length has no direction under cosine"
            faults.add(where[small], RejectReason.ZERO_NORM, detail)
        elif self._spec.metric is DistanceMetric.DOT_PRODUCT:
            # LanceDB finds no partition for the rows of a shard whose vectors are all like that; zeros it accepts.
            small = (squares > 0) & (squares < _SMALLEST_SQUARE)
            detail = "squared norm below 1e-36 underflows float32 under dot_product; scale the vectors up or use zeros"
            faults.add(where[small], RejectReason.OUT_OF_RANGE, detail)

    def _column(self, rows: pa.RecordBatch) -> pa.Array:
        if self._function is None:
            return rows.column(self._spec.vector_col)
        chosen = rows.select(list(self._spec.vector_fn_cols))
        return call_vector_fn(self._function, chosen, self._spec.dim, f"vector_fn {self._spec.vector_fn}")


def call_vector_fn(function: Callable[[pa.RecordBatch], Any], rows: pa.RecordBatch, dim: int, name: str) -> pa.Array:
    """One list of floating-point numbers for each row, from a user's function."""
    try:
        made = function(rows)
    except Exception as error:
        raise VectorFunctionError(f"{name} failed with {type(error).__name__}: {error}") from error
    column = plain_column(_as_array(made, name))
    if len(column) != len(rows):
        raise VectorFunctionError(f"{name} gave {len(column)} vectors for {len(rows)} rows")
    kind: Any = column.type
    if not is_list(kind):
        raise VectorFunctionError(f"{name} gave {kind}; it must give lists of {dim} numbers")
    if not pa.types.is_floating(kind.value_type):
        raise VectorFunctionError(f"{name} gave lists of {kind.value_type}; they must be floating-point numbers")
    if pa.types.is_fixed_size_list(kind) and kind.list_size != dim:
        raise VectorFunctionError(f"{name} gave {kind.list_size} numbers a vector, vector_spec.dim is {dim}")
    return column


def _as_array(made: Any, name: str) -> pa.Array:
    """An Arrow array as it is, a matrix as lists of its rows."""
    if isinstance(made, pa.ChunkedArray):
        return made.combine_chunks()
    if isinstance(made, pa.Array):
        return made
    if isinstance(made, np.ndarray) and made.ndim == 2 and made.dtype.kind == "f":
        return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(made).ravel()), made.shape[1])
    raise VectorFunctionError(
        f"{name} gave {type(made).__name__}; it must give an Arrow array of lists or a matrix of floating-point numbers"
    )


def _imported(path: str) -> Callable[[pa.RecordBatch], Any]:
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:
        raise ConfigError(f"VectorSpec.vector_fn: {path!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"VectorSpec.vector_fn: {path!r} is {type(found).__name__}, no function")
    return found
