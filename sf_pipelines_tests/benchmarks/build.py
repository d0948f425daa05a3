"""Build of 50,000 x 384, cosine, 8 shards: vectors/s, share of each stage, memory, recall by probes, search latency.

The baseline of the same run: the bare calls of the index library (write and index, eight tables) with the same index,
without validation, routing, digests, upload, tuning or gate.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from sf_pipelines_tests.benchmarks import child

ROWS, DIM, SHARDS, QUERIES = 50_000, 384, 8, 300


def work(
    source: str, store: str, spec: dict[str, Any], exact_scan: bool = True, queries: int = QUERIES
) -> dict[str, Any]:
    """One build, gated at 0.95, and searches; in a process of its own.

    Args:
        source: Parquet file.
        store: root.
        spec: fields of ``VectorSpec``.
        exact_scan: of the reader.
        queries: timed searches at each number of probes.
    """
    from sf_pipelines import ShardedVectorReader, WriteConfig, build_snapshot
    from sf_pipelines_tests.tables import small_config, write_source

    with tempfile.TemporaryDirectory() as name:
        # Libraries are imported and their threads started once per process, not once per vector.
        write_source(Path(name, "source.parquet"))
        started = time.perf_counter()
        build_snapshot(small_config(Path(name)), cache_dir=Path(name, "cache"))
        warm_up = time.perf_counter() - started
    before = child.peak_megabytes()
    config = WriteConfig(
        name="bench",
        source=source,
        store=store,
        num_dbs=SHARDS,
        payload_cols=("title",),
        vector_spec={"dim": DIM, **spec},  # pyright: ignore[reportArgumentType]
        recall_gate={"min_recall": 0.95},  # pyright: ignore[reportArgumentType]
    )
    cache = Path(store).with_name("cache")
    started = time.perf_counter()
    result = build_snapshot(config, cache_dir=cache)
    seconds = time.perf_counter() - started
    peak = child.peak_megabytes()
    rows = next(pq.ParquetFile(source).iter_batches(queries)).column("vector").flatten().to_numpy().reshape(-1, DIM)
    with ShardedVectorReader(store, cache_dir=cache, preload=True, exact_scan=exact_scan) as reader:
        latencies = {probes: _latencies(reader, rows, probes) for probes in (1, 2, result.num_probes, SHARDS)}
    return {
        "seconds": seconds,
        "warm_up": warm_up,
        "durations": result.durations,
        "peak": peak,
        "before": before,
        "num_probes": result.num_probes,
        "recall": result.recall,
        "lower": result.recall_lower,
        "curve": [(point.num_probes, point.recall, point.lower) for point in result.curve],
        "stock": next(v.message for v in result.verdicts if v.name == "stock_recall"),
        "latencies": latencies,
        "bytes": sum(shard.bytes for shard in result.shards),
    }


def _latencies(reader: Any, queries: np.ndarray, probes: int) -> tuple[float, float]:
    times: list[float] = []
    for query in queries:
        started = time.perf_counter()
        reader.search(query, 10, num_probes=probes)
        times.append(1000 * (time.perf_counter() - started))
    return float(np.percentile(times[20:], 50)), float(np.percentile(times[20:], 99))


def bare(source: str, spec: dict[str, Any]) -> float:
    """Seconds of the bare calls for eight tables."""
    table = pq.read_table(source)
    step = ROWS // SHARDS
    write = _bare_sqlite_vec if spec.get("backend") == "sqlite-vec" else _bare_lancedb
    with child.folder() as name:
        started = time.perf_counter()
        for shard in range(SHARDS):
            write(table.slice(shard * step, step), name / str(shard), spec.get("index_type", "auto"))
        return time.perf_counter() - started


def _bare_lancedb(rows: pa.Table, folder: Path, index_type: str) -> None:
    import lancedb
    from lancedb.index import HnswSq, IvfSq

    made = lancedb.connect(str(folder)).create_table("t", rows)
    config: Any = HnswSq if index_type == "hnsw" else IvfSq
    made.create_index("vector", config=config(distance_type="cosine", num_partitions=1))


def _bare_sqlite_vec(rows: pa.Table, folder: Path, index_type: str) -> None:
    import apsw
    import sqlite_vec

    del index_type
    folder.mkdir()
    vectors: Any = rows.column("vector").combine_chunks()
    blobs = memoryview(np.ascontiguousarray(vectors.flatten().to_numpy()).data).cast("B")
    made = apsw.Connection(str(folder / "shard.db"))
    made.enable_load_extension(True)
    made.load_extension(sqlite_vec.loadable_path())
    made.execute(f"CREATE VIRTUAL TABLE v USING vec0(embedding float[{DIM}] distance_metric=cosine)")
    with made:
        values = ((row, blobs[4 * DIM * row : 4 * DIM * (row + 1)]) for row in range(rows.num_rows))
        made.executemany("INSERT INTO v(rowid, embedding) VALUES (?, ?)", values)
    made.close()


SPECS: dict[str, dict[str, Any]] = {
    "index_type auto": {"index_type": "auto"},
    "index_type hnsw": {"index_type": "hnsw"},
    "backend sqlite-vec": {"backend": "sqlite-vec"},
}


def main() -> None:
    """Prints the figures."""
    out = Console(width=110)
    with child.folder() as name:
        source = str(name / "source.parquet")
        child.run("sf_pipelines_tests.benchmarks.data", path=source, rows=ROWS, dim=DIM)
        for place, (title, spec) in enumerate(SPECS.items()):
            store = str(name / str(place) / "store")
            figures = child.run("sf_pipelines_tests.benchmarks.build", source=source, store=store, spec=spec)
            _print(out, title, figures, bare(source, spec))


def _print(out: Console, title: str, figures: dict[str, Any], bare_seconds: float) -> None:
    seconds = figures["seconds"]
    out.rule(f"build {ROWS:,} x {DIM}, cosine, {SHARDS} shards, {title}")
    out.print(
        f"{ROWS / seconds:,.0f} vectors/s ({seconds:.2f} s); bare calls {ROWS / bare_seconds:,.0f} vectors/s; "
        f"ratio {bare_seconds / seconds:.2f}"
    )
    out.print(f"peak memory {figures['peak']:.0f} MB (before the build, libraries loaded: {figures['before']:.0f} MB)")
    out.print(f"first small build of the process, imports included: {figures['warm_up']:.2f} s")
    out.print(f"stored {figures['bytes'] / (4 * ROWS * DIM):.2f} x the raw vectors")
    table = Table("stage", "seconds", "share")
    slowest = max(figures["durations"], key=figures["durations"].get)
    for stage, spent in figures["durations"].items():
        mark = " (bottleneck)" if stage == slowest else ""
        table.add_row(stage, f"{spent:.2f}", f"{100 * spent / seconds:.0f} %{mark}")
    out.print(table)
    curve = Table("probes", "recall@10", "lower bound", "search p50 ms", "p99 ms")
    for probes, recall, lower in figures["curve"]:
        p50, p99 = figures["latencies"].get(str(probes), (None, None))
        times = ["", ""] if p50 is None else [f"{p50:.2f}", f"{p99:.2f}"]
        chosen = " (chosen)" if probes == figures["num_probes"] else ""
        curve.add_row(f"{probes}{chosen}", f"{recall:.4f}", f"{lower:.4f}", *times)
    out.print(curve)
    out.print(f"judged: recall {figures['recall']:.4f}, at least {figures['lower']:.4f}; {figures['stock']}")
