"""What every index library must do: a class to subclass in your tests.

Example:
    class TestMine(IndexConformance):
        backend = MyShard
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pyarrow as pa

from sf_pipelines.snapshot.config import IndexParams
from sf_pipelines.snapshot.errors import IndexBuildError, IntegrityError, ReaderClosedError
from sf_pipelines.snapshot.index.protocol import IndexFamily, ShardIndex, VectorType
from sf_pipelines.snapshot.index.ranking import ShardHits
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, Float64
from sf_pipelines.snapshot.testing.expect import expect, refused, same

_TOLERANCE = 1e-5
_L2 = DistanceMetric.L2


class IndexConformance:
    """Builds real shards in ``tmp_path`` and compares with float64 brute force.

    Attributes:
        backend: to test.
        families: whose answers must be exact.
        dim: of the test vectors.
    """

    backend: ClassVar[type[ShardIndex]]
    families: ClassVar[tuple[IndexFamily, ...]] = (IndexFamily.FLAT,)
    dim: ClassVar[int] = 8

    def test_answers_are_those_of_brute_force(self, tmp_path: Path) -> None:
        """Every size around a chunk or a training threshold, every metric, in memory and not, of every type."""
        sizes = (1, 2, 255, 256, 257, 1100)
        cases = itertools.product(sizes, self._metrics(), self.families, self.backend.vector_types)
        for n, (rows, metric, family, kind) in enumerate(cases):
            vectors, queries = self.vectors(rows, kind=kind), self.vectors(7, seed=1)
            folder = tmp_path / str(n)
            self._build(folder, vectors, metric=metric, family=family, vector_type=kind)
            for in_memory in (False, True):
                shard = self._open(folder, metric, in_memory=in_memory)
                what = f"{rows} rows, {metric}, {family}, {kind}, in_memory {in_memory}"
                same((shard.rows, shard.indexed_rows), (rows, rows), f"{what}: rows and indexed rows")
                _expect_exact(shard.search(queries, 10), _distances(queries, vectors, metric), what)
                shard.close()

    def test_every_row_finds_itself(self, tmp_path: Path) -> None:
        """Each stored vector is its own nearest neighbour where that must be so."""
        vectors = self.vectors(300)
        self._build(tmp_path, vectors)
        same(self._open(tmp_path).search(vectors, 1).ids[:, 0].tolist(), list(range(300)), "nearest id of each row")

    def test_equal_vectors_are_ordered_by_id(self, tmp_path: Path) -> None:
        """Ties are broken by id, whatever the order in the file, and all rows can be had."""
        vectors = np.tile(np.linspace(1, 2, self.dim, dtype=np.float32), (1500, 1))
        ids = np.random.default_rng(0).permutation(1500)
        for metric in self._metrics():
            self._build(tmp_path / metric, vectors, ids.tolist(), metric=metric)
            shard = self._open(tmp_path / metric, metric)
            same(shard.search(vectors[:1], 5).ids.tolist(), [[0, 1, 2, 3, 4]], f"{metric}: ids at one distance")
            same(sorted(shard.search(vectors[:1], 9999).ids[0][:1500].tolist()), list(range(1500)), "all ids")

    def test_ids_keep_their_type(self, tmp_path: Path) -> None:
        """Numbers stay numbers, text that looks like a number stays text, odd characters survive."""
        vectors = np.eye(3, self.dim, dtype=np.float32)
        for n, ids in enumerate(([7, -3, 2**62], ["a", 'b"é\\\n', "c\0d"], ["007", "7", ""])):
            self._build(tmp_path / str(n), vectors, ids)
            for in_memory in (False, True):
                shard = self._open(tmp_path / str(n), in_memory=in_memory)
                same(shard.search(vectors, 1).ids[:, 0].tolist(), ids, "ids that were built")
                same(shard.id_type, "int64" if n == 0 else "string", f"type of {ids}")

    def test_rows_give_back_payloads_and_vectors(self, tmp_path: Path) -> None:
        """By row reference, in the order asked, repeats too."""
        vectors = self.vectors(1300)
        payloads = [None if n % 3 == 0 else f'{{"n": {n}}}' for n in range(1300)]
        expected = [None if n % 3 == 0 else {"n": n} for n in range(1300)]
        self._build(tmp_path, vectors, payload=pa.array(payloads, pa.string()))
        for in_memory in (False, True):
            shard = self._open(tmp_path, in_memory=in_memory)
            hits = shard.search(vectors[[5, 1250]], 20)
            same(hits.ids[:, 0].tolist(), [5, 1250], "ids nearest to their own vectors")
            for ids, rows in zip(hits.ids.tolist(), hits.rows, strict=True):
                again = rows[[1, 1, 0]]
                same(shard.payloads(rows), [expected[n] for n in ids], "payloads")
                same(shard.payloads(again), [expected[ids[n]] for n in (1, 1, 0)], "payloads, one of them twice")
                same(shard.vectors(rows), vectors[ids], "vectors")
            found = shard.find([1250, -1, 5, 1300, "5", 5])
            same((found < 0).tolist(), [False, True, False, True, True, False], "ids that are not found")
            same(shard.vectors(found[[0, 2, 5]]), vectors[[1250, 5, 5]], "vectors of ids")
            same(sorted(shard.sample(shard.rows)[0].tolist()), list(range(1300)), "sample of all rows")
            ids, sampled = shard.sample(11)
            same(len(ids), 11, "size of a sample")
            same(shard.sample(11)[0], ids, "another sample")
            same(sampled, vectors[ids], "vectors of a sample")

    def test_filter_columns_change_no_answer(self, tmp_path: Path) -> None:
        """Columns of every type, with nulls, beside the vector."""
        vectors, queries = self.vectors(300), self.vectors(4, seed=1)
        columns = {
            "a_bool": pa.array([None, True, False] * 100),
            "a_int": pa.array([None, 1, -(2**63)] * 100),
            "a_float": pa.array([None, 0.5, float("nan")] * 100),
            "a_text": pa.array([None, "", "a text that is longer than twelve bytes"] * 100),
            "a_date": pa.array([None, 1, 2] * 100, pa.date32()),
            "a_time": pa.array([None, 1, 2] * 100, pa.timestamp("us", "UTC")),
        }
        self._build(tmp_path, vectors, **columns)
        shard = self._open(tmp_path)
        same(shard.indexed_rows, 300, "indexed rows")
        _expect_exact(shard.search(queries, 10), _distances(queries, vectors, _L2), "with filters")

    def test_raw_search_finds_the_same_rows(self, tmp_path: Path) -> None:
        """The library's own search, whatever its scores, agrees on well separated rows."""
        vectors, queries = self.vectors(400), self.vectors(5, seed=2)
        for metric in self._metrics():
            self._build(tmp_path / metric, vectors, metric=metric)
            shard = self._open(tmp_path / metric, metric)
            same(shard.search_raw(queries, 5).ids, shard.search(queries, 5).ids, f"{metric}: ids of a raw search")

    def test_threads_get_the_same_answers(self, tmp_path: Path) -> None:
        """One opened shard serves several threads."""
        vectors, queries = self.vectors(1500), self.vectors(3, seed=3)
        self._build(tmp_path, vectors)
        for in_memory in (False, True):
            shard = self._open(tmp_path, in_memory=in_memory)

            def ask(_: int, shard: ShardIndex = shard) -> tuple[Any, ...]:
                hits = shard.search(queries, 6)
                return hits.ids.tolist(), shard.payloads(hits.rows[0]), shard.vectors(hits.rows[1]).tolist()

            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(ask, range(24)))
            expect(all(answer == answers[0] for answer in answers), "threads got different answers")

    def test_what_cannot_be_built_is_refused(self, tmp_path: Path) -> None:
        """No rows, a metric or vector type that it does not know, a shard that is there already."""
        vectors = np.eye(3, self.dim, dtype=np.float32)
        self._build(tmp_path / "twice", vectors)
        wrong: list[tuple[str, Float32, dict[str, Any]]] = [("none", vectors[:0], {}), ("twice", vectors, {})]
        wrong += [(metric, vectors, {"metric": metric}) for metric in set(DistanceMetric) - self.backend.metrics]
        kinds = set(get_args(VectorType)) - set(self.backend.vector_types)
        wrong += [(kind, vectors, {"vector_type": kind}) for kind in kinds]
        for name, rows, options in wrong:
            build = lambda name=name, rows=rows, options=options: self._build(tmp_path / name, rows, **options)  # noqa: E731
            refused(IndexBuildError, build, f"building {name}")

    def test_only_its_own_directory_is_written(self, tmp_path: Path) -> None:
        """No journals, locks or temporary files are left to be uploaded."""
        self._build(tmp_path, self.vectors(20))
        self._open(tmp_path).close()
        same([path.name for path in tmp_path.iterdir()], [self.backend.directory], "files of the folder")

    def test_what_is_no_shard_is_refused(self, tmp_path: Path) -> None:
        """Nothing there, or another dimension than the manifest says."""
        refused(IntegrityError, lambda: self._open(tmp_path / "nothing"), "a folder that is not there")
        self._build(tmp_path, self.vectors(20))
        refused(IntegrityError, lambda: self._open(tmp_path, dim=self.dim + 1), "another dimension")

    def test_a_closed_shard_says_so(self, tmp_path: Path) -> None:
        """Closing frees memory, may be repeated, and every later call is refused."""
        vectors = self.vectors(20)
        self._build(tmp_path, vectors)
        shard = self._open(tmp_path)
        rows = shard.search(vectors[:1], 2).rows[0]
        expect(shard.memory_bytes > 0, "an opened shard holds nothing")
        shard.close()
        shard.close()
        same(shard.memory_bytes, 0, "bytes that a closed shard holds")
        calls: tuple[Callable[[], Any], ...] = (
            lambda: shard.search(vectors[:1], 2),
            lambda: shard.search_raw(vectors[:1], 2),
            lambda: shard.payloads(rows),
            lambda: shard.vectors(rows),
            lambda: shard.sample(2),
            lambda: shard.find([1]),
        )
        for number, call in enumerate(calls):
            refused(ReaderClosedError, call, f"call {number} on a closed shard")

    def vectors(self, rows: int, *, seed: int = 0, kind: VectorType = "float32") -> Float32:
        """Random vectors, float16 numbers where asked."""
        drawn = np.random.default_rng([seed, rows]).standard_normal((rows, self.dim))
        return drawn.astype(kind).astype(np.float32)

    def _metrics(self) -> list[DistanceMetric]:
        return sorted(self.backend.metrics)

    def _build(
        self,
        folder: Path,
        vectors: Float32,
        ids: list[Any] | None = None,
        *,
        metric: DistanceMetric = _L2,
        family: IndexFamily = IndexFamily.FLAT,
        vector_type: VectorType = "float32",
        **columns: pa.Array,
    ) -> None:
        rows = {
            "id": pa.array(range(len(vectors)), pa.int64()) if ids is None else pa.array(ids),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.dim),
            "payload": pa.nulls(len(vectors), pa.string()),
        }
        self.backend.build(
            pa.table(rows | columns),
            folder,
            family=family,
            metric=metric,
            params=IndexParams(),
            vector_type=vector_type,
        )

    def _open(
        self, folder: Path, metric: DistanceMetric = _L2, *, in_memory: bool = True, dim: int | None = None
    ) -> ShardIndex:
        return self.backend.open(folder, metric=metric, dim=dim or self.dim, in_memory=in_memory)


