"""Searches of 50,000 x 384, cosine, 8 shards, local disk, warm: ours by number of probes, plain LanceDB, exact numpy.

Blocking and asyncio readers, one and eight callers, one by one and in batches. All ways take turns, so that a busy
machine slows all alike. Plain LanceDB is one table with all rows, searched through its graph (IVF_HNSW_SQ) with and
without refinement; it gives back an Arrow table, which is the least that it can do, ours gives objects with payloads.
The ratios compare a row of ours with the plain row of the highest recall that is not above its own. Queries are none
of the stored rows. At the end: where the time of a search goes. Keys and values follow, see ``lookups``.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from sf_pipelines import AsyncShardedVectorReader, ShardedVectorReader
from sf_pipelines_tests.benchmarks import child, lookups, where
from sf_pipelines_tests.benchmarks.timing import FACES, Face, Times, run

ROWS, DIM, SHARDS, K = 50_000, 384, 8, 10
QUERIES = 512
ROUNDS, CALLS = 2, 200
CALLERS, BATCHES = (1, 8), (32, 256)
# Batches of a size that each caller sends in a round.
_EACH = {32: 4, 256: 1}
# (ef, refine_factor) of plain LanceDB: the least effort that gives ten hits, its usual one, one that is nearly exact.
_EFFORTS: tuple[tuple[int, int | None], ...] = ((10, None), (64, 2), (128, 4))

Ask = Callable[[NDArray[np.float32]], Any]


@dataclass
class Way:
    """One way to search.

    Attributes:
        name: for the table.
        recall: recall@10 over all queries.
        faces: for each of ``threads`` and ``tasks`` how to ask one query, shape (dim,), and a batch, shape (n, dim).
        ours: whether it is to be compared with plain LanceDB.
    """

    name: str
    recall: float
    faces: dict[Face, tuple[Ask, Ask]]
    ours: bool = False


@dataclass
class Figures:
    """Times of one way with one kind and number of callers.

    Attributes:
        one: searches one by one.
        batches: by size.
    """

    one: Times = field(default_factory=Times)
    batches: dict[int, Times] = field(default_factory=lambda: {size: Times() for size in BATCHES})


def work(source: str, store: str) -> dict[str, Any]:
    """Builds the snapshot, in a process of its own: the one that measures has none of the builder's threads."""
    from sf_pipelines import WriteConfig, build_snapshot

    config = WriteConfig(
        name="bench",
        source=source,
        store=store,
        num_dbs=SHARDS,
        payload_cols=("title",),
        vector_spec={"dim": DIM},  # pyright: ignore[reportArgumentType]
        recall_gate={"min_recall": 0.95},  # pyright: ignore[reportArgumentType]
    )
    return {"num_probes": build_snapshot(config, cache_dir=Path(store).with_name("cache")).num_probes}


def main() -> None:
    """Prints the figures."""
    out = Console(width=120)
    with child.folder() as folder:
        _searches(folder, out)
    with child.folder() as folder:
        lookups.measure(folder, out)


def _searches(folder: Path, out: Console) -> None:
    source, store, cache = folder / "source.parquet", str(folder / "store"), folder / "cache"
    made = str(folder / "all.parquet")
    child.run("sf_pipelines_tests.benchmarks.data", path=made, rows=ROWS + QUERIES, dim=DIM)
    table = pq.read_table(made)
    queries = _matrix(table.slice(ROWS))
    table = table.slice(0, ROWS)
    pq.write_table(table, source)
    probes = child.run("sf_pipelines_tests.benchmarks.readers", source=str(source), store=store)["num_probes"]
    rows = _Scan(table)
    truth = rows.nearest(queries)[0]
    with (
        asyncio.Runner() as loop,
        ShardedVectorReader(store, cache_dir=cache, preload=True) as reader,
        ShardedVectorReader(store, cache_dir=cache, preload=True, exact_scan=False) as by_index,
    ):
        tasks = loop.run(AsyncShardedVectorReader.open(store, cache_dir=cache, preload=True))
        by_index_tasks = loop.run(AsyncShardedVectorReader.open(store, cache_dir=cache, preload=True, exact_scan=False))
        ways = [_ours(f"{n} probes", n, reader, tasks, queries, truth) for n in range(1, SHARDS + 1)]
        ways.append(_ours(f"{probes} probes, index", probes, by_index, by_index_tasks, queries, truth))
        ways.extend(_plain(folder / "plain", table, loop, queries, truth))
        ways.append(Way("exact numpy scan", 1.0, {"threads": (rows.search, rows.search)}))
        out.rule(f"search {ROWS:,} x {DIM}, cosine, {SHARDS} shards, k = {K}, {probes} probes chosen by the gate (*)")
        for face in FACES:
            for callers in CALLERS:
                found = _in_turns([way for way in ways if face in way.faces], face, callers, queries, loop)
                _print(out, found, f"{FACES[face]}: {callers}", probes)
        where.report(out, reader, tasks, loop, queries, probes)
        for opened in (tasks, by_index_tasks):
            loop.run(opened.close())


def _matrix(table: pa.Table) -> NDArray[np.float32]:
    return np.concatenate([np.asarray(chunk.flatten()) for chunk in table.column("vector").chunks]).reshape(-1, DIM)


