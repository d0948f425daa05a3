"""sqlite-vec: our build against the bare calls and against row by row; our scan against the extension's search."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import apsw
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console

from sf_pipelines.snapshot.config import IndexParams
from sf_pipelines.snapshot.index.key_value import KeyValueShard, encode_keys, write_key_values
from sf_pipelines.snapshot.index.protocol import IndexFamily
from sf_pipelines.snapshot.index.sqlite_vec import SqliteVecShard, load_extension
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines_tests.benchmarks import child
from sf_pipelines_tests.snapshots import table_of

_ROWS, _DIM, _ROUNDS = 50_000, 384, 3
_CREATE = f"CREATE VIRTUAL TABLE vec_index USING vec0(embedding float[{_DIM}] distance_metric=cosine)"
_INSERT = "INSERT INTO vec_index (rowid, embedding) VALUES (?, ?)"


def main() -> None:
    """Prints rates of building and times of searching, each as the median of a few alternating rounds."""
    vectors = np.random.default_rng(0).standard_normal((_ROWS, _DIM)).astype(np.float32)
    rows = table_of(list(range(_ROWS)), vectors)
    ways: dict[str, Callable[[Path], None]] = {
        "our build": lambda folder: _ours(rows, folder),
        "bare executemany": lambda folder: _bare(vectors, folder),
        "row by row": lambda folder: _row_by_row(vectors, folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, way in ways.items():
            with child.folder() as folder:
                started = time.perf_counter()
                way(folder)
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    out = Console(width=110)
    out.print(f"sqlite-vec, {_ROWS:,} x {_DIM}")
    for name, taken in medians.items():
        share = taken / medians["bare executemany"]
        out.print(f"  {name:<18} {_ROWS / taken:>9,.0f} vectors/s   {share:.2f} x the time of bare executemany")
    with child.folder() as folder:
        _search(rows, folder, out)
    with child.folder() as folder:
        _keys(folder, out)


def _ours(rows: pa.Table, folder: Path) -> None:
    SqliteVecShard.build(rows, folder, family=IndexFamily.FLAT, metric=DistanceMetric.COSINE, params=IndexParams())


def _connect(folder: Path) -> apsw.Connection:
    connection = apsw.Connection(str(folder / "shard.db"))
    load_extension(connection)
    connection.execute("PRAGMA synchronous = OFF")
    return connection


def _bare(vectors: NDArray[np.float32], folder: Path) -> None:
    """Vectors only: no ids, payloads or checks."""
    connection, data, width = _connect(folder), memoryview(vectors.tobytes()), _DIM * 4
    with connection:
        connection.execute(_CREATE)
        connection.executemany(_INSERT, ((n, data[n * width : (n + 1) * width]) for n in range(len(vectors))))
    connection.close()


def _row_by_row(vectors: NDArray[np.float32], folder: Path) -> None:
    """One statement a vector, serialised from a list as most examples do, with its id; one transaction."""
    connection = _connect(folder)
    with connection:
        connection.execute(_CREATE)
        connection.execute("CREATE TABLE vec_id_map (internal_id INTEGER PRIMARY KEY, original_id TEXT NOT NULL)")
        for n, vector in enumerate(vectors.tolist()):
            connection.execute(_INSERT, (n, np.array(vector, dtype=np.float32).tobytes()))
            connection.execute("INSERT INTO vec_id_map VALUES (?, ?)", (n, f'{{"v": {n}, "t": "int"}}'))
    connection.close()


def _search(rows: pa.Table, folder: Path, out: Console) -> None:
    out.print("search, k = 10, one query, ms: scan in memory (first time), scan in blocks, MATCH")
    queries = np.random.default_rng(1).standard_normal((20, _DIM)).astype(np.float32)
    for count in (2_500, 20_000, _ROWS):
        part = folder / str(count)
        _ours(rows.slice(0, count), part)
        times: list[float] = []
        for in_memory in (True, False):
            shard = SqliteVecShard.open(part, metric=DistanceMetric.COSINE, dim=_DIM, in_memory=in_memory)
            if in_memory:
                times.append(_once(lambda shard=shard: shard.search(queries[:1], 10)))
            times.append(_each(lambda query, shard=shard: shard.search(query, 10), queries))
            if not in_memory:
                times.append(_each(lambda query, shard=shard: shard.search_raw(query, 10), queries))
            shard.close()
        first, memory, blocks, match = times
        out.print(f"  {count:>7,} rows  {memory:.2f} ({first:.0f})  {blocks:.2f}  {match:.2f}")


def _once(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def _each(ask: Callable[[NDArray[np.float32]], object], queries: NDArray[np.float32]) -> float:
    ask(queries[:1])
    return statistics.median(_once(lambda n=n: ask(queries[n : n + 1])) for n in range(len(queries)))


def _keys(folder: Path, out: Console) -> None:
    numbers = np.random.default_rng(2).permutation(200_000)
    keys = encode_keys(pa.array(numbers), "u64be")
    values = pa.array([b"value" * 20] * len(keys))
    written = _once(lambda: write_key_values(folder, keys, values)) / 1000
    shard, asked = KeyValueShard(folder), keys.slice(0, 5_000).to_pylist()
    many = statistics.median(_once(lambda: shard.get_many(asked)) for _ in range(5))
    one = statistics.median(_once(lambda key=key: shard.get_many([key])) for key in asked[:500])
    shard.close()
    out.print(
        f"keys and values: {len(keys) / written:,.0f} written/s, get {one * 1000:.0f} µs, 5,000 keys {many:.0f} ms"
    )