def _distances(queries: Float32, rows: Float32, metric: DistanceMetric) -> Float64:
    """The definition in float64, shape (queries, rows)."""
    q, r = queries.astype(np.float64), rows.astype(np.float64)
    if metric is DistanceMetric.L2:
        return np.square(q[:, None, :] - r[None, :, :]).sum(axis=2)
    products = q @ r.T
    if metric is DistanceMetric.DOT_PRODUCT:
        return -products
    return 1.0 - products / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(r, axis=1)[None, :]


def _expect_exact(hits: ShardHits, truth: Float64, what: str) -> None:
    """The hits are the k nearest of rows whose id is their number, nearest first."""
    k = min(hits.rows.shape[1], truth.shape[1])
    same(hits.counts.tolist(), [k] * len(truth), f"{what}: hits")
    found = np.take_along_axis(truth, hits.ids[:, :k].astype(np.int64), axis=1)
    np.testing.assert_allclose(hits.distances[:, :k], found, atol=_TOLERANCE, rtol=_TOLERANCE, err_msg=what)
    np.testing.assert_allclose(found, np.sort(truth, axis=1)[:, :k], atol=_TOLERANCE, rtol=_TOLERANCE, err_msg=what)
    expect(all(len(set(row)) == k for row in hits.ids[:, :k].tolist()), f"{what}: an id comes twice")
