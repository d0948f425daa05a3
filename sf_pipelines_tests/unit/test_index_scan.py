"""Scans in memory: rough candidates miss nothing, and the merge of several shards is that of brute force."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_pipelines.snapshot.index import scan as scan_module
from sf_pipelines.snapshot.index.scan import MemoryScan, _best_keys, products, rows_of_piece, scan_all
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, pair_distances
from sf_pipelines.snapshot.reader.merge import Candidates, Merged, ShardAnswer

KINDS = ("normal", "unit", "equal", "few", "huge", "tiny", "mixed", "far", "repeated")
SIZES = (0, 1, 2, 30, 255, 257, 511, 513, 600)


def drawn(rng: np.random.Generator, kind: str, rows: int, dim: int) -> Float32:
    """Vectors that are hard in some way."""
    out = rng.standard_normal((rows, dim))
    if kind == "unit":
        out /= np.linalg.norm(out, axis=1, keepdims=True)
    elif kind == "equal":
        out[:] = 1.5
    elif kind == "few":
        out = rng.integers(-1, 2, (rows, dim)).astype(float)
    elif kind == "huge":
        out *= 10.0 ** rng.choice([15, 18, 18.5, 30, 37])
    elif kind == "tiny":
        out *= 10.0 ** rng.choice([-10, -18, -22, -30, -36, -40])
    elif kind == "mixed":
        out *= 10.0 ** rng.integers(-40, 37, (rows, 1))
    elif kind == "far":
        out = 1000 + out * 0.01
    elif kind == "repeated" and rows:
        out = out[rng.integers(0, max(1, rows // 8), rows)]
    return np.clip(out, -3e38, 3e38).astype(np.float32)


def scan_of(vectors: Float32, ids: list[Any], metric: DistanceMetric) -> MemoryScan:
    text = bool(ids) and isinstance(ids[0], str)
    return MemoryScan(pa.array(ids, pa.string() if text else pa.int64()), np.arange(len(ids)), vectors, metric)


def answer(
    scans: list[MemoryScan], plan: np.ndarray, queries: Float32, k: int, *, unique: bool, pool: Any = None
) -> Candidates:
    """What a reader makes of scans that the plan, shape (n, places), names."""
    asked = [np.nonzero(plan == shard) for shard in range(len(scans))]
    found = scan_all(queries, [(scan, which) for scan, (which, _) in zip(scans, asked, strict=True)], k, pool)
    answers = [ShardAnswer(n, asked[n][0], asked[n][1], near) for n, near in enumerate(found)]
    return Candidates(answers, queries, plan.shape[1], unique=unique)


def brute(scans: list[MemoryScan], shards: list[int], query: Float32, k: int) -> list[tuple[float, Any]]:
    """Best score of each id over these shards, by score and then by id."""
    best: dict[Any, float] = {}
    for shard in shards:
        scan = scans[shard]
        scores = pair_distances(np.repeat(query[None], len(scan.rows), axis=0), scan.vectors, scan.metric)
        for row_id, score in zip(pa.array(scan.ids).to_pylist(), scores.tolist(), strict=True):
            best[row_id] = min(score, best.get(row_id, np.inf))
    return sorted((score, row_id) for row_id, score in best.items())[:k]


def hits(merged: Merged, query: int) -> list[tuple[float, Any]]:
    count = merged.arrays.counts[query]
    scores, ids = merged.arrays.scores[query][:count], merged.arrays.ids[query][:count]
    return list(zip(scores.tolist(), ids.tolist(), strict=True))


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(KINDS),
    metric=st.sampled_from(DistanceMetric),
    dim=st.sampled_from([1, 2, 8, 17, 384]),
    n=st.sampled_from([1, 2, 40]),
    k=st.sampled_from([1, 3, 10, 60, 1000]),
    text=st.booleans(),
    unique=st.booleans(),
)
def test_answers_of_several_shards_are_those_of_brute_force(
    seed: int, kind: str, metric: DistanceMetric, dim: int, n: int, k: int, text: bool, unique: bool
) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.choice(SIZES, 3)
    total = int(sizes.sum())
    vectors, queries = drawn(rng, kind, total, dim), drawn(rng, kind, n, dim)
    queries[~queries.any(axis=1)] = 1
    numbers = rng.permutation(3 * total)[:total] if unique else rng.integers(0, total // 4 + 1, total)
    ids = [str(one) for one in numbers] if text else numbers.tolist()
    ends = np.cumsum(sizes)
    scans = [scan_of(vectors[a:b], ids[a:b], metric) for a, b in zip(ends - sizes, ends, strict=True)]
    plan = np.stack([rng.permutation(3)[:2] for _ in range(n)])
    found = answer(scans, plan, queries, k, unique=unique)
    merged, curve = found.merge(k), list(found.curve(k))
    for query in range(min(n, 3)):
        expected = brute(scans, plan[query].tolist(), queries[query], k)
        assert hits(merged, query) == expected
        assert hits(Merged(curve[1], merged.shards, merged.rows), query) == expected
        first = brute(scans, plan[query, :1].tolist(), queries[query], k)
        assert hits(Merged(curve[0], merged.shards, merged.rows), query) == first
        alone = answer(scans, plan[query : query + 1], queries[query : query + 1], k, unique=unique)
        assert hits(alone.merge(k), 0) == expected


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 3000),
    n=st.integers(1, 4),
    k=st.integers(1, 200),
    values=st.sampled_from([2, 50, 10**6]),
)
def test_best_of_blocks_never_exceed_the_best(seed: int, rows: int, n: int, k: int, values: int) -> None:
    k = min(k, rows)
    keys = np.random.default_rng(seed).integers(0, values, (rows, n)).astype(np.float32)
    best = np.sort(_best_keys(keys, k), axis=1)
    truth = np.sort(keys, axis=0)[-k:].T
    assert best.shape == (n, k)
    assert (best <= truth).all()
    assert (_best_keys(keys, k)[:, 0] == best[:, 0]).all()
    assert (best[:, -1] == truth[:, -1]).all()


def test_few_rows_are_candidates_and_fewer_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    scans = [
        scan_of(drawn(rng, "normal", 5000, 64), list(range(5000 * n, 5000 * (n + 1))), DistanceMetric.COSINE)
        for n in range(4)
    ]
    queries = drawn(rng, "normal", 20, 64)
    plan = np.tile(np.arange(4), (20, 1))
    near = [scan.candidates(queries, 10) for scan in scans]
    assert all(20 * 10 <= len(one.query) < 20 * 13 for one in near)
    scored: list[int] = []
    plainly = scan_module.pair_distances

    def counting(queries: Float32, rows: Float32, metric: DistanceMetric) -> Any:
        scored.append(len(rows))
        return plainly(queries, rows, metric)

    monkeypatch.setattr(scan_module, "pair_distances", counting)
    pruned = answer(scans, plan, queries, 10, unique=True).merge(10).arrays
    assert 20 * 10 <= sum(scored) < 20 * 13
    scored.clear()
    every = answer(scans, plan, queries, 10, unique=False).merge(10).arrays
    assert sum(scored) == sum(len(one.query) for one in near)
    assert pruned.ids.tolist() == every.ids.tolist()


@pytest.mark.parametrize("text", [False, True])
def test_ties_between_shards_are_broken_by_id(text: bool) -> None:
    vectors = np.tile(np.linspace(1, 2, 8, dtype=np.float32), (900, 1))
    order = np.random.default_rng(0).permutation(1800)
    ids = [str(one) for one in order] if text else order.tolist()
    scans = [scan_of(vectors, part, DistanceMetric.COSINE) for part in (ids[:900], ids[900:])]
    for n in (1, 50):
        merged = answer(scans, np.tile([1, 0], (n, 1)), vectors[:n], 5, unique=True).merge(5)
        assert merged.arrays.ids.tolist() == [sorted(ids)[:5]] * n


def test_equal_rows_do_not_fill_the_memory() -> None:
    vectors = np.ones((3000, 4), dtype=np.float32)
    near = scan_of(vectors, list(range(3000)), DistanceMetric.L2).candidates(vectors[:200], 5)
    assert len(near.query) == 200 * 5
    assert near.position.reshape(200, 5).tolist() == [[0, 1, 2, 3, 4]] * 200


@pytest.mark.parametrize("n", [1, 2, 40, 300])
def test_products_are_the_same_with_helpers(n: int) -> None:
    rng = np.random.default_rng(0)
    pairs = [(drawn(rng, "normal", rows, 384), drawn(rng, "normal", n, 384)) for rows in (0, 1, 17, 3001)]
    with ThreadPoolExecutor(2) as pool:
        for (vectors, queries), alone, helped in zip(pairs, products(pairs), products(pairs, pool), strict=True):
            np.testing.assert_allclose(alone, vectors @ queries.T, atol=1e-3)
            np.testing.assert_allclose(helped, vectors @ queries.T, atol=1e-3)


def test_only_products_that_blas_leaves_to_one_core_are_cut() -> None:
    assert [rows_of_piece(384, n) for n in (1, 2, 40, 300)] == [128, 128, 17, 0]


def test_a_pool_without_a_free_thread_holds_nothing_up() -> None:
    rng = np.random.default_rng(0)
    vectors, queries = drawn(rng, "normal", 9000, 384), drawn(rng, "normal", 1, 384)
    pool = ThreadPoolExecutor(1)
    # The only thread of the pool asks it for help itself.
    found = pool.submit(lambda: products([(vectors, queries)], pool)[0]).result(timeout=60)
    np.testing.assert_allclose(found, vectors @ queries.T, atol=1e-3)
    pool.shutdown()
