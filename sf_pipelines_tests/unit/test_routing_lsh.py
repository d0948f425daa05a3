from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.routing.lsh import LshRouting
from sf_pipelines.snapshot.testing.routing import VectorRoutingConformance
from sf_pipelines_tests.golden import snapshots

# Section 4.3 of the format.
PLANES = np.random.default_rng(42).standard_normal((3, 4)).astype(np.float32)
VECTORS = np.array(
    [[1, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 1], [0.5, -2, 0.25, 1], [0, 0, 0, 0]], dtype=np.float32
)
CODES = [1, 0, 6, 5, 7, 0]
STOCK = {
    5: [[1, 0, 3], [0, 1, 2, 4], [1, 2, 4], [0, 4, 2, 1], [2, 1, 0, 3], [0, 1, 2, 4]],
    4: [[1, 0, 3], [0, 1, 2], [2, 3, 0], [1, 0, 3], [3, 2, 1], [0, 1, 2]],
    8: [[1, 0, 3, 5], [0, 1, 2, 4], [6, 7, 4, 2], [5, 4, 7, 1], [7, 6, 5, 3], [0, 1, 2, 4]],
}


def random_planes(bits: int, dim: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal((bits, dim)).astype(np.float32)


class TestLshConforms(VectorRoutingConformance):
    def routings(self) -> Iterable[LshRouting]:
        yield LshRouting(random_planes(1, 1), 1)
        yield LshRouting(random_planes(3, 8), 5)
        yield LshRouting(random_planes(8, 48), 16)
        yield LshRouting(random_planes(20, 16), 100)
        yield LshRouting(random_planes(2, 4), 7)
        yield LshRouting(random_planes(62, 4), 3)


def test_the_table_of_the_format() -> None:
    assert np.allclose(PLANES[0], [0.3047171, -1.0399841, 0.7504512, 0.9405647], atol=1e-6)
    assert LshRouting(PLANES, 8).codes(VECTORS).tolist() == CODES
    for num_dbs in (2, 3, 5):
        assert LshRouting(PLANES, num_dbs).assign(VECTORS).tolist() == [code % num_dbs for code in CODES]
    for num_dbs, expected in STOCK.items():
        probes = LshRouting(PLANES, num_dbs).stock_probe(VECTORS, 4)
        assert [row[row >= 0].tolist() for row in probes] == expected


def cheapest(planes: Float32, vector: np.ndarray, num_dbs: int) -> np.ndarray:
    """Distance of each shard, by trying every set of flipped bits."""
    projections = planes.astype(np.float64) @ vector.astype(np.float64)
    margins = (projections / np.linalg.norm(planes.astype(np.float64), axis=1)) ** 2
    home = sum(1 << bit for bit, value in enumerate(projections) if value > 0)
    best = np.full(num_dbs, np.inf)
    for flips in range(1 << len(planes)):
        cost = sum(margins[bit] for bit in range(len(planes)) if flips >> bit & 1)
        shard = (home ^ flips) % num_dbs
        best[shard] = min(best[shard], cost)
    return best


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 9), num_dbs=st.integers(1, 40), dim=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_each_shard_is_as_far_as_its_cheapest_cell(bits: int, num_dbs: int, dim: int, seed: int) -> None:
    planes = random_planes(bits, dim, seed)
    vectors = random_planes(4, dim, seed + 1)
    order, distances = LshRouting(planes, num_dbs).probe(vectors)
    for row, vector in enumerate(vectors):
        assert np.allclose(distances[row], cheapest(planes, vector, num_dbs)[order[row]])


def test_shards_that_no_code_reaches_come_last() -> None:
    order, distances = LshRouting(PLANES[:1], 4).probe(VECTORS)
    assert (np.isinf(distances) == [False, False, True, True]).all()
    assert order[:, 2:].tolist() == [[2, 3]] * len(VECTORS)


