"""``get`` and ``multi_get`` over one million keys in 8 shards (sqlite-vec), beside plain SELECTs on one file.

The plain way has the same encoded keys and values in one table of one file, opened read-only, with a connection for
each thread; its tasks hand their SELECTs to threads (``asyncio.to_thread``). The snapshot is built by
``build_snapshot`` like any other, in about a minute: most of that is the vectors, which nobody asks for here.
"""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from sf_pipelines import AsyncUnifiedShardedReader, UnifiedShardedReader
from sf_pipelines_tests.benchmarks import child
from sf_pipelines_tests.benchmarks.timing import FACES, Face, Times, run

KEYS, DIM, SHARDS = 1_000_000, 8, 8
ROUNDS = 2
CALLERS, SIZES = (1, 8), (1, 100, 1_000)
# Calls of a size in a round, all callers together.
_CALLS = {1: 2_000, 100: 120, 1_000: 32}
_CREATE = "CREATE TABLE kv (k BLOB PRIMARY KEY, v BLOB NOT NULL) WITHOUT ROWID"

Ask = Callable[[list[int]], Any]


def work(source: str, store: str, cache: str) -> dict[str, Any]:
    """Writes the rows and builds the snapshot, in a process of its own."""
    from sf_pipelines import WriteConfig, build_snapshot

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((KEYS, DIM), dtype=np.float32)
    table = pa.table(
        {
            "key": rng.permutation(KEYS),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM),
            "value": pa.array([b"value %d" % n for n in range(KEYS)], pa.binary()),
        }
    )
    pq.write_table(table, source)
    config = WriteConfig(
        name="keys",
        source=source,
        store=store,
        num_dbs=SHARDS,
        key_value={"key_col": "key", "value_col": "value"},  # pyright: ignore[reportArgumentType]
        vector_spec={"dim": DIM, "metric": "l2", "backend": "sqlite-vec"},  # pyright: ignore[reportArgumentType]
    )
    return {"seconds": sum(build_snapshot(config, cache_dir=Path(cache)).durations.values())}


def measure(folder: Path, out: Console) -> None:
    """Prints the figures."""
    source, store, cache = folder / "keys.parquet", str(folder / "store"), folder / "cache"
    done = child.run("sf_pipelines_tests.benchmarks.lookups", source=str(source), store=store, cache=str(cache))
    plain = _Plain(folder / "plain.db", pq.read_table(source, columns=["key", "value"]))
    asked = np.random.default_rng(1).permutation(KEYS).tolist()
    out.rule(f"get and multi_get, {KEYS:,} keys, {SHARDS} shards, sqlite-vec (built in {done['seconds']:.0f} s)")
    with asyncio.Runner() as loop, UnifiedShardedReader(store, cache_dir=cache) as reader:
        tasks = loop.run(AsyncUnifiedShardedReader.open(store, cache_dir=cache))
        faces: dict[Face, dict[str, dict[int, Ask]]] = {
            "threads": {"reader": _by_size(reader), "plain SELECT": plain.by_size},
            "tasks": {"reader": _by_size(tasks), "plain SELECT": plain.by_size_in_threads},
        }
        for ways in faces["threads"].values():
            _check(ways)
        table = Table("", "keys", "reader p50 ms", "p99 ms", "keys/s", "plain p50 ms", "p99 ms", "keys/s", "x keys/s")
        for face, ways in faces.items():
            for callers in CALLERS:
                for size in SIZES:
                    each = {name: asks[size] for name, asks in ways.items()}
                    _add(table, f"{FACES[face]}, {callers}", size, _in_turns(each, face, callers, size, asked, loop))
        loop.run(tasks.close())
    out.print(table)


def _by_size(reader: UnifiedShardedReader | AsyncUnifiedShardedReader) -> dict[int, Ask]:
    def one(keys: list[int]) -> Any:
        return reader.get(keys[0])

    return {1: one} | dict.fromkeys(SIZES[1:], reader.multi_get)


class _Plain:
    """One table in one file."""

    def __init__(self, path: Path, rows: pa.Table) -> None:
        self._path = path
        self._mine = threading.local()
        keys, values = rows.column("key").to_pylist(), rows.column("value").to_pylist()
        connection = apsw.Connection(str(path))
        with connection:
            connection.execute(_CREATE)
            pairs = sorted(zip(map(_encoded, keys), values, strict=True))
            connection.executemany("INSERT INTO kv (k, v) VALUES (?, ?)", pairs)
        connection.close()
        self.by_size: dict[int, Ask] = {1: self._one} | dict.fromkeys(SIZES[1:], self._many)
        self.by_size_in_threads: dict[int, Ask] = {
            size: lambda keys, ask=ask: asyncio.to_thread(ask, keys) for size, ask in self.by_size.items()
        }

    @property
    def _connection(self) -> apsw.Connection:
        if not hasattr(self._mine, "connection"):
            self._mine.connection = apsw.Connection(str(self._path), flags=apsw.SQLITE_OPEN_READONLY)
        return self._mine.connection

    def _one(self, keys: list[int]) -> bytes | None:
        row = self._connection.execute("SELECT v FROM kv WHERE k = ?", (_encoded(keys[0]),)).fetchone()
        return None if row is None else row[0]

    def _many(self, keys: list[int]) -> dict[int, bytes]:
        marks = ",".join("?" * len(keys))
        found = self._connection.execute(f"SELECT k, v FROM kv WHERE k IN ({marks})", [*map(_encoded, keys)])  # noqa: S608 - question marks only
        return {int.from_bytes(key, "big"): value for key, value in found}


def _encoded(key: int) -> bytes:
    return key.to_bytes(8, "big")


def _check(ways: dict[int, Ask]) -> None:
    """That a way answers, and all shards are open."""
    found = ways[SIZES[-1]](list(range(SIZES[-1])))
    if any(found[key] is None or ways[1]([key]) != found[key] for key in range(0, SIZES[-1], 100)):
        raise AssertionError("get and multi_get do not agree")


def _in_turns(
    ways: dict[str, Ask], face: Face, callers: int, size: int, asked: list[int], loop: asyncio.Runner
) -> dict[str, Times]:
    """Times of the ways, round by round, each with the same keys: others in every call."""
    found = {name: Times() for name in ways}
    for repeat in range(ROUNDS):
        for name, ask in ways.items():
            start = repeat * _CALLS[size] * size
            times = run(
                face,
                loop,
                lambda n, ask=ask, start=start: ask(asked[start + n * size : start + (n + 1) * size]),
                _CALLS[size],
                callers,
            )
            found[name].add(times)
    return found


def _add(table: Table, title: str, size: int, found: dict[str, Times]) -> None:
    ours, plain = found["reader"], found["plain SELECT"]
    cells = [
        cell
        for times in (ours, plain)
        for cell in (
            f"{times.percentile(50):.3f}",
            f"{times.percentile(99):.3f}",
            f"{times.per_second(size):,.0f}",
        )
    ]
    table.add_row(title, f"{size:,}", *cells, f"{ours.per_second() / plain.per_second():.2f}")
