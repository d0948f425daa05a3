"""Vector-only snapshots written by the stock implementation, read from S3 and from a copy on disk."""

from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.errors import QueryError
from sf_pipelines.snapshot.reader.reader import ShardedVectorReader
from sf_pipelines_tests.golden.conftest import Open
from sf_pipelines_tests.golden.snapshots import CEL, CLUSTER, EXPLICIT, LSH, VECTOR, expected, keys, rows

EVERYWHERE = [0, 1, 2, 3]


def results(name: str, variant: str) -> list[dict[str, Any]]:
    return expected(name)["searches"][variant]["results"]


def stored(reader: ShardedVectorReader, query: np.ndarray) -> dict[str, int]:
    """Shard of every row, as the shards themselves say."""
    return {str(hit.id): shard for shard in EVERYWHERE for hit in reader.search(query, 1000, shard_ids=[shard]).results}


@pytest.mark.parametrize("name", VECTOR)
def test_every_row_is_in_the_shard_that_stock_gave_it(opened: Open, name: str) -> None:
    assert stored(opened(name), rows(name)["queries"][0]) == expected(name)["assignment"]


@pytest.mark.parametrize("name", [*CLUSTER, LSH])
def test_vectors_are_routed_as_stock_does(opened: Open, name: str) -> None:
    reader, data = opened(name), rows(name)
    home = reader.route_batch(data["vectors"])[:, 0].tolist()
    assert dict(zip(data["ids"].tolist(), home, strict=True)) == expected(name)["assignment"]
    for variant, probes in (("default_probes", None), ("all_probes", 4), ("four_probes", 4)):
        if variant not in expected(name)["searches"]:
            continue
        for query, found in zip(data["queries"], results(name, variant), strict=True):
            ours = reader.route_vector(query, probes)
            # Stock flips one bit and so may reach too few shards; ours goes on.
            assert ours[: len(found["routed_shards"])] == found["routed_shards"]
            assert len(ours) == (probes or 2)


def test_a_context_is_routed_as_stock_does(opened: Open) -> None:
    reader, data = opened(CEL), rows(CEL)
    found = results(CEL, "by_region")
    contexts = [item["kwargs"]["routing_context"] for item in found]
    answers = reader.batch_search(data["queries"], 5, routing_context=contexts)
    for context, query, batched, item in zip(contexts, data["queries"], answers, found, strict=True):
        answer = reader.search(query, 5, routing_context=context)
        assert answer.shard_ids == item["routed_shards"] == batched.shard_ids
        # No shard of this snapshot has a trained index: stock's own scores are squared l2, which is the metric.
        assert [hit.id for hit in answer.results] == item["ids"] == [hit.id for hit in batched.results]
        np.testing.assert_allclose([hit.score for hit in answer.results], item["scores"], rtol=1e-5)
    with pytest.raises(QueryError, match="'mars', which is not among routing_values"):
        reader.search(data["queries"][0], routing_context={"region": "mars"})
    with pytest.raises(QueryError, match="an expression over region: give routing_context"):
        reader.search(data["queries"][0])


@pytest.mark.parametrize("name", VECTOR)
def test_all_shards_give_the_exact_answer_in_the_declared_metric(opened: Open, name: str) -> None:
    data, truth, types = rows(name), expected(name)["exact_top5_declared_metric"], {str(key): key for key in keys(name)}
    found = opened(name).batch_search(data["queries"], 5, shard_ids=EVERYWHERE)
    assert [[str(hit.id) for hit in answer.results] for answer in found] == [item["ids"] for item in truth]
    for answer, item in zip(found, truth, strict=True):
        np.testing.assert_allclose([hit.score for hit in answer.results], item["distance"], rtol=1e-5, atol=1e-6)
        assert answer.num_shards_queried == 4
    if name == EXPLICIT:
        assert all(hit.id == types[str(hit.id)] for answer in found for hit in answer.results)


@pytest.mark.parametrize("name", VECTOR)
def test_payloads_are_those_that_were_written(opened: Open, name: str) -> None:
    payloads = {
        row_id: payload
        for variant in expected(name)["searches"].values()
        for result in variant["results"]
        for row_id, payload in zip(result["ids"], result["payloads"], strict=True)
    }
    found = opened(name).batch_search(rows(name)["queries"], 5, shard_ids=EVERYWHERE)
    known = [hit for answer in found for hit in answer.results if hit.id in payloads]
    assert known
    assert all(hit.payload == payloads[hit.id] for hit in known)


@pytest.mark.parametrize(
    ("name", "variant", "probes"),
    [
        *(
            (name, variant, probes)
            for name in CLUSTER
            for variant, probes in (("default_probes", 2), ("all_probes", 4))
        ),
        (LSH, "default_probes", 2),
        (LSH, "four_probes", 4),
    ],
)
def test_stock_style_is_what_stock_answered(opened: Open, name: str, variant: str, probes: int) -> None:
    found = opened(name).stock_style(rows(name)["queries"], 5, probes)
    assert found.ids.tolist() == [result["ids"] for result in results(name, variant)]
    np.testing.assert_allclose(found.scores, [result["scores"] for result in results(name, variant)], rtol=1e-5)


@pytest.mark.parametrize(("name", "variant"), [(CEL, "by_region"), (EXPLICIT, "one_shard")])
def test_stock_style_in_a_named_shard(opened: Open, name: str, variant: str) -> None:
    wanted = results(name, variant)
    homes = np.array([item.get("routed_shards", item["kwargs"].get("shard_ids"))[0] for item in wanted], dtype=np.int32)
    found = opened(name).stock_style(rows(name)["queries"], 5, 1, shard_of=homes)
    assert found.ids.tolist() == [result["ids"] for result in wanted]
    np.testing.assert_allclose(found.scores, [result["scores"] for result in wanted], rtol=1e-5)


def test_an_explicit_snapshot_needs_shard_ids(opened: Open) -> None:
    with pytest.raises(QueryError, match="give shard_ids"):
        opened(EXPLICIT).search(rows(EXPLICIT)["queries"][0])


@pytest.mark.parametrize("name", VECTOR)
def test_the_snapshot_is_described(opened: Open, name: str) -> None:
    reader, answers = opened(name), expected(name)
    info, vector = reader.snapshot_info(), answers["custom"]["vector"]
    assert (info.run_id, info.num_dbs, info.dim, info.metric) == ("golden-run", 4, 16, vector["metric"])
    assert (info.sharding, info.num_probes) == (vector["sharding_strategy"], vector["num_probes"])
    assert (info.kind, info.backend, info.key_encoding, info.total_vectors) == ("vector", None, None, 300)
    assert info.cel_columns == vector.get("cel_columns", {})
    listed = {row["db_id"]: row for row in answers["shards"]}
    for shard in reader.shard_details():
        assert shard.vector_count == listed[shard.db_id]["row_count"]
        assert shard.checkpoint_id == listed[shard.db_id]["checkpoint_id"]
    assert reader.health().status == "healthy"
    assert reader.health(staleness_threshold=1).status == "degraded"