class _Scan:
    """All rows in one numpy matrix, with their payloads."""

    def __init__(self, table: pa.Table) -> None:
        vectors = _matrix(table)
        self._unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self._titles: list[str] = table.column("title").to_pylist()

    def nearest(self, queries: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Positions (which are the ids) and distances, each of shape (n, 10)."""
        away = 1 - (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ self._unit.T
        part = np.argpartition(away, K, axis=1)[:, :K]
        order = np.argsort(np.take_along_axis(away, part, axis=1), axis=1)
        best = np.take_along_axis(part, order, axis=1)
        return best, np.take_along_axis(away, best, axis=1)

    def search(self, queries: NDArray[np.float32]) -> list[list[tuple[int, float, str]]]:
        """Id, distance and payload of each hit, for one query or a batch."""
        ids, scores = self.nearest(np.atleast_2d(queries))
        return [
            [(row, score, self._titles[row]) for row, score in zip(near, away, strict=True)]
            for near, away in zip(ids.tolist(), scores.tolist(), strict=True)
        ]


def _ours(
    name: str,
    probes: int,
    reader: ShardedVectorReader,
    tasks: AsyncShardedVectorReader,
    queries: NDArray[np.float32],
    truth: NDArray[np.int64],
) -> Way:
    found = [[hit.id for hit in answer.results] for answer in reader.batch_search(queries, K, num_probes=probes)]
    faces: dict[Face, tuple[Ask, Ask]] = {
        "threads": (
            lambda query: reader.search(query, K, num_probes=probes),
            lambda batch: reader.batch_search(batch, K, num_probes=probes),
        ),
        "tasks": (
            lambda query: tasks.search(query, K, num_probes=probes),
            lambda batch: tasks.batch_search(batch, K, num_probes=probes),
        ),
    }
    return Way(name, _recall(found, truth), faces, ours=True)


def _recall(found: list[list[Any]], truth: NDArray[np.int64]) -> float:
    pairs = zip(found, truth.tolist(), strict=True)
    return float(np.mean([len(set(ids) & set(true)) / K for ids, true in pairs]))


def _plain(
    folder: Path, table: pa.Table, loop: asyncio.Runner, queries: NDArray[np.float32], truth: NDArray[np.int64]
) -> list[Way]:
    import lancedb
    from lancedb.index import HnswSq

    made = lancedb.connect(str(folder)).create_table("t", table)
    made.create_index("vector", config=HnswSq(distance_type="cosine", num_partitions=1))

    async def opened() -> Any:
        return await (await lancedb.connect_async(str(folder))).open_table("t")

    tasks = loop.run(opened())

    def way(ef: int, refine: int | None) -> Way:
        def limited(query: Any) -> Any:
            query = query.distance_type("cosine").limit(K).ef(ef).select(["id", "title", "_distance"])
            return query if refine is None else query.refine_factor(refine)

        def one(query: NDArray[np.float32]) -> pa.Table:
            return limited(made.search(query)).to_arrow()

        def one_task(query: NDArray[np.float32]) -> Any:
            return limited(tasks.vector_search(query)).to_arrow()

        def batch_task(batch: NDArray[np.float32]) -> Any:
            return limited(tasks.vector_search(list(batch))).to_arrow()

        ids = one(queries).column("id").to_numpy().reshape(-1, K)
        name = f"LanceDB, ef {ef}" + ("" if refine is None else f", refine {refine}")
        return Way(name, _recall(ids.tolist(), truth), {"threads": (one, one), "tasks": (one_task, batch_task)})

    return [way(*effort) for effort in _EFFORTS]


def _in_turns(
    ways: list[Way], face: Face, callers: int, queries: NDArray[np.float32], loop: asyncio.Runner
) -> list[tuple[Way, Figures]]:
    """Times all ways, round by round; the first round only warms up."""
    found = [(way, Figures()) for way in ways]
    for repeat in range(ROUNDS + 1):
        for way, figures in found:
            one, batch = way.faces[face]
            calls = CALLS if repeat else 2 * callers
            times = run(face, loop, lambda n, ask=one: ask(queries[n % QUERIES]), calls, callers)
            if repeat:
                figures.one.add(times)
            for size in BATCHES if repeat else ():
                parts = QUERIES // size
                times = run(
                    face,
                    loop,
                    lambda n, ask=batch, size=size, parts=parts: ask(queries[n % parts * size :][:size]),
                    callers * _EACH[size],
                    callers,
                )
                figures.batches[size].add(times)
    return found


def _print(out: Console, found: list[tuple[Way, Figures]], title: str, probes: int) -> None:
    sizes = [f"/s in {size}s" for size in BATCHES]
    ratios = ["x p50", "x /s", *(f"x in {size}s" for size in BATCHES)]
    table = Table("", "recall", "p50 ms", "p99 ms", "/s", *sizes, *ratios, title=title, title_justify="left")
    table.columns[0].no_wrap = True
    for way, figures in found:
        many = [figures.batches[size].per_second(size) for size in BATCHES]
        table.add_row(
            f"{way.name} *" if way.ours and way.name == f"{probes} probes" else way.name,
            f"{way.recall:.4f}",
            f"{figures.one.percentile(50):.2f}",
            f"{figures.one.percentile(99):.2f}",
            f"{figures.one.per_second():,.0f}",
            *(f"{rate:,.0f}" for rate in many),
            *_ratios(way, figures, found),
        )
    out.print(table)


def _ratios(way: Way, figures: Figures, found: list[tuple[Way, Figures]]) -> list[str]:
    """How many times faster than plain LanceDB of no higher recall; nothing where there is none."""
    plain = [(other.recall, at) for at, (other, _) in enumerate(found) if other.name.startswith("LanceDB")]
    below = [(recall, at) for recall, at in plain if recall <= way.recall]
    if not way.ours or not below:
        return []
    other = found[max(below)[1]][1]
    ratios = [
        other.one.percentile(50) / figures.one.percentile(50),
        figures.one.per_second() / other.one.per_second(),
        *(figures.batches[size].per_second() / other.batches[size].per_second() for size in BATCHES),
    ]
    return [f"{ratio:.1f}" for ratio in ratios]
