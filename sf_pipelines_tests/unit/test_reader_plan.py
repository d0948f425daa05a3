"""Validation of queries and options, and which shards are asked."""

from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.errors import QueryError
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.reader.plan import as_queries, asked_shards, by_shard, named_shards, positive, probes_of


def test_each_shard_is_asked_once_with_all_queries_that_want_it() -> None:
    plan = np.array([[2, 0], [0, 1], [2, 1]], dtype=np.int32)
    asked = {shard: (queries.tolist(), places.tolist()) for shard, queries, places in by_shard(plan)}
    assert asked == {0: ([0, 1], [1, 0]), 1: ([1, 2], [1, 1]), 2: ([0, 2], [0, 0])}
    assert list(by_shard(np.empty((0, 2), dtype=np.int32))) == []


def test_places_that_stay_empty_ask_nobody() -> None:
    plan = np.array([[2, -1], [0, 2]], dtype=np.int32)
    asked = {shard: (queries.tolist(), places.tolist()) for shard, queries, places in by_shard(plan)}
    assert asked == {0: ([1], [0]), 2: ([0, 1], [0, 1])}
    assert asked_shards(plan) == [[2], [0, 2]]


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([[1.0, 2.0]], r"must have 3 numbers \(got 2\)"),
        ([[[1.0, 2.0, 3.0]]], r"must have 3 numbers \(got 1x3\)"),
        ([1.0, 2.0, 3.0], "must be rows of 3 numbers, not one row; search takes a single query"),
        ([1.0, 2.0], r"must have 3 numbers \(got a single number\)"),
        ([[1.0, np.nan, 0.0]], "query 0 holds NaN"),
        ([[1.0, 0, 0], [np.inf, 0, 0]], "query 1 holds NaN, infinity"),
        ([[1e300, 0, 0]], "beyond float32"),
        ([[1.0, 0, 0], [0.0, 0, 0]], "query 1 is zero"),
        ([["a", "b", "c"]], "must be numbers"),
        ([[True, False, True]], "must be numbers, not bool"),
        ([[1j, 0, 0]], "must be numbers, not complex"),
        ([[1.0, 2.0], [1.0]], "no table of numbers with 3 columns"),
        ([[1.0, None, 2.0]], "must be numbers, not object"),
    ],
)
def test_wrong_queries_are_refused(queries: Any, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        as_queries(queries, 3, DistanceMetric.COSINE)


def test_numbers_of_any_kind_become_float32() -> None:
    assert as_queries([[1, 2, 3]], 3, DistanceMetric.COSINE).dtype == np.float32
    assert as_queries(np.ones((2, 3), dtype=np.float16), 3, DistanceMetric.L2).tolist() == [[1, 1, 1]] * 2
    assert as_queries([], 3, DistanceMetric.L2).shape == (0, 3)
    assert as_queries([[0, 0, 0]], 3, DistanceMetric.DOT_PRODUCT).shape == (1, 3)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
def test_counts_are_whole_numbers_of_at_least_one(value: Any) -> None:
    with pytest.raises(QueryError, match="top_k must be a whole number of at least 1"):
        positive(value, "top_k")


def test_probes_default_to_the_snapshots_and_stop_at_all() -> None:
    assert probes_of(None, 2, 8) == 2
    assert probes_of(None, 20, 8) == 8
    assert probes_of(99, 2, 8) == 8
    assert probes_of(np.int64(3), 2, 8) == 3  # pyright: ignore[reportArgumentType]
    with pytest.raises(QueryError, match="num_probes"):
        probes_of(0, 2, 8)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([4], "names 4; shards are 0 to 3"),
        ([-1], "names -1"),
        ([1, 1], "twice"),
        ([], "is empty"),
        (["1"], "names '1'"),
    ],
)
def test_named_shards_are_known_and_distinct(shards: list[Any], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        named_shards(shards, 4, 1)


def test_named_shards_are_asked_by_every_query() -> None:
    assert named_shards([3, 0], 4, 2).tolist() == [[3, 0], [3, 0]]
