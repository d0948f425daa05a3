"""The unit of the data never matters: gate, answers and the choice of probes at scales from 1e-18 to 1e18.

What is true is computed here, by the rows' ids, in 80-bit floats and with none of the package's code.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sf_pipelines import BuildResult, ShardedVectorReader, WriteConfig, build_snapshot
from sf_pipelines.snapshot.gate.recall import halves
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import SampleReceipt
from sf_pipelines_tests.tables import vector_table

ROWS, DIM, SHARDS, K = 700, 8, 4, 10
PAIRS = (("l2", "lancedb"), ("cosine", "lancedb"), ("dot_product", "lancedb"), ("l2", "sqlite-vec"))


def drawn(scale: float, offset: float = 0.0, small: float = 1.0, rows: int = ROWS) -> Float32:
    """Random vectors around a point, all times a scale; every third of them times another, too."""
    rng = np.random.default_rng(7)
    # About of length 1: float32 has no room for the squares of what is longer than 3e18.
    vectors = rng.standard_normal((rows, DIM)) / np.sqrt(DIM) + offset
    vectors[::3] *= small
    return (vectors * scale).astype(np.float32)


def distances_of(vectors: Float32, query: int, metric: str) -> NDArray[np.longdouble]:
    """What all rows are ranked by for one of them, which itself is infinitely far."""
    wide = vectors.astype(np.longdouble)
    if metric == "dot_product":
        distances = -(wide * wide[query]).sum(axis=1)
    else:
        if metric == "cosine":
            wide /= np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
        distances = np.square(wide - wide[query]).sum(axis=1)
    distances[query] = np.inf
    return distances


def neighbours(vectors: Float32, query: int, metric: str) -> NDArray[np.int64]:
    """The other rows from the nearest to the furthest."""
    order = np.argsort(distances_of(vectors, query, metric), kind="stable")
    return order[order != query]


def config_of(folder: Path, vectors: Float32, metric: str, backend: str, **more: Any) -> WriteConfig:
    """A snapshot whose gate lets nearly everything pass: it is its figure that is looked at."""
    pq.write_table(vector_table(vectors), folder / "source.parquet")
    settings: dict[str, Any] = {
        "name": "scale",
        "source": str(folder / "source.parquet"),
        "store": str(folder / "store"),
        "num_dbs": SHARDS,
        "vector_spec": {
            "dim": DIM,
            "metric": metric,
            "backend": backend,
            "sharding": {"strategy": "cluster", "num_probes": 2},
        },
        "recall_gate": {"k": K, "min_recall": 0.05},
    }
    return WriteConfig.model_validate({**settings, **more})


def built(folder: Path, config: WriteConfig) -> tuple[BuildResult, list[int]]:
    """The build, and the rows that judged it."""
    result = build_snapshot(config, cache_dir=folder / "cache")
    build = Build(config, cache_dir=folder / "cache")
    ledger = build.ledger(result.run_id)
    sampled = ledger.need(SampleReceipt)
    ids = ledger.get_table(sampled.queries).column("id").to_pylist()
    return result, [ids[row] for row in halves(len(ids), disjoint=sampled.disjoint)[1]]


def served(reader: ShardedVectorReader, vectors: Float32, rows: list[int], probes: int | None) -> list[list[int]]:
    """Ids of the answers to these rows, without their own."""
    answers = reader.batch_search(vectors[rows], top_k=K + 1, num_probes=probes)
    return [
        [int(hit.id) for hit in answer.results if hit.id != row][:K] for row, answer in zip(rows, answers, strict=True)
    ]


def is_right(folder: Path, vectors: Float32, metric: str, backend: str) -> None:
    """The gate's figure is the recall by id of what is served, and all shards together give the true order."""
    config = config_of(folder, vectors, metric, backend)
    result, judging = built(folder, config)
    assert result.published
    truth = [neighbours(vectors, row, metric)[:K].tolist() for row in judging]
    # The gate asks the index of every shard, a reader scans the small ones.
    for exact_scan in (False, True):
        with ShardedVectorReader(config.store, cache_dir=folder / "cache", exact_scan=exact_scan) as reader:
            found = served(reader, vectors, judging, None)
            recall = np.mean([len(set(ids) & set(true)) / K for ids, true in zip(found, truth, strict=True)])
            assert result.recall == pytest.approx(recall, abs=1e-9), f"exact_scan {exact_scan}"
            assert served(reader, vectors, judging, SHARDS) == truth, f"exact_scan {exact_scan}"
    assert 0.2 < recall < 1, "a figure that could not be wrong"


@pytest.mark.parametrize(("metric", "backend"), PAIRS)
@pytest.mark.parametrize("scale", [1e-18, 1e-10, 1e-5, 1e9, 1e18])
def test_the_gate_tells_the_recall_whatever_the_unit(tmp_path: Path, scale: float, metric: str, backend: str) -> None:
    # Under cosine and dot_product shorter vectors than 1e-18 are refused; this one is nearly all of them above.
    vectors = drawn(scale if scale > 1e-18 or metric == "l2" else 8 * scale)
    is_right(tmp_path, vectors, metric, backend)


def is_right_but_for_ties(folder: Path, vectors: Float32, metric: str, backend: str) -> None:
    """The gate's figure lies between the recalls that take no near tie and every near tie for a neighbour.

    Vectors that are nearly parallel, or as near to each other as float32 tells, have many of them.
    """
    config = config_of(folder, vectors, metric, backend)
    result, judging = built(folder, config)
    assert result.published
    assert result.recall is not None
    with ShardedVectorReader(config.store, cache_dir=folder / "cache") as reader:
        found, whole = served(reader, vectors, judging, None), served(reader, vectors, judging, SHARDS)
    sure, possible = [], []
    for row, some, best in zip(judging, found, whole, strict=True):
        distances = distances_of(vectors, row, metric)
        truth = np.sort(distances)[:K]
        # As much as the truth itself may be wrong by: of the distance, and of what lies between near and far.
        unsure = 1e-6 * (truth[-1] - truth[0]) + 1e-12 * abs(truth[-1])
        assert (distances[best] <= truth + unsure).all(), f"row {row}: all shards do not give the nearest"
        sure.append((distances[some] < truth[-1] - unsure).sum())
        possible.append((distances[some] <= truth[-1] + unsure).sum())
    assert np.mean(sure) / K - 1e-9 <= result.recall <= np.mean(possible) / K + 1e-9


UNITS = (
    st.sampled_from(PAIRS),
    st.floats(-18, 18),
    # Far from the origin all directions are nearly the same.
    st.sampled_from([0.0, 0.5, 3.0, 100.0, 3000.0]),
    # Every third row is much shorter or longer.
    st.sampled_from([1.0, 1e-4, 1e-2, 30.0]),
)


def check_units(pair: tuple[str, str], power: float, offset: float, small: float) -> None:
    vectors = drawn(10.0**power, offset, small)
    squares = np.square(vectors.astype(np.float64)).sum(axis=1)
    # What no float32 index can tell apart, or hold, is refused: see the data contract.
    assume(squares.max() < 1e37 and (pair[0] == "l2" or squares.min() > 1e-36))
    with tempfile.TemporaryDirectory() as folder:
        is_right_but_for_ties(Path(folder), vectors, *pair)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(*UNITS)
def test_any_unit_and_any_mixture(pair: tuple[str, str], power: float, offset: float, small: float) -> None:
    check_units(pair, power, offset, small)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=80, deadline=None)
@given(*UNITS)
def test_any_unit_and_any_mixture_at_length(pair: tuple[str, str], power: float, offset: float, small: float) -> None:
    check_units(pair, power, offset, small)
