"""Peak memory of builds of 100,000 and 500,000 x 64 side by side: it must not grow with the rows."""

import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sf_pipelines_tests.benchmarks import child

DIM, ROWS_A_SHARD = 64, 12_500


def work(source: str, store: str, rows: int) -> dict[str, Any]:
    """One build with shards of equal size; in a process of its own."""
    from sf_pipelines import WriteConfig, build_snapshot

    config = WriteConfig(
        name="bench",
        source=source,
        store=store,
        num_dbs=rows // ROWS_A_SHARD,
        payload_cols=("title",),
        vector_spec={"dim": DIM, "index_type": "ivf_sq"},  # pyright: ignore[reportArgumentType]
        recall_gate={"min_recall": 0.9},  # pyright: ignore[reportArgumentType]
    )
    with tempfile.TemporaryDirectory() as name:
        result = build_snapshot(config, cache_dir=Path(name))
    return {"peak": child.peak_megabytes(), "recall": result.recall, "seconds": sum(result.durations.values())}


def main() -> None:
    """Prints the figures."""
    table = Table("rows", "raw vectors MB", "peak memory MB", "vectors/s", "recall@10")
    for rows in (100_000, 500_000):
        with child.folder() as name:
            source = str(name / "source.parquet")
            child.run("sf_pipelines_tests.benchmarks.data", path=source, rows=rows, dim=DIM)
            store = str(name / "store")
            done = child.run("sf_pipelines_tests.benchmarks.memory", source=source, store=store, rows=rows)
        table.add_row(
            f"{rows:,}",
            f"{rows * DIM * 4 / 1e6:.0f}",
            f"{done['peak']:.0f}",
            f"{rows / done['seconds']:,.0f}",
            f"{done['recall']:.4f}",
        )
    out = Console(width=110)
    out.rule(f"peak memory, {DIM} numbers, {ROWS_A_SHARD:,} rows a shard")
    out.print(table)
