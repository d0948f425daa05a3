"""Clustered vectors as a Parquet file, written in pieces."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_PIECE = 20_000


def work(path: str, rows: int, dim: int, seed: int = 0, spread: float = 0.35) -> dict[str, Any]:
    """Writes ``rows`` vectors: 500 centres that themselves lie around 20, so that neighbours cross shard borders."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((20, dim))
    centres = coarse[rng.integers(0, 20, 500)] + 0.7 * rng.standard_normal((500, dim))
    schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32(), dim)), ("title", pa.string())])
    with pq.ParquetWriter(Path(path), schema, compression="none") as writer:
        for start in range(0, rows, _PIECE):
            count = min(_PIECE, rows - start)
            noise = spread * rng.standard_normal((count, dim)) * rng.uniform(0.5, 2.5, (count, 1))
            vectors = (centres[rng.integers(0, 500, count)] + noise).astype(np.float32)
            ids = np.arange(start, start + count)
            columns = [
                pa.array(ids),
                pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim),
                pa.array([f"row {n}" for n in ids.tolist()]),
            ]
            writer.write_table(pa.table(columns, schema=schema))
    return {}
