"""Source tables for tests, all from seeded generators."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.metric import DistanceMetric


def clustered(rows: int, dim: int, *, seed: int = 0, clusters: int = 20) -> NDArray[np.float32]:
    """Vectors around random centres, shape (rows, dim)."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dim))
    noise = 0.5 * rng.standard_normal((rows, dim))
    return (centres[rng.integers(0, clusters, rows)] + noise).astype(np.float32)


def exact_distances(
    queries: NDArray[np.float32], rows: NDArray[np.float32], metric: DistanceMetric
) -> NDArray[np.float64]:
    """What rows are ranked by, in float64, without any of the package's code: shape (queries, rows)."""
    q, r = queries.astype(np.float64), rows.astype(np.float64)
    if metric is DistanceMetric.L2:
        return np.square(q[:, None, :] - r[None, :, :]).sum(axis=2)
    products = q @ r.T
    if metric is DistanceMetric.DOT_PRODUCT:
        return -products
    if metric is DistanceMetric.COSINE:
        lengths = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(r, axis=1)[None, :]
        products = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    return 1.0 - products


def exact_scores(
    queries: NDArray[np.float32], rows: NDArray[np.float32], metric: DistanceMetric
) -> NDArray[np.float64]:
    """What readers show for the distances."""
    return exact_distances(queries, rows, metric) + (metric is DistanceMetric.DOT_PRODUCT)


def vector_table(vectors: NDArray[np.float32], ids: Any = None, **columns: Any) -> pa.Table:
    """Columns id, vector and whatever else is given."""
    flat = pa.array(np.ascontiguousarray(vectors).ravel())
    return pa.table(
        {
            "id": np.arange(len(vectors)) if ids is None else ids,
            "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            **columns,
        }
    )


def write_source(
    path: Path, rows: int = 600, dim: int = 16, *, seed: int = 0, row_group: int = 150
) -> NDArray[np.float32]:
    """A Parquet file with ``title`` as payload; its vectors."""
    vectors = clustered(rows, dim, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = vector_table(vectors, title=[f"row {n}" for n in range(rows)])
    pq.write_table(table, path, row_group_size=row_group)
    return vectors


def small_config(root: Path, **more: Any) -> WriteConfig:
    """Three shards from ``root/source.parquet`` to ``root/store``."""
    fields: dict[str, Any] = {
        "name": "small",
        "source": str(root / "source.parquet"),
        "store": str(root / "store"),
        "num_dbs": 3,
        "payload_cols": ("title",),
        "vector_spec": {"dim": 16},
    }
    return WriteConfig(**(fields | more))
