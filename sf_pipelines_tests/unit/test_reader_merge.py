"""The merge against a plain Python one."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_pipelines.snapshot.index.ranking import ShardHits
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.reader.merge import Candidates, ShardAnswer

Found = dict[tuple[int, int], list[tuple[float, Any]]]


def answers_of(found: Found, shards: int, queries: int, width: int, *, text: bool) -> list[ShardAnswer]:
    """``found[query, shard]`` lists (score, id) of a shard; places are shard numbers."""
    out = []
    for shard in range(shards):
        shape = (queries, width)
        ids = np.full(shape, None if text else 0, dtype=object if text else np.int64)
        scores, rows = np.full(shape, np.nan), np.full(shape, -1, dtype=np.int64)
        for query in range(queries):
            for slot, (score, row_id) in enumerate(sorted(found.get((query, shard), []))):
                ids[query, slot], scores[query, slot], rows[query, slot] = row_id, score, slot
        which = np.arange(queries)
        hits = ShardHits(rows, ids, scores, (rows >= 0).sum(axis=1))
        out.append(ShardAnswer(shard, which, np.full(queries, shard), hits))
    return out


def batch(queries: int) -> Float32:
    """Queries for answers that are scored already."""
    return np.zeros((queries, 8), dtype=np.float32)


def plainly(found: Found, query: int, shards: int, k: int) -> list[tuple[float, Any]]:
    """Best score of each id, sorted by score and then by id."""
    best: dict[Any, float] = {}
    for shard in range(shards):
        for score, row_id in found.get((query, shard), []):
            best[row_id] = min(score, best.get(row_id, np.inf))
    return sorted((score, row_id) for row_id, score in best.items())[:k]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), text=st.booleans(), k=st.integers(1, 7))
def test_merge_and_curve_are_those_of_plain_python(data: st.DataObject, text: bool, k: int) -> None:
    queries, shards, width = 2, 3, 4
    row_id = st.sampled_from(["", "a", "b\0", "é", "10", "9"]) if text else st.integers(-3, 3)
    hit = st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), row_id)
    one = st.lists(hit, max_size=width, unique_by=lambda pair: pair[1])
    found = {(query, shard): data.draw(one) for query in range(queries) for shard in range(shards)}
    candidates = Candidates(answers_of(found, shards, queries, width, text=text), batch(queries), shards)
    merged = candidates.merge(k).arrays
    curve = list(candidates.curve(k))
    assert len(curve) == shards
    for query in range(queries):
        for arrays, probes in [(merged, shards), *zip(curve, range(1, shards + 1), strict=True)]:
            count = arrays.counts[query]
            got = list(zip(arrays.scores[query][:count].tolist(), arrays.ids[query][:count].tolist(), strict=True))
            assert got == plainly(found, query, probes, k)
            assert np.isnan(arrays.scores[query][count:]).all()
            assert arrays.ids[query][count:].tolist() == [None] * (k - count)


def test_hits_say_where_they_come_from() -> None:
    found: Found = {(0, 0): [(0.1, 5), (0.4, 6)], (0, 1): [(0.2, 7)]}
    merged = Candidates(answers_of(found, 2, 1, 2, text=False), batch(1), 2).merge(4)
    assert merged.arrays.ids.tolist() == [[5, 7, 6, None]]
    assert merged.shards.tolist() == [[0, 1, 0, -1]]
    assert merged.rows.tolist() == [[0, 0, 1, -1]]


def test_no_shard_at_all_is_an_empty_answer() -> None:
    candidates = Candidates([], batch(2), 3)
    assert candidates.merge(2).arrays.counts.tolist() == [0, 0]
    assert [step.counts.tolist() for step in candidates.curve(2)] == [[0, 0]] * 3


def test_numbers_and_texts_are_merged_and_never_taken_for_each_other() -> None:
    answers = [
        *answers_of({(0, 0): [(0.1, 5), (0.2, 7)]}, 1, 1, 2, text=False),
        *answers_of({(0, 1): [(0.1, "5"), (0.1, "4")]}, 2, 1, 2, text=True)[1:],
    ]
    merged = Candidates(answers, batch(1), 2).merge(4)
    assert merged.arrays.ids.tolist() == [[5, "4", "5", 7]]
    assert [type(row_id) for row_id in merged.arrays.ids[0]] == [int, str, str, int]
    assert merged.shards.tolist() == [[0, 1, 1, 0]]
    assert [step.ids.tolist() for step in Candidates(answers, batch(1), 2).curve(2)] == [[[5, 7]], [[5, "4"]]]


def test_a_shard_may_hold_numbers_and_texts() -> None:
    ids = np.array([["a", 3, None]], dtype=object)
    hits = ShardHits(np.array([[0, 1, -1]]), ids, np.array([[0.5, 0.5, np.nan]]), np.array([2]))
    merged = Candidates([ShardAnswer(0, np.arange(1), np.zeros(1, dtype=np.int64), hits)], batch(1), 1).merge(3)
    assert merged.arrays.ids.tolist() == [[3, "a", None]]
