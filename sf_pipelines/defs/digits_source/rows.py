"""The demo's source: an asset that writes a Parquet file."""

import uuid
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TABLE = Path("data/digits/source/digits.parquet")


def digits_table() -> pa.Table:
    """The digits: id (int64), label (int64), pixels (64 float32 between 0 and 16)."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    pixels = np.ascontiguousarray(values, dtype=np.float32)
    return pa.table(
        {
            "id": pa.array(np.arange(len(pixels), dtype=np.int64)),
            "label": pa.array(np.asarray(labels, dtype=np.int64)),
            "pixels": pa.FixedSizeListArray.from_arrays(pa.array(pixels.ravel()), pixels.shape[1]),
        }
    )


def write_table(table: pa.Table, path: Path) -> bool:
    """Writes a table, and says so, unless the file holds it already: an unchanged source keeps its version."""
    if path.exists() and pq.read_table(path).equals(table):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of its own name: both demos may refresh the source at the same time.
    temporary = path.with_name(f".{uuid.uuid4().hex}.partial")
    pq.write_table(table, temporary)
    temporary.replace(path)
    return True


def project_root() -> Path:
    """The folder that ``data/`` lies in: the root of the repository."""
    return Path(__file__).parents[3]


@dg.asset(
    key=["digits", "table"],
    group_name="digits",
    kinds={"parquet"},
    code_version="1",
    backfill_policy=dg.BackfillPolicy.single_run(),
)
def table() -> dg.MaterializeResult:
    """The digits of scikit-learn as Parquet."""
    rows, path = digits_table(), project_root() / TABLE
    written = write_table(rows, path)
    return dg.MaterializeResult(metadata={"dagster/row_count": rows.num_rows, "path": str(path), "written": written})
