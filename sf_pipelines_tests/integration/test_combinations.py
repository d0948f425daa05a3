"""Strategy x backend x metric x id type x quantisation: each legal pair of levels is built, gated, published, searched
and held against the format; each illegal combination is refused before any work."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sf_pipelines import ShardedVectorReader, UnifiedShardedReader, WriteConfig, build_snapshot
from sf_pipelines.snapshot.errors import ConfigError, SourceSchemaError
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.routing.protocol import VectorRouting
from sf_pipelines_tests.combinations import CHOSEN, ILLEGAL, LEGAL, Combination, covering, every_combination
from sf_pipelines_tests.format_checker.checker import assert_format
from sf_pipelines_tests.tables import exact_scores

DIM = 12
SIZES = (0, 1, 2, 255, 256, 257)
ROWS = sum(SIZES)
K = 10
# A number for each region, without routing values.
CASES = "region == 'r0' ? 0 : region == 'r1' ? 1 : region == 'r2' ? 2 : region == 'r3' ? 3 : region == 'r4' ? 4 : 5"

Reader = ShardedVectorReader | UnifiedShardedReader


def make_ids(kind: str) -> list[Any]:
    numbers = range(ROWS)
    if kind == "int64":
        return [7 * n for n in numbers]
    if kind == "string":
        return [f"row é {n}" for n in numbers]
    # Not UTF-8, so that nobody decodes them by chance.
    return [b"\xff\xfe" + n.to_bytes(2, "big") for n in numbers]


def write_rows(path: Path, one: Combination, vectors: np.ndarray) -> None:
    """A source whose columns ``shard_id`` and ``region`` give shards of the wanted sizes."""
    shard = np.repeat(np.arange(len(SIZES)), SIZES)
    order = np.random.default_rng(1).permutation(ROWS)
    shard = shard[order]
    columns = {
        "id": pa.array(make_ids(one.id_type)),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM),
        "shard_id": pa.array(shard, pa.int16()),
        "region": pa.array([f"r{n}" for n in shard]),
        "title": pa.array([f"title {n}" for n in range(ROWS)]),
        "year": pa.array([None if n % 5 == 0 else 2000 + n % 20 for n in range(ROWS)], pa.int32()),
    }
    pq.write_table(pa.table(columns), path, row_group_size=200)


def make_config(root: Path, one: Combination, **more: Any) -> WriteConfig:
    shardings: dict[str, dict[str, Any] | None] = {
        "cluster": {"strategy": "cluster"},
        "lsh": {"strategy": "lsh"},
        "explicit": {"strategy": "explicit"},
        "cel": {"strategy": "cel", "cel_expr": CASES, "cel_columns": {"region": "string"}},
        "hash": None,
        "unified-cel": {
            "strategy": "cel",
            "cel_expr": "region",
            "cel_columns": {"region": "string"},
            "routing_values": [f"r{n}" for n in range(len(SIZES))],
        },
    }
    spec = {
        "dim": DIM,
        "metric": one.metric,
        "backend": one.backend,
        "quantization": one.quantization,
        "sharding": shardings[one.strategy],
    }
    fields: dict[str, Any] = {
        "name": "combination",
        "source": str(root / "source.parquet"),
        "store": str(root / "store"),
        "num_dbs": len(SIZES),
        "payload_cols": ("title",),
        "filter_cols": ("year",),
        "vector_spec": spec,
        "recall_gate": {"k": K, "min_recall": 0.95, "query_rows": 300},
    }
    if one.unified:
        fields["key_value"] = {"key_col": "id", "value_cols": ["title", "year"]}
    return WriteConfig(**(fields | more))


def open_reader(config: WriteConfig, cache: Path) -> Reader:
    face = ShardedVectorReader if config.key_value is None else UnifiedShardedReader
    return face(config.store, cache_dir=cache)


def public_id(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def clustered_vectors() -> np.ndarray:
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((9, DIM))
    vectors = centres[rng.integers(0, 9, ROWS)] + 0.6 * rng.standard_normal((ROWS, DIM)) + 0.3
    return vectors.astype(np.float32)


def stored_form(vectors: np.ndarray, one: Combination) -> np.ndarray:
    return vectors.astype(np.float16).astype(np.float32) if one.quantization == "fp16" else vectors


@pytest.mark.slow
@pytest.mark.parametrize("one", CHOSEN, ids=lambda one: one.name)
def test_a_legal_combination_is_built_gated_published_and_searched(one: Combination, tmp_path: Path) -> None:
    vectors = clustered_vectors()
    write_rows(tmp_path / "source.parquet", one, vectors)
    config = make_config(tmp_path, one)

    result = build_snapshot(config, cache_dir=tmp_path / "cache")

    assert result.published
    assert result.rows == ROWS
    assert all(verdict.passed for verdict in result.verdicts if verdict.severity == "ERROR")
    if one.strategy in {"explicit", "cel", "unified-cel"}:
        assert [shard.rows for shard in result.shards] == list(SIZES)
    assert_format(config.store)
    with open_reader(config, tmp_path / "cache") as reader:
        stored, ids = stored_form(vectors, one), [public_id(value) for value in make_ids(one.id_type)]
        home = every_row_lies_where_it_is_said_to(reader, one, stored, vectors, ids)
        answers_are_those_of_brute_force(reader, one, stored, ids, home)
        if isinstance(reader, UnifiedShardedReader):
            every_key_gives_its_value(reader, one, home)


def every_row_lies_where_it_is_said_to(
    reader: Reader, one: Combination, stored: np.ndarray, given: np.ndarray, ids: list[Any]
) -> dict[Any, int]:
    """Lists each shard whole; the shard of each id."""
    home: dict[Any, int] = {}
    for shard in reader.shard_details():
        answer = reader.search(stored[0], top_k=ROWS + 5, shard_ids=[shard.db_id])
        assert len(answer.results) == shard.vector_count
        for hit in answer.results:
            assert hit.id not in home
            home[hit.id] = shard.db_id
    assert sorted(map(str, home)) == sorted(map(str, ids))
    assert {type(value) for value in home} == {type(value) for value in ids}
    if one.strategy in {"cluster", "lsh"}:
        assert isinstance(reader, ShardedVectorReader)
        # As they are stored, and as they were before rounding.
        for vectors in (stored, given):
            assert reader.route_batch(vectors)[:, 0].tolist() == [home[row_id] for row_id in ids]
    return home


def answers_are_those_of_brute_force(
    reader: Reader, one: Combination, stored: np.ndarray, ids: list[Any], home: dict[Any, int]
) -> None:
    metric = DistanceMetric(one.metric)
    picks = np.random.default_rng(5).choice(ROWS, 60, replace=False)
    distances = exact_scores(stored[picks], stored, metric)
    position = {row_id: place for place, row_id in enumerate(ids)}
    shard_of = np.array([home[row_id] for row_id in ids])
    own = one.strategy in {"explicit", "cel"}
    found = 0.0
    for row, pick in enumerate(picks):
        visible = shard_of == shard_of[pick] if own else np.full(ROWS, True)
        answer = reader.search(stored[pick], top_k=K, shard_ids=[int(shard_of[pick])] if own else None)
        limit = np.sort(distances[row][visible])[min(K, visible.sum()) - 1] + 1e-9
        found += sum(hit.score <= limit for hit in answer.results) / min(K, visible.sum())
        places = [position[hit.id] for hit in answer.results]
        np.testing.assert_allclose([hit.score for hit in answer.results], distances[row][places], rtol=1e-5, atol=1e-5)
        assert all(
            hit.payload == {"title": f"title {place}"} for hit, place in zip(answer.results, places, strict=True)
        )
    assert found / len(picks) >= 0.95


def every_key_gives_its_value(reader: UnifiedShardedReader, one: Combination, home: dict[Any, int]) -> None:
    for place, key in list(enumerate(make_ids(one.id_type)))[::37]:
        context = {"region": f"r{home[public_id(key)]}"} if one.strategy == "unified-cel" else None
        value = reader.get(key, routing_context=context)
        year = "null" if place % 5 == 0 else str(2000 + place % 20)
        assert value == f'{{"title":"title {place}","year":{year}}}'.encode()


@pytest.mark.parametrize("one", ILLEGAL, ids=lambda one: one.name)
def test_an_illegal_combination_is_refused_before_any_work(one: Combination, tmp_path: Path) -> None:
    write_rows(tmp_path / "source.parquet", one, clustered_vectors())

    with pytest.raises((ConfigError, SourceSchemaError), match=str(one.why_illegal)):
        build_snapshot(make_config(tmp_path, one), cache_dir=tmp_path / "cache")

    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


@pytest.mark.parametrize("metric", ["cosine", "l2", "dot_product"])
@pytest.mark.parametrize("strategy", ["cluster", "lsh", "explicit"])
def test_rows_that_are_all_equal(strategy: str, metric: str, tmp_path: Path) -> None:
    one = Combination(strategy, "lancedb", metric, "int64", "i8" if metric == "l2" else None)
    same = np.tile(np.linspace(0.1, 1, DIM, dtype=np.float32), (ROWS, 1))
    write_rows(tmp_path / "source.parquet", one, same)
    config = make_config(tmp_path, one)

    result = build_snapshot(config, cache_dir=tmp_path / "cache")

    assert result.recall == 1.0
    assert_format(config.store)
    with open_reader(config, tmp_path / "cache") as reader:
        shard = next(shard.db_id for shard in result.shards if shard.rows > K)
        hits = reader.search(same[0], top_k=K, shard_ids=[shard]).results
        assert len({hit.id for hit in hits}) == K
        assert [hit.id for hit in hits] == sorted(hit.id for hit in hits)


def test_the_chosen_combinations_hold_every_legal_pair() -> None:
    def pairs(one: Combination) -> set[tuple[Any, ...]]:
        return set(combinations(enumerate(one), 2))

    def union(many: Callable[[], list[Combination]]) -> set[tuple[Any, ...]]:
        return set[tuple[Any, ...]]().union(*(pairs(one) for one in many()))

    assert union(lambda: CHOSEN) == union(lambda: LEGAL)
    assert len(CHOSEN) < len(LEGAL) / 3
    assert len(LEGAL) + len(ILLEGAL) == len(list(every_combination()))
    assert covering(LEGAL) == CHOSEN


@pytest.mark.parametrize("strategy", ["cluster", "lsh"])
def test_rounded_vectors_near_a_boundary_are_found_where_they_were_put(strategy: str, tmp_path: Path) -> None:
    one = Combination(strategy, "lancedb", "l2", "int64", "fp16")
    # Float16 numbers lie 1/16 apart around 100, and 1 apart around 2000: rounding moves some rows across a boundary.
    vectors = clustered_vectors() + 100
    if strategy == "cluster":
        vectors[:, 0] = np.where(np.arange(ROWS) % 2, 2010, 1990)
        vectors[::3, 0] = np.random.default_rng(8).uniform(1990, 2010, len(vectors[::3]))
    write_rows(tmp_path / "source.parquet", one, vectors)
    config = make_config(tmp_path, one, num_dbs=2 if strategy == "cluster" else 4)

    build_snapshot(config, cache_dir=tmp_path / "cache")

    with ShardedVectorReader(config.store, cache_dir=tmp_path / "cache") as reader:
        answers = reader.batch_search(vectors, top_k=1, num_probes=1)
        assert [answer.results[0].id for answer in answers] == make_ids("int64")
        routing = reader._core.state.routing
        assert isinstance(routing, VectorRouting)
        moved = routing.assign(vectors) != routing.assign(stored_form(vectors, one))
        assert moved.any()
