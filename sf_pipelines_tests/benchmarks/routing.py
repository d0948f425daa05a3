"""Routing of 1,000,000 rows: by vector against the bare matrix product of the same run, and by columns."""

from collections.abc import Callable
from time import perf_counter

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.cluster import ClusterRouting
from sf_pipelines.snapshot.routing.hash import HashRouting
from sf_pipelines.snapshot.routing.lsh import LshRouting

ROWS, DIM, SHARDS, BITS = 1_000_000, 128, 64, 8
_REPEATS = 5


def main() -> None:
    """Prints the figures: the best of five, taken in turn so that a busy machine slows all alike."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((ROWS, DIM), dtype=np.float32)
    centroids = rng.standard_normal((SHARDS, DIM), dtype=np.float32)
    planes = rng.standard_normal((BITS, DIM), dtype=np.float32)
    weights = 1 << np.arange(BITS)
    table = Table("routing", "seconds", "rows/s", "x bare")
    by_vector: dict[str, Callable[[], object]] = {
        f"bare product and argmax, {SHARDS} centroids": lambda: (vectors @ centroids.T).argmax(axis=1),
        **{f"cluster, {metric}": _assign(ClusterRouting(centroids, metric), vectors) for metric in DistanceMetric},
    }
    by_bits: dict[str, Callable[[], object]] = {
        f"bare product and sign bits, {BITS} hyperplanes": lambda: ((vectors @ planes.T) > 0) @ weights,
        "lsh": _assign(LshRouting(planes, SHARDS), vectors),
    }
    _add(table, by_vector)
    _add(table, by_bits)
    regions = pa.record_batch({"region": [f"region {n}" for n in rng.integers(0, 50, ROWS)]})
    keys = pa.record_batch({"key": rng.permutation(ROWS)})
    cel, hashed = CelRouting("shard_hash(region) % 64u", {"region": "string"}, SHARDS), HashRouting(SHARDS)
    _add(table, {"cel, 50 values": lambda: cel.place(regions)}, ratio=False)
    _add(table, {"hash, int keys": lambda: hashed.place(keys)}, ratio=False)
    out = Console(width=110)
    out.rule(f"routing, {ROWS:,} rows, {DIM} numbers")
    out.print(table)


def _assign(routing: ClusterRouting | LshRouting, vectors: np.ndarray) -> Callable[[], object]:
    return lambda: routing.assign(vectors)


def _add(table: Table, runs: dict[str, Callable[[], object]], *, ratio: bool = True) -> None:
    """Times each, and says how much slower it is than the first."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(_REPEATS):
        for name, run in runs.items():
            start = perf_counter()
            run()
            best[name] = min(best[name], perf_counter() - start)
    bare = next(iter(best.values()))
    for name, seconds in best.items():
        table.add_row(name, f"{seconds:.3f}", f"{ROWS / seconds:,.0f}", f"{seconds / bare:.2f}" if ratio else "")
