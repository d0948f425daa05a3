"""``explain`` against what a search does: shards, distances, measured recall."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.errors import QueryError
from sf_pipelines.snapshot.manifest.models import CurvePoint, Manifest, RecallRecord
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.cluster import ClusterRouting
from sf_pipelines.snapshot.routing.explicit import ExplicitRouting
from sf_pipelines.snapshot.routing.hash import HashRouting
from sf_pipelines.snapshot.routing.lsh import LshRouting
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.faces import Face, unified_reader, vector_reader
from sf_pipelines_tests.snapshots import clustered, publish, publish_by_hand
from sf_pipelines_tests.tables import exact_scores

DIM, SHARDS = 8, 5
VECTORS = clustered(60, DIM)
QUERIES = clustered(6, DIM, seed=2)
HOMES = (np.arange(len(VECTORS)) % SHARDS).astype(np.int32)
REGIONS = tuple(f"r{n}" for n in range(SHARDS))


def write(root: Path, routing: Any, metric: DistanceMetric = DistanceMetric.L2, **options: Any) -> Manifest:
    options = {"shard_of": HOMES, "backend": "sqlite-vec", "ours": True, "num_probes": 2} | options
    if metric is DistanceMetric.DOT_PRODUCT:
        options["backend"] = "lancedb"
    store = Store.open(root, create=True)
    return publish_by_hand(store, list(range(len(VECTORS))), VECTORS, routing=routing, metric=metric, **options)


def with_curve(root: Path, manifest: Manifest, probes: list[int]) -> None:
    """The same snapshot, with a curve that was measured."""
    points = tuple(
        CurvePoint(num_probes=number, recall=0.5 + number / 100, lower=0.4 + number / 100, rows_searched=0.5)
        for number in probes
    )
    assert manifest.extras is not None
    record = manifest.extras.model_copy(update={"recall": RecallRecord(k=7, min_recall=0.5, curve=points)})
    custom = manifest.custom | {"sf_pipelines": record.to_custom()}
    publish(Store.open(root), manifest.model_copy(update={"custom": custom}))


def counted(reader: Any, explained: Any) -> None:
    """Rows are the manifest's, and their share is that of the asked shards."""
    rows = [shard.vector_count for shard in reader.shard_details()]
    assert [shard.rows for shard in explained.shards] == [rows[shard.db_id] for shard in explained.shards]
    asked = sum(rows[shard.db_id] for shard in explained.shards if shard.asked)
    assert explained.rows == pytest.approx(asked / sum(rows))


