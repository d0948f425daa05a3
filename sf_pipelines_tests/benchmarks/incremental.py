"""Full build of 50,000 x 384, cosine, 16 clusters, against a build after 1 % new rows in one cluster.

The second build keeps the centroids, routes all rows, copies every shard but one inside the store, and passes the same
gate. Then a forced build of the grown source: what the same rows cost when nothing is taken over.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from sf_pipelines_tests.benchmarks import child

ROWS, DIM, SHARDS, NEW = 50_000, 384, 16, 0.01


def work(folder: str, forced: bool = False) -> dict[str, Any]:
    """One build of ``folder/source`` to ``folder/store``, in a process of its own."""
    from sf_pipelines import WriteConfig, build_snapshot
    from sf_pipelines_tests.tables import small_config, write_source

    with child.folder() as name:
        # Libraries are imported and their threads started once per process.
        write_source(name / "source.parquet")
        build_snapshot(small_config(name), cache_dir=name / "cache")
    config = WriteConfig(
        name="bench",
        source=str(Path(folder, "source")),
        store=str(Path(folder, "store")),
        num_dbs=SHARDS,
        payload_cols=("title",),
        vector_spec={"dim": DIM},  # pyright: ignore[reportArgumentType]
        recall_gate={"min_recall": 0.95},  # pyright: ignore[reportArgumentType]
    )
    started = time.perf_counter()
    result = build_snapshot(config, cache_dir=Path(folder, "cache"), force=forced)
    seconds = time.perf_counter() - started
    copied = sum(shard.reused is not None for shard in result.shards)
    drift = next(verdict for verdict in result.verdicts if verdict.name == "drift")
    return {
        "seconds": seconds,
        "durations": result.durations,
        "rows": result.rows,
        "built": sum(shard.rows > 0 for shard in result.shards) - copied,
        "copied": copied,
        "recall": result.recall,
        "drift": drift.message,
    }


def add_rows(folder: str) -> dict[str, Any]:
    """One more file: 1 % new rows, each next to a row of the middle-sized shard."""
    from sf_pipelines import ShardedVectorReader

    source = Path(folder, "source")
    table = pq.read_table(source / "first.parquet")
    vectors: Any = table.column("vector").combine_chunks()
    rows = vectors.flatten().to_numpy().reshape(-1, DIM)
    with ShardedVectorReader(Path(folder, "store"), cache_dir=Path(folder, "cache")) as reader:
        sizes = [(shard.vector_count, shard.db_id) for shard in reader.shard_details()]
        chosen = sorted(sizes)[SHARDS // 2][1]
        count = round(NEW * ROWS)
        near = rows[[reader.route_vector(vector, 1) == [chosen] for vector in rows]]
        noise = np.random.default_rng(1).standard_normal((count, DIM)).astype(np.float32)
        new = near[np.arange(count) % len(near)] + np.float32(1e-3) * noise
        new = new[[reader.route_vector(vector, 1) == [chosen] for vector in new]]
    ids = np.arange(ROWS, ROWS + len(new))
    flat = pa.FixedSizeListArray.from_arrays(pa.array(new.ravel()), DIM)
    columns = [pa.array(ids), flat, pa.array([f"row {n}" for n in ids.tolist()])]
    pq.write_table(pa.table(columns, schema=table.schema), source / "second.parquet")
    return {"rows": len(new), "shard": chosen}


def main() -> None:
    """Prints the figures."""
    out = Console(width=110)
    with child.folder() as name:
        (name / "source").mkdir()
        path = str(name / "source" / "first.parquet")
        child.run("sf_pipelines_tests.benchmarks.data", path=path, rows=ROWS, dim=DIM)
        full = child.run("sf_pipelines_tests.benchmarks.incremental", folder=str(name))
        added = add_rows(str(name))
        little = child.run("sf_pipelines_tests.benchmarks.incremental", folder=str(name))
        forced = child.run("sf_pipelines_tests.benchmarks.incremental", folder=str(name), forced=True)
    out.rule(f"incremental: {ROWS:,} x {DIM}, cosine, {SHARDS} shards, then {added['rows']} new rows in one of them")
    builds = {"first": full, "1 % more": little, "1 % more, forced": forced}
    table = Table("", *builds)
    for fact, of in (("shards built", "built"), ("shards copied", "copied")):
        table.add_row(fact, *(str(found[of]) for found in builds.values()))
    table.add_row("recall", *(f"{found['recall']:.4f}" for found in builds.values()))
    table.add_row("seconds", *(f"{found['seconds']:.2f}" for found in builds.values()))
    for stage in full["durations"]:
        table.add_row(f"  {stage}", *(f"{found['durations'].get(stage, 0):.2f}" for found in builds.values()))
    out.print(table)
    ratio, same = full["seconds"] / little["seconds"], forced["seconds"] / little["seconds"]
    out.print(
        f"the little build takes {1 / ratio:.2f} of the first ({ratio:.1f} times as fast), {1 / same:.2f} of forced"
    )
    out.print(f"drift: {little['drift']}")
