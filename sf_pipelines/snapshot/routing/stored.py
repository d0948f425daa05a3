"""Routing as a manifest describes it. All of it may come from a stranger: every fault is named by its field."""

import io
from tokenize import TokenError
from typing import Any

import numpy as np

from sf_pipelines.snapshot.errors import ConfigError, ManifestError
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.routing.cel import CelRouting, decode_routing_values
from sf_pipelines.snapshot.sharding import CelSharding

# The header is a Python literal: text that is none fails in its tokenizer, its parser or its evaluation.
_HEADER_ERRORS = (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError, TokenError)
MOST_HEADER = 64 * 1024
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def decode_cel(owner: str, fields: Any, num_dbs: int) -> CelRouting:
    """Routing by an expression, of the fields of ``owner``; a ``ManifestError`` names the field that is wrong."""
    for name in ("cel_expr", "cel_columns"):
        if not getattr(fields, name):
            raise ManifestError(f"{owner}.{name} is missing")
    try:
        values = decode_routing_values(fields.routing_values)
    except ManifestError as error:
        raise ManifestError(f"{owner}.{error}") from error
    if values is not None and len(values) != num_dbs:
        raise ManifestError(f"{owner}.routing_values has {len(values)} values for {num_dbs} shards")
    try:
        # The same bounds as for an expression that a user configures.
        checked = CelSharding(cel_expr=fields.cel_expr, cel_columns=fields.cel_columns, routing_values=values)
    except ConfigError as error:
        raise ManifestError(str(error).replace(CelSharding.__name__, owner)) from error
    try:
        return CelRouting(checked.cel_expr, checked.cel_columns, num_dbs, checked.routing_values)
    except ConfigError as error:
        raise ManifestError(f"{owner}.cel_expr cannot be used: {error}") from error


def decode_matrix(data: bytes, *, field: str, rows: int | None, dim: int, max_rows: int) -> Float32:
    """Rows of an ``.npy`` file. Its header is believed only after it was compared with what must be there.

    Args:
        data: the file's bytes.
        field: what it is, for errors.
        rows: rows that it must have; None takes what the header says.
        dim: numbers in a row.
        max_rows: most rows that are read.

    Returns:
        float32, shape (rows, dim).

    Raises:
        ManifestError: it is no such file, of another shape or type, or holds NaN or infinity.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        found, column_major, dtype = _HEADER_READERS[version](file)
    except _HEADER_ERRORS as error:
        raise ManifestError(f"{field} is no .npy file that can be used: {error}") from error
    expected = found[0] if rows is None and found else rows
    if found != (expected, dim):
        raise ManifestError(f"{field} has shape {found}, must be ({'rows' if rows is None else rows}, {dim})")
    if not 0 < found[0] <= max_rows:
        raise ManifestError(f"{field} has {found[0]} rows, must have 1 to {max_rows}")
    if dtype.name not in {"float16", "float32", "float64"}:
        raise ManifestError(f"{field} holds {dtype}, must hold floating-point numbers")
    if len(data) - file.tell() != found[0] * dim * dtype.itemsize:
        raise ManifestError(f"{field} is {len(data)} bytes long, which is not what its header says")
    flat = np.frombuffer(data, dtype=dtype, offset=file.tell())
    with np.errstate(over="ignore"):
        matrix = flat.reshape(found, order="F" if column_major else "C").astype(np.float32)
    if not np.isfinite(matrix).all():
        raise ManifestError(f"{field} holds NaN or infinity")
    return matrix