@pytest.mark.parametrize("metric", DistanceMetric)
def test_clusters_are_as_far_as_their_centroids(tmp_path: Path, face: Face, metric: DistanceMetric) -> None:
    centroids = clustered(SHARDS, DIM, seed=5)
    write(tmp_path / "store", ClusterRouting(centroids, metric), metric)
    with vector_reader(face, tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        for query in QUERIES:
            true = exact_scores(query[None], reader._core.state.routing.matrix, metric)[0]
            for probes in (None, 1, 3, 99):
                explained = reader.explain(query, num_probes=probes)
                asked = [shard.db_id for shard in explained.shards if shard.asked]
                assert asked == reader.search(query, 3, num_probes=probes).shard_ids
                assert asked == reader.route_vector(query, probes)
                assert explained.num_shards == len(asked) == min(SHARDS, probes or 2)
                assert [shard.db_id for shard in explained.shards] == np.argsort(true).tolist()
                distances = [shard.distance for shard in explained.shards]
                np.testing.assert_allclose(distances, np.sort(true), rtol=1e-5, atol=1e-5)
                counted(reader, explained)


def test_hyperplanes_are_as_far_as_the_query_must_move(tmp_path: Path, face: Face) -> None:
    planes = np.random.default_rng(3).standard_normal((4, DIM)).astype(np.float32)
    write(tmp_path / "store", LshRouting(planes, SHARDS))
    unit = planes.astype(np.float64) / np.linalg.norm(planes.astype(np.float64), axis=1)[:, None]
    with vector_reader(face, tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        for query in QUERIES:
            away = unit @ query.astype(np.float64)
            nearest = np.full(SHARDS, np.inf)
            for code in range(2 ** len(planes)):
                wrong = ((code >> np.arange(len(planes))) & 1).astype(bool) != (away > 0)
                nearest[code % SHARDS] = min(nearest[code % SHARDS], np.square(away[wrong]).sum())
            explained = reader.explain(query, num_probes=3)
            assert [shard.db_id for shard in explained.shards if shard.asked] == reader.search(
                query, 3, num_probes=3
            ).shard_ids
            for shard in explained.shards:
                assert shard.distance == pytest.approx(nearest[shard.db_id], rel=1e-5, abs=1e-9)
            counted(reader, explained)


def test_recall_is_that_of_as_many_shards(tmp_path: Path, face: Face) -> None:
    manifest = write(tmp_path / "store", ClusterRouting(clustered(SHARDS, DIM), DistanceMetric.L2))
    with_curve(tmp_path / "store", manifest, [1, 2, 3, SHARDS])
    with vector_reader(face, tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        for probes, shards in ((None, 2), (1, 1), (3, 3), (99, SHARDS)):
            found = reader.explain(QUERIES[0], num_probes=probes)
            assert (found.recall, found.recall_lower) == (0.5 + shards / 100, 0.4 + shards / 100)
            assert found.recall_k == 7
        for wanted in ({"num_probes": 4}, {"shard_ids": [0, 1]}, {"shard_ids": list(range(SHARDS))}):
            found = reader.explain(QUERIES[0], **wanted)
            assert (found.recall, found.recall_lower, found.recall_k) == (None, None, None)


def test_nothing_was_measured_for_snapshots_of_others(tmp_path: Path) -> None:
    write(tmp_path / "store", ClusterRouting(clustered(SHARDS, DIM), DistanceMetric.L2), ours=False)
    with vector_reader("sync", tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        assert reader.explain(QUERIES[0]).recall is None


def test_named_shards_come_first_with_their_distances(tmp_path: Path) -> None:
    write(tmp_path / "store", ClusterRouting(clustered(SHARDS, DIM), DistanceMetric.L2))
    with vector_reader("sync", tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        order = reader.route_vector(QUERIES[0], SHARDS)
        explained = reader.explain(QUERIES[0], shard_ids=order[:2:-1])
        turns = [shard.db_id for shard in explained.shards]
        assert turns == [*order[:2:-1], *order[:3]]
        assert [shard.asked for shard in explained.shards] == [True] * 2 + [False] * 3
        assert all(shard.distance is not None for shard in explained.shards)


def test_an_expression_decides_alone(tmp_path: Path, face: Face) -> None:
    manifest = write(tmp_path / "store", CelRouting("region", {"region": "string"}, SHARDS, REGIONS))
    with_curve(tmp_path / "store", manifest, [1])
    with vector_reader(face, tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        explained = reader.explain(QUERIES[0], routing_context={"region": "r3"})
        assert [(shard.db_id, shard.distance, shard.asked) for shard in explained.shards] == [(3, None, True)]
        assert explained.recall == pytest.approx(0.51)
        assert explained.rows == pytest.approx(1 / SHARDS)
        with pytest.raises(QueryError, match="routing_context"):
            reader.explain(QUERIES[0])


def test_rows_that_named_their_shards_must_be_named(tmp_path: Path, face: Face) -> None:
    manifest = write(tmp_path / "store", ExplicitRouting(SHARDS))
    with_curve(tmp_path / "store", manifest, [1])
    with vector_reader(face, tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        explained = reader.explain(QUERIES[0], shard_ids=[4])
        assert [(shard.db_id, shard.distance, shard.asked) for shard in explained.shards] == [(4, None, True)]
        assert explained.recall is None
        with pytest.raises(QueryError, match="shard_ids"):
            reader.explain(QUERIES[0])


def test_keys_do_not_say_where_vectors_are(tmp_path: Path, face: Face) -> None:
    values = [b"v"] * len(VECTORS)
    manifest = write(tmp_path / "store", HashRouting(SHARDS), values=values, key_encoding="u64be")
    with_curve(tmp_path / "store", manifest, [SHARDS])
    with unified_reader(face, tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        explained = reader.explain(QUERIES[0])
        assert [shard.db_id for shard in explained.shards] == reader.search(QUERIES[0], 3).shard_ids
        assert (explained.num_shards, explained.rows) == (SHARDS, 1.0)
        assert explained.recall == pytest.approx(0.5 + SHARDS / 100)


def test_it_says_what_is_in_memory_and_opens_nothing(tmp_path: Path) -> None:
    write(tmp_path / "store", ClusterRouting(clustered(SHARDS, DIM), DistanceMetric.L2))
    with vector_reader("sync", tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        assert not any(shard.in_memory for shard in reader.explain(QUERIES[0]).shards)
        assert reader.health().open_shards == []
        filled = next(shard.db_id for shard in reader.shard_details() if shard.vector_count)
        reader.search(QUERIES[0], 3, shard_ids=[filled])
        held = {shard.db_id for shard in reader.explain(QUERIES[0]).shards if shard.in_memory}
        assert held == {filled}
