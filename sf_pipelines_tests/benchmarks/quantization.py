"""What quantisation does to recall, bytes and speed: the build benchmark's data, one build for each setting.

Searches ask the index (no scan in memory), with all shards asked for the index's own recall.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from sf_pipelines_tests.benchmarks import child
from sf_pipelines_tests.benchmarks.build import DIM, ROWS, SHARDS

SETTINGS: tuple[tuple[str | None, str], ...] = (
    (None, "ivf_flat"),
    ("fp16", "ivf_flat"),
    ("fp16", "ivf_sq"),
    ("i8", "ivf_sq"),
    ("i8", "hnsw"),
)


def main() -> None:
    """Prints the figures."""
    table = Table("quantization", "index_type", "vectors/s", "bytes / raw", "recall@10, all shards", "p50 ms", "p99 ms")
    with child.folder() as name:
        source = str(name / "source.parquet")
        child.run("sf_pipelines_tests.benchmarks.data", path=source, rows=ROWS, dim=DIM)
        for place, (quantization, index_type) in enumerate(SETTINGS):
            spec: dict[str, Any] = {"index_type": index_type, "quantization": quantization}
            done = child.run(
                "sf_pipelines_tests.benchmarks.build",
                source=source,
                store=str(name / str(place) / "store"),
                spec=spec,
                exact_scan=False,
                queries=100,
            )
            p50, p99 = done["latencies"][str(SHARDS)]
            table.add_row(
                str(quantization),
                index_type,
                f"{ROWS / done['seconds']:,.0f}",
                f"{done['bytes'] / (4 * ROWS * DIM):.2f}",
                f"{done['curve'][-1][1]:.4f}",
                f"{p50:.1f}",
                f"{p99:.1f}",
            )
    out = Console(width=110)
    out.rule(f"quantization, {ROWS:,} x {DIM}, cosine, {SHARDS} shards")
    out.print(table)
