"""From S3 to S3 on every engine: each row in the same shard as in process, and a snapshot that serves."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sf_pipelines import UnifiedShardedReader, build_snapshot
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.metric import DistanceMetric, Float32
from sf_pipelines.snapshot.operations.verify import verify_snapshot
from sf_pipelines.snapshot.routing import needs_training
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.run.receipts import RoutedShard, RouteReceipt
from sf_pipelines.snapshot.run.tasks import Engine
from sf_pipelines_tests.conftest import make_bucket
from sf_pipelines_tests.engines import misbehaving
from sf_pipelines_tests.engines.conftest import Opener
from sf_pipelines_tests.engines.lake import ENGINES, KINDS, RANGES, ROWS, TIERS, Lake, answers
from sf_pipelines_tests.tables import exact_distances

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lake(moto_options: S3Options, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    make_bucket(moto_options, bucket)
    return Lake(bucket, moto_options, tmp_path_factory.mktemp("orders"))


@pytest.fixture(scope="module")
def vectors(lake: Lake) -> Float32:
    return lake.fill()


@pytest.fixture(scope="module")
def wanted(lake: Lake, vectors: Float32) -> dict[str, tuple[RoutedShard, ...]]:
    """What this process routes to each shard, all rows in one range."""
    found: dict[str, tuple[RoutedShard, ...]] = {}
    for kind in KINDS:
        with Build(lake.config(kind, f"alone-{kind}")) as build:
            run_id = stages.scan(build).run_id
            stages.sample(build, run_id)
            if needs_training(build.config.sharding):
                stages.train(build, run_id)
            route = stages.route(build, run_id)
            assert len(route.ranges) == 1
            found[kind] = route.shards
    return found


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    opener: Opener = request.getfixturevalue(f"{request.param}_engine")
    with opener() as opened:
        yield opened


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_in_each_shard_and_it_serves(
    engine: Engine,
    kind: str,
    lake: Lake,
    vectors: Float32,
    wanted: dict[str, tuple[RoutedShard, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The digest of a shard's routed rows covers ids and vectors: equal digests are the same rows."""
    monkeypatch.setattr(misbehaving.CUTTER, "_RANGE_BYTES", misbehaving.RANGE_BYTES)
    config = lake.config(kind, f"{engine.name}-{kind}")
    result = build_snapshot(config, engine=engine, cache_dir=tmp_path / "cache")

    with Build(config) as build:
        route = build.ledger(result.run_id).need(RouteReceipt)
        pointer = read_pointer(build.store).pointer
    assert len(route.ranges) == RANGES
    assert route.shards == wanted[kind]
    assert [(shard.rows, shard.rows_digest) for shard in result.shards] == [
        (shard.rows, shard.digest) for shard in wanted[kind]
    ]
    assert all(shard.rows for shard in result.shards)
    assert result.published
    assert pointer is not None
    assert pointer.run_id == result.run_id
    assert verify_snapshot(config.store, s3=lake.s3).passed
    with lake.reader(config, tmp_path / "reader") as reader:
        assert [[row for row, _ in best] for best in answers(reader, vectors)] == _nearest(vectors)
        if isinstance(reader, UnifiedShardedReader):
            assert _values(reader, kind) == {n: f'{{"title":"row {n}"}}'.encode() for n in range(ROWS)}


def _nearest(vectors: Float32) -> list[list[int]]:
    distances = exact_distances(vectors, vectors, DistanceMetric.COSINE)
    return np.argsort(distances, axis=1, kind="stable")[:, :3].tolist()


def _values(reader: UnifiedShardedReader, kind: str) -> dict[Any, bytes | None]:
    """Of all keys, asked for as each kind wants it."""
    if kind == "hash":
        return reader.multi_get(range(ROWS))
    found: dict[Any, bytes | None] = {}
    for place, tier in enumerate(TIERS):
        found |= reader.multi_get(range(place, ROWS, len(TIERS)), routing_context={"tier": tier})
    return found