def test_a_zero_vector_is_at_home_in_shard_0() -> None:
    order, distances = LshRouting(PLANES, 5).probe(VECTORS[-1:])
    assert order.tolist() == [[0, 1, 2, 3, 4]]
    assert distances.tolist() == [[0.0] * 5]


def test_stock_order_first_then_by_distance() -> None:
    routing, stock = LshRouting(random_planes(8, 16), 16), LshRouting(random_planes(8, 16), 16, stock_order=True)
    vectors = random_planes(50, 16, 7)
    known, distances = stock.stock_probe(vectors, 16), stock.probe(vectors)[1]
    order, ours = stock.probe(vectors)[0], routing.probe(vectors)
    assert np.array_equal(known, routing.stock_probe(vectors, 16))
    for row, first in enumerate(known):
        count = int((first >= 0).sum())
        assert count == 5
        assert order[row, :count].tolist() == first[:count].tolist()
        rest = [shard for shard in ours[0][row].tolist() if shard not in first]
        assert order[row, count:].tolist() == rest
        far = dict(zip(ours[0][row].tolist(), ours[1][row].tolist(), strict=True))
        assert distances[row].tolist() == [far[shard] for shard in order[row].tolist()]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), dim=st.integers(2, 64), nudge=st.sampled_from([0.0, 1e-9, 1e-7, 1e-5]))
def test_vectors_on_a_hyperplane_are_decided_in_float64(seed: int, dim: int, nudge: float) -> None:
    rng = np.random.default_rng(seed)
    planes = random_planes(6, dim, seed)
    inside = rng.standard_normal((30, dim))
    unit = planes[0] / np.linalg.norm(planes[0])
    inside += np.outer(nudge * rng.standard_normal(30) - inside @ unit, unit)
    vectors = (inside * 10.0 ** rng.integers(-20, 15, (30, 1))).astype(np.float32)
    exact = (planes.astype(np.float64)[None] * vectors.astype(np.float64)[:, None]).sum(axis=2)
    codes = ((exact > 0) << np.arange(6)).sum(axis=1)
    assert LshRouting(planes, 64).codes(vectors).tolist() == codes.tolist()


def test_numbers_at_the_ends_of_float32() -> None:
    planes = np.array([[1, 1], [1, -1]], dtype=np.float32)
    big, small = float(np.finfo(np.float32).max), 1e-45
    vectors = np.array([[big, big], [big, -big], [-big, big], [small, 0], [0, small]], dtype=np.float32)
    assert LshRouting(planes, 4).assign(vectors).tolist() == [1, 2, 0, 3, 1]


def test_what_the_manifest_says_and_what_is_refused() -> None:
    assert LshRouting(PLANES, 4).describe() == {"sharding_strategy": "lsh", "num_hash_bits": 3}
    with pytest.raises(ConfigError, match="lsh has 63 hyperplanes"):
        LshRouting(random_planes(63, 4), 4)


def test_a_stock_snapshot_is_routed_as_stock_did() -> None:
    planes = np.load(snapshots.DATA / snapshots.LSH / "vector_meta" / "run_id=golden-run" / "hyperplanes.npy")
    data, known = snapshots.rows(snapshots.LSH), snapshots.expected(snapshots.LSH)
    routing = LshRouting(planes, 4, stock_order=True)
    shards = routing.assign(data["vectors"]).tolist()
    assert dict(zip(data["ids"].tolist(), shards, strict=True)) == known["assignment"]
    order, _ = routing.probe(data["queries"])
    for name, probes in (("default_probes", 2), ("four_probes", 4)):
        stock = routing.stock_probe(data["queries"], probes)
        answers = known["searches"][name]["results"]
        routed = [answer["routed_shards"] for answer in answers]
        assert [sorted(row[row >= 0].tolist()) for row in stock] == [sorted(shards) for shards in routed]
        assert [row[: len(shards)].tolist() for row, shards in zip(order, routed, strict=True)] == routed
