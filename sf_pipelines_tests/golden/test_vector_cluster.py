"""Snapshots written by the stock implementation, read from S3 and from a copy on disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.reader.sync import ShardedVectorReader
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.conftest import make_bucket

DATA = Path(__file__).parent / "data"
NAMES = ("vector-lancedb-cluster-cosine", "vector-lancedb-cluster-cosine-fp16")


@pytest.fixture(scope="module")
def golden_bucket(moto_options: S3Options) -> str:
    """The bucket that the golden manifests name."""
    make_bucket(moto_options, "golden")
    for name in NAMES:
        store = Store.open(f"s3://golden/{name}", moto_options)
        for item in expected(name)["objects"]:
            key = item["key"].removeprefix(f"{name}/")
            store.put(key, (DATA / item["key"]).read_bytes(), content_type=item["content_type"])
    return "golden"


def expected(name: str) -> dict[str, Any]:
    return json.loads((DATA / name / "expected.json").read_text())


@pytest.fixture(params=["s3", "disk"])
def place(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def reader(
    place: str, name: str, golden_bucket: str, moto_options: S3Options, tmp_path: Path
) -> Iterator[ShardedVectorReader]:
    if place == "s3":
        root, options = f"s3://{golden_bucket}/{name}", moto_options
    else:
        root, options = tmp_path / "copied here", None
        store = Store.open(root, create=True)
        for item in expected(name)["objects"]:
            store.put(item["key"].removeprefix(f"{name}/"), (DATA / item["key"]).read_bytes())
    with ShardedVectorReader(root, s3=options, cache_dir=tmp_path / "cache") as found:
        yield found


def test_routing_is_that_of_stock(name: str, reader: ShardedVectorReader) -> None:
    data, answers = np.load(DATA / name / "data.npz"), expected(name)
    home = reader.route_batch(data["vectors"])[:, 0]
    assert dict(zip(data["ids"].tolist(), home.tolist(), strict=True)) == answers["assignment"]
    for variant, probes in (("default_probes", None), ("all_probes", 4)):
        for query, search in zip(data["queries"], answers["searches"][variant]["results"], strict=True):
            assert reader.route_vector(query, probes) == search["routed_shards"]


def test_all_shards_give_the_exact_answer_in_the_declared_metric(name: str, reader: ShardedVectorReader) -> None:
    data, truth = np.load(DATA / name / "data.npz"), expected(name)["exact_top5_declared_metric"]
    found = reader.batch_search(data["queries"], 5, num_probes=4)
    assert [[hit.id for hit in answer.results] for answer in found] == [item["ids"] for item in truth]
    for answer, item in zip(found, truth, strict=True):
        np.testing.assert_allclose([hit.score for hit in answer.results], item["distance"], rtol=1e-6, atol=1e-6)
        assert answer.num_shards_queried == 4


def test_payloads_are_those_that_were_written(name: str, reader: ShardedVectorReader) -> None:
    data, answers = np.load(DATA / name / "data.npz"), expected(name)["searches"]
    payloads = {
        row_id: payload
        for variant in answers.values()
        for result in variant["results"]
        for row_id, payload in zip(result["ids"], result["payloads"], strict=True)
    }
    hits = [hit for answer in reader.batch_search(data["queries"], 5) for hit in answer.results]
    known = [hit for hit in hits if hit.id in payloads]
    assert known
    assert all(hit.payload == payloads[hit.id] for hit in known)


def test_stock_style_is_what_stock_answered(name: str, reader: ShardedVectorReader) -> None:
    data, answers = np.load(DATA / name / "data.npz"), expected(name)["searches"]
    for variant, probes in (("default_probes", 2), ("all_probes", 4)):
        found = reader.stock_style(data["queries"], 5, probes)
        results = answers[variant]["results"]
        assert found.ids.tolist() == [result["ids"] for result in results]
        np.testing.assert_allclose(found.scores, [result["scores"] for result in results], rtol=1e-5)


def test_the_snapshot_is_described(name: str, reader: ShardedVectorReader) -> None:
    answers = expected(name)
    info = reader.snapshot_info()
    assert (info.run_id, info.num_dbs, info.dim, info.metric) == ("golden-run", 4, 16, "cosine")
    assert (info.sharding, info.num_probes, info.total_vectors) == ("cluster", 2, 300)
    rows = {row["db_id"]: row for row in answers["shards"]}
    for shard in reader.shard_details():
        assert shard.vector_count == rows[shard.db_id]["row_count"]
        assert shard.checkpoint_id == rows[shard.db_id]["checkpoint_id"]
    assert reader.health().status == "healthy"
    assert reader.health(staleness_threshold=1).status == "degraded"
