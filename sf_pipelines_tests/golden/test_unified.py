"""Unified snapshots written by the stock implementation, read from S3 and from a copy on disk."""

from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.errors import QueryError, SnapshotKindError
from sf_pipelines.snapshot.reader.reader import ShardedVectorReader, UnifiedShardedReader
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.golden.conftest import Open
from sf_pipelines_tests.golden.snapshots import (
    CLUSTER,
    UNIFIED,
    UNIFIED_CEL,
    UNIFIED_HASH,
    expected,
    fill,
    keys,
    rows,
)

REGIONS = ("ap", "eu", "sa", "us")


def as_key(name: str, text: str) -> Any:
    return int(text) if expected(name)["build_meta"]["key_encoding"] == "u64be" else text


@pytest.mark.parametrize("name", UNIFIED_HASH)
def test_keys_are_routed_and_found_as_stock_does(opened: Open, name: str) -> None:
    reader, answers = opened(name), expected(name)
    assert {str(key): reader.route_key(key) for key in keys(name)} == answers["assignment"]
    asked = {as_key(name, text): item for text, item in answers["kv"].items()}
    found = reader.multi_get(asked)
    for key, item in asked.items():
        value = reader.get(key)
        assert reader.route_key(key) == item["shard"]
        assert found[key] == value == (None if item["value"] is None else item["value"].encode())
    assert None in found.values()
    everything = reader.multi_get(keys(name))
    assert len(everything) == 300
    assert None not in everything.values()


def test_keys_of_a_cel_snapshot_are_found_with_their_context(opened: Open) -> None:
    reader, answers = opened(UNIFIED_CEL), expected(UNIFIED_CEL)
    for text, item in answers["kv"].items():
        if item["value"] is None:
            continue
        context = {"region": REGIONS[item["shard"]]}
        assert reader.route_key(int(text), context) == item["shard"] == answers["assignment"][text]
        assert reader.get(int(text), routing_context=context) == item["value"].encode()
        elsewhere = {"region": REGIONS[item["shard"] - 1]}
        assert reader.multi_get([int(text)], routing_context=elsewhere) == {int(text): None}
    by_shard = {shard: [int(k) for k, at in answers["assignment"].items() if at == shard] for shard in range(4)}
    for shard, members in by_shard.items():
        assert None not in reader.multi_get(members, routing_context={"region": REGIONS[shard]}).values()
    with pytest.raises(QueryError, match="not among routing_values"):
        reader.get(0, routing_context={"region": "mars"})
    with pytest.raises(QueryError, match="an expression over region: give routing_context"):
        reader.get(0)


@pytest.mark.parametrize("name", UNIFIED)
def test_every_row_is_in_the_shard_that_stock_gave_it(opened: Open, name: str) -> None:
    reader, query = opened(name), rows(name)["queries"][0]
    found = {str(hit.id): shard for shard in range(4) for hit in reader.search(query, 1000, shard_ids=[shard]).results}
    assert found == expected(name)["assignment"]


@pytest.mark.parametrize("name", UNIFIED)
def test_all_shards_give_the_exact_answer_in_the_declared_metric(opened: Open, name: str) -> None:
    data, truth, types = rows(name), expected(name)["exact_top5_declared_metric"], {str(key): key for key in keys(name)}
    found = opened(name).batch_search(data["queries"], 5)
    assert [[hit.id for hit in answer.results] for answer in found] == [[types[i] for i in t["ids"]] for t in truth]
    for answer, item in zip(found, truth, strict=True):
        # Stock keeps float32 vectors, the truth is of float64: cosine of near vectors differs in the 7th digit.
        np.testing.assert_allclose([hit.score for hit in answer.results], item["distance"], rtol=1e-5, atol=1e-6)
        assert answer.shard_ids == [0, 1, 2, 3]


@pytest.mark.parametrize("name", UNIFIED)
def test_searches_and_payloads_are_those_of_stock(opened: Open, name: str) -> None:
    reader, queries = opened(name), rows(name)["queries"]
    for variant in expected(name)["searches"].values():
        for query, item in zip(queries, variant["results"], strict=True):
            answer = reader.search(query, 5, **item["kwargs"])
            assert [hit.id for hit in answer.results] == item["ids"]
            assert [hit.payload for hit in answer.results] == item["payloads"]
            assert answer.num_shards_queried == item["num_shards_queried"]


@pytest.mark.parametrize("name", UNIFIED)
def test_stock_style_is_what_stock_answered(opened: Open, name: str) -> None:
    wanted = expected(name)["searches"]["all_shards"]["results"]
    found = opened(name).stock_style(rows(name)["queries"], 5, 4)
    assert found.ids.tolist() == [result["ids"] for result in wanted]
    np.testing.assert_allclose(found.scores, [result["scores"] for result in wanted], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", UNIFIED)
def test_the_snapshot_is_described(opened: Open, name: str) -> None:
    reader, vector = opened(name), expected(name)["custom"]["vector"]
    info, meta = reader.snapshot_info(), reader.vector_meta
    assert (info.kind, info.sharding, info.num_probes, info.total_vectors) == (
        "unified",
        expected(name)["build_meta"]["sharding"]["strategy"],
        4,
        300,
    )
    assert info.key_encoding == expected(name)["build_meta"]["key_encoding"]
    assert (meta.dim, meta.metric, meta.backend, meta.kv_backend) == (
        16,
        vector["metric"],
        vector["backend"],
        vector["kv_backend"],
    )
    assert meta.index_params == vector.get("index_params", {})


def test_the_wrong_reader_names_the_right_one(tmp_path) -> None:
    for name, face, message in (
        (CLUSTER[0], UnifiedShardedReader, "vector-only snapshot; open it with ShardedVectorReader"),
        (UNIFIED_CEL, ShardedVectorReader, "open it with UnifiedShardedReader"),
    ):
        fill(Store.open(tmp_path / name, create=True), name)
        with pytest.raises(SnapshotKindError, match=message):
            face(tmp_path / name, cache_dir=tmp_path / "cache")
