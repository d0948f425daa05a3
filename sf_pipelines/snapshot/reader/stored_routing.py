"""The routing that a manifest describes. All of it may come from a stranger: every fault is named by its field."""

import hashlib
import io
from tokenize import TokenError
from typing import Any

import numpy as np

from sf_pipelines.snapshot.errors import ConfigError, DigestMismatchError, ManifestError
from sf_pipelines.snapshot.manifest.models import Manifest, VectorMeta
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.cluster import ClusterRouting
from sf_pipelines.snapshot.routing.context import decode_routing_values
from sf_pipelines.snapshot.routing.explicit import ExplicitRouting
from sf_pipelines.snapshot.routing.hash import HashRouting
from sf_pipelines.snapshot.routing.lsh import MOST_BITS, LshRouting
from sf_pipelines.snapshot.routing.protocol import Routing
from sf_pipelines.snapshot.sharding import CelSharding
from sf_pipelines.snapshot.store import Store

# The header is a Python literal: text that is none fails in its tokenizer, its parser or its evaluation.
_HEADER_ERRORS = (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError, TokenError)
_MOST_HEADER = 64 * 1024
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def load_routing(store: Store, manifest: Manifest, vector: VectorMeta) -> Routing:
    """How the rows of a snapshot found their shard.

    Args:
        store: opened on the root.
        manifest: of the snapshot.
        vector: its vector fields.

    Raises:
        ManifestError: a field is missing, wrong, or contradicts another; names it.
        ObjectMissingError: stored centroids or hyperplanes are gone.
        DigestMismatchError: they are not the bytes that were sealed.
    """
    if vector.unified:
        sharding = manifest.sharding
        if sharding.strategy == "hash":
            return HashRouting(manifest.num_dbs)
        fields = (sharding.cel_expr, sharding.cel_columns, sharding.routing_values)
        return _cel("build_meta.sharding", fields, manifest.num_dbs)
    if vector.sharding_strategy == "cluster":
        return _cluster(store, manifest, vector)
    if vector.sharding_strategy == "lsh":
        return _lsh(store, manifest, vector)
    if vector.sharding_strategy == "cel":
        fields = (vector.cel_expr, vector.cel_columns, vector.routing_values)
        return _cel("custom.vector", fields, manifest.num_dbs)
    return ExplicitRouting(manifest.num_dbs)


def _cluster(store: Store, manifest: Manifest, vector: VectorMeta) -> ClusterRouting:
    data, field = _artifact(store, manifest, "centroids_ref", vector.centroids_ref, most=manifest.num_dbs * vector.dim)
    centroids = decode_matrix(data, field=field, rows=manifest.num_dbs, dim=vector.dim, max_rows=manifest.num_dbs)
    return ClusterRouting(centroids, vector.metric)


def _lsh(store: Store, manifest: Manifest, vector: VectorMeta) -> LshRouting:
    bits = vector.num_hash_bits
    if bits is not None and bits > MOST_BITS:
        raise ManifestError(f"custom.vector.num_hash_bits is {bits}, must be at most {MOST_BITS}")
    data, field = _artifact(store, manifest, "hyperplanes_ref", vector.hyperplanes_ref, most=MOST_BITS * vector.dim)
    hyperplanes = decode_matrix(data, field=field, rows=bits, dim=vector.dim, max_rows=MOST_BITS)
    # Snapshots of others were tuned for the order in which their own readers probe.
    return LshRouting(hyperplanes, manifest.num_dbs, stock_order=manifest.extras is None)


def _artifact(store: Store, manifest: Manifest, name: str, ref: str | None, *, most: int) -> tuple[bytes, str]:
    """Bytes of a stored matrix of so many numbers at most, and what to call it."""
    field = f"custom.vector.{name}"
    if ref is None:
        raise ManifestError(f"{field} is missing")
    key = manifest.key_of(ref, field=field)
    data = store.get(key, limit=_MOST_HEADER + most * 8)
    extras = manifest.extras
    sealed = extras.routing_sha256 if extras else None
    found = hashlib.sha256(data).hexdigest()
    if sealed is not None and sealed != found:
        raise DigestMismatchError(f"{field} {store.url_of(key)} has SHA-256 {found}, the manifest says {sealed}")
    return data, f"{field} {store.url_of(key)}"


def _cel(owner: str, fields: tuple[Any, Any, Any], num_dbs: int) -> CelRouting:
    expr, columns, raw_values = fields
    for name, value in (("cel_expr", expr), ("cel_columns", columns)):
        if not value:
            raise ManifestError(f"{owner}.{name} is missing")
    try:
        values = decode_routing_values(raw_values)
    except ManifestError as error:
        raise ManifestError(f"{owner}.{error}") from error
    if values is not None and len(values) != num_dbs:
        raise ManifestError(f"{owner}.routing_values has {len(values)} values for {num_dbs} shards")
    try:
        # The same bounds as for an expression that a user configures.
        checked = CelSharding(cel_expr=expr, cel_columns=columns, routing_values=values)
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
    wanted = found[0] if rows is None and found else rows
    if found != (wanted, dim):
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
