"""The reader of unified snapshots: keys of every type, both backends, damage, closing."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.errors import (
    CountMismatchError,
    DigestMismatchError,
    IntegrityError,
    NoShardError,
    QueryError,
    ReaderClosedError,
    SnapshotKindError,
)
from sf_pipelines.snapshot.index.key_value import KeyValueShard
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.reader.reader import ShardedVectorReader, UnifiedShardedReader, open_reader
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.hash import HashRouting, hash_key
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.snapshots import brute_force, clustered, publish, publish_by_hand

DIM, SHARDS, ROWS = 8, 4, 120
VECTORS = clustered(ROWS, DIM)
QUERIES = clustered(7, DIM) + np.float32(0.1)
INTS = list(range(ROWS))
TEXTS = [f"k{at}" for at in range(ROWS)]
BYTES = [bytes([at, 0xFF, 0]) for at in range(ROWS)]
VALUES = [f"value {at}".encode() if at else b"" for at in range(ROWS)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True)


@pytest.fixture(params=["lancedb", "sqlite-vec"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def write(store: Store, keys: list[Any] = INTS, encoding: str = "u64be", **options: Any) -> Any:
    options = {
        "routing": HashRouting(SHARDS),
        "values": VALUES,
        "key_encoding": encoding,
        "metric": DistanceMetric.L2,
        "backend": "sqlite-vec",
        "ours": True,
    } | options
    return publish_by_hand(store, keys, VECTORS, **options)


def opened(store: Store, tmp_path: Path, **options: Any) -> UnifiedShardedReader:
    assert store.local_root is not None
    return UnifiedShardedReader(store.local_root, cache_dir=tmp_path / "cache", **options)


@pytest.mark.parametrize(
    ("keys", "encoding"), [(INTS, "u64be"), (INTS, "u32be"), (TEXTS, "utf8"), (TEXTS, "raw"), (BYTES, "raw")]
)
def test_every_key_is_found_and_no_other(
    store: Store, tmp_path: Path, backend: str, keys: list[Any], encoding: str
) -> None:
    write(store, keys, encoding, backend=backend)
    absent = 10_000 if encoding in {"u64be", "u32be"} else "absent"
    with opened(store, tmp_path) as reader:
        found = reader.multi_get([*keys, absent])
        assert list(found) == [*keys, absent]
        assert list(found.values()) == [*VALUES, None]
        for key, value in list(zip(keys, VALUES, strict=True))[:9]:
            assert reader.get(key) == value
            assert reader.route_key(key) == hash_key(key) % SHARDS
        assert reader.get(absent) is None
        assert reader.multi_get([]) == {}
        assert reader.multi_get(iter(keys[:1])) == {keys[0]: VALUES[0]}
        assert reader.snapshot_info().key_encoding == encoding


def test_a_text_is_its_utf8_and_numbers_may_be_numpys(store: Store, tmp_path: Path) -> None:
    keys = ["é", *TEXTS[1:]]
    write(store, keys, "utf8")
    with opened(store, tmp_path) as reader:
        assert reader.get("é") == reader.get("é".encode()) == VALUES[0]
        assert reader.multi_get(["é", "é".encode(), "k5"]) == {"é": b"", "é".encode(): b"", "k5": b"value 5"}
    write(store)
    with opened(store, tmp_path) as reader:
        assert reader.get(np.int64(7)) == b"value 7"  # pyright: ignore[reportArgumentType]
        assert reader.multi_get(np.array([7, 8]).tolist()) == {7: b"value 7", 8: b"value 8"}


@pytest.mark.parametrize(
    ("encoding", "keys", "key", "message"),
    [
        ("u64be", INTS, "7", "whole numbers"),
        ("u64be", INTS, b"7", "whole numbers"),
        ("u64be", INTS, True, "whole numbers"),
        ("u64be", INTS, 1.0, "whole numbers"),
        ("u64be", INTS, None, "whole numbers"),
        ("u64be", INTS, [7], "whole numbers"),
        ("u64be", INTS, -1, "not within"),
        ("u64be", INTS, 2**63, "not within"),
        ("u32be", INTS, 2**32, "not within"),
        ("utf8", TEXTS, 7, "str or bytes"),
        ("raw", BYTES, 7, "str or bytes"),
        ("utf8", TEXTS, "\ud800", "no text"),
    ],
)
def test_a_key_of_the_wrong_type_is_a_query_error(
    store: Store, tmp_path: Path, encoding: str, keys: list[Any], key: Any, message: str
) -> None:
    write(store, keys, encoding)
    with opened(store, tmp_path) as reader:
        for call in (lambda: reader.get(key), lambda: reader.multi_get([keys[0], key]), lambda: reader.route_key(key)):
            with pytest.raises(QueryError, match=message):
                call()
        with pytest.raises(QueryError, match="keys must be several keys, not one str"):
            reader.multi_get("k0")


def test_each_shard_is_asked_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = KeyValueShard.get_many

    def counting(shard: KeyValueShard, keys: Any) -> Any:
        asked.append(len(keys))
        return real(shard, keys)

    monkeypatch.setattr(KeyValueShard, "get_many", counting)
    write(store)
    with opened(store, tmp_path) as reader:
        assert None not in reader.multi_get(INTS).values()
    assert (len(asked), sum(asked)) == (SHARDS, ROWS)


# Searching.


@pytest.mark.parametrize("keys", [INTS, TEXTS, BYTES], ids=["int", "str", "bytes"])
def test_a_search_asks_all_shards_and_finds_keys(store: Store, tmp_path: Path, backend: str, keys: list[Any]) -> None:
    write(store, keys, "u64be" if keys is INTS else "raw", backend=backend)
    truth, distances = brute_force(QUERIES, VECTORS, DistanceMetric.L2, 5)
    with opened(store, tmp_path) as reader:
        batch = reader.batch_search(QUERIES, 5, include_vectors=True)
        for at, answer in enumerate(batch):
            ids = [keys[place].hex() if keys is BYTES else keys[place] for place in truth[at]]
            assert [hit.id for hit in answer.results] == ids
            assert answer.shard_ids == [0, 1, 2, 3]
            np.testing.assert_allclose([hit.score for hit in answer.results], distances[at], rtol=1e-6, atol=1e-6)
            back = [bytes.fromhex(str(hit.id)) if keys is BYTES else hit.id for hit in answer.results]
            assert list(reader.multi_get(back).values()) == [VALUES[place] for place in truth[at]]
            single = reader.search(QUERIES[at], 5)
            assert [hit.id for hit in single.results] == ids
        assert reader.search_arrays(QUERIES, 5).scores.tolist() == [[h.score for h in a.results] for a in batch]
        (point,) = reader.probe_curve(QUERIES, 5)
        assert point.ids.tolist() == [[hit.id for hit in answer.results] for answer in batch]
        assert reader.route_batch(QUERIES).tolist() == [[0, 1, 2, 3]] * len(QUERIES)
        assert reader.stock_style(QUERIES, 5, 1).ids.tolist() == point.ids.tolist()
        one = reader.search(QUERIES[0], 1000, shard_ids=[2])
        assert {hit.id for hit in one.results} == {
            key.hex() if isinstance(key, bytes) else key for key in keys if hash_key(key) % SHARDS == 2
        }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"routing_context": {"key": 1}}, "routing_context is for snapshots sharded by an expression"),
        ({"shard_ids": [4]}, "shard_ids names 4"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_a_wrong_search_is_a_query_error(store: Store, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    write(store)
    with opened(store, tmp_path) as reader:
        with pytest.raises(QueryError, match=message):
            reader.search(QUERIES[0], **arguments)
        with pytest.raises(QueryError, match="num_probes is for snapshots sharded by vector"):
            reader.search_arrays(QUERIES, 3, num_probes=2)
        with pytest.raises(QueryError, match="not by 'hash'"):
            reader.search_arrays(QUERIES, 3, shard_of=np.zeros(len(QUERIES), dtype=np.int32))
        with pytest.raises(QueryError, match="sharded by its keys"):
            reader.get(1, routing_context={"region": "eu"})


# CEL.


def cel(expr: str, columns: dict[str, Any]) -> CelRouting:
    return CelRouting(expr, columns, SHARDS)


def test_an_expression_over_the_key_alone_routes_by_it(store: Store, tmp_path: Path) -> None:
    routing = cel("key % 4", {"key": "int"})
    write(store, routing=routing, shard_of=np.arange(ROWS) % SHARDS)
    with opened(store, tmp_path) as reader:
        assert list(reader.multi_get(INTS).values()) == VALUES
        assert [reader.route_key(key) for key in (5, 6)] == [1, 2]
        assert reader.get(5, routing_context={"key": 5}) == b"value 5"
        assert reader.get(1000) is None
        with pytest.raises(QueryError, match="routing_context says key 6, asked is 5"):
            reader.get(5, routing_context={"key": 6})
        # Without a context a search asks all shards, with one the shard of the key.
        assert reader.search(QUERIES[0]).num_shards_queried == SHARDS
        assert reader.search(QUERIES[0], routing_context={"key": 6}).shard_ids == [2]
        contexts = [{"key": at} for at in range(len(QUERIES))]
        answers = reader.batch_search(QUERIES, 3, routing_context=contexts)
        assert [answer.shard_ids for answer in answers] == [[at % SHARDS] for at in range(len(QUERIES))]
        homes = (np.arange(len(QUERIES)) % SHARDS).astype(np.int32)
        arrays = reader.search_arrays(QUERIES, 3, shard_of=homes)
        assert arrays.ids.tolist() == [[hit.id for hit in answer.results] for answer in answers]
        (point,) = reader.probe_curve(QUERIES, 3, shard_of=homes)
        assert point.ids.tolist() == arrays.ids.tolist()


def test_an_expression_over_more_needs_a_context(store: Store, tmp_path: Path) -> None:
    routing = cel("(key + tier) % 4", {"key": "int", "tier": "int"})
    write(store, routing=routing, shard_of=(np.arange(ROWS) + 3) % SHARDS)
    with opened(store, tmp_path) as reader:
        assert reader.get(5, routing_context={"tier": 3}) == b"value 5"
        assert reader.get(5, routing_context={"tier": 4}) is None
        assert list(reader.multi_get(INTS, routing_context={"tier": 3}).values()) == VALUES
        for call in (lambda: reader.get(5), lambda: reader.multi_get([5]), lambda: reader.route_key(5)):
            with pytest.raises(QueryError, match="an expression over key, tier: give routing_context"):
                call()
        with pytest.raises(QueryError, match="tier is missing"):
            reader.get(5, routing_context={})
        with pytest.raises(QueryError, match="tier must be a CEL int"):
            reader.get(5, routing_context={"tier": "3"})
        assert reader.snapshot_info().cel_columns == {"key": "int", "tier": "int"}


def test_a_key_that_no_shard_can_hold_is_not_there(store: Store, tmp_path: Path) -> None:
    routing = CelRouting("key", {"key": "int"}, SHARDS, (10, 20, 30, 40))
    keys = [10, 20, 30, 40]
    publish_by_hand(
        store,
        keys,
        VECTORS[:4],
        routing=routing,
        shard_of=np.arange(4),
        values=VALUES[:4],
        key_encoding="u64be",
        metric=DistanceMetric.L2,
        backend="sqlite-vec",
    )
    with opened(store, tmp_path) as reader:
        assert reader.multi_get(keys) == dict(zip(keys, VALUES, strict=False))
        assert reader.get(50) is None
        assert reader.multi_get([10, 50]) == {10: VALUES[0], 50: None}
        with pytest.raises(NoShardError, match="gives no shard for key 50"):
            reader.route_key(50)
        for wrong in (5, None, b"ab", bytearray(b"ab")):
            with pytest.raises(QueryError, match="keys must be several keys"):
                reader.multi_get(wrong)  # pyright: ignore[reportArgumentType]
        for context in ("abc", [1], 5):
            with pytest.raises(QueryError, match="routing_context must be a mapping"):
                reader.get(10, routing_context=context)  # pyright: ignore[reportArgumentType]
        with pytest.raises(QueryError, match=f"key {10**30} "):
            reader.multi_get([10**30] * 40)
        assert reader.search(VECTORS[0], top_k=10**12).num_shards_queried == SHARDS
        with pytest.raises(QueryError, match="top_k must be at most"):
            reader.search_arrays(VECTORS[:1], 10**12)
        first, second = reader.batch_search(VECTORS[[0, 0]], 1)
        assert first.results[0] == second.results[0]
        assert first.results[0].payload is None or first.results[0].payload is not second.results[0].payload


# What is there.


def test_an_empty_shard_holds_nothing(store: Store, tmp_path: Path) -> None:
    write(store, routing=cel("key % 4", {"key": "int"}), shard_of=np.zeros(ROWS, dtype=int))
    with opened(store, tmp_path, preload=True) as reader:
        assert reader.get(5) is None
        assert reader.get(4) == b"value 4"
        assert reader.search(QUERIES[0], 3).num_shards_queried == SHARDS


def test_the_snapshot_is_described(store: Store, tmp_path: Path, backend: str) -> None:
    write(store, backend=backend, custom={"index_params": {"M": 12}, "index_type": "flat"})
    with opened(store, tmp_path) as reader:
        meta, info = reader.vector_meta, reader.snapshot_info()
        kv_backend = {"lancedb": "sqlite", "sqlite-vec": "sqlite-vec"}[backend]
        assert (meta.dim, meta.metric, meta.index_type, meta.quantization) == (DIM, "l2", "flat", None)
        assert (meta.index_params, meta.backend, meta.kv_backend) == ({"M": 12}, backend, kv_backend)
        assert (info.kind, info.sharding, info.num_probes, info.backend) == ("unified", "hash", SHARDS, backend)
        assert sum(shard.vector_count for shard in reader.shard_details()) == ROWS
    assert reader.health().status == "unhealthy"
    for call in (
        lambda: reader.get(1),
        lambda: reader.multi_get([1]),
        lambda: reader.search(QUERIES[0]),
        lambda: reader.vector_meta,
        lambda: reader.route_key(1),
    ):
        with pytest.raises(ReaderClosedError):
            call()


def test_the_reader_fits_the_snapshot(store: Store, tmp_path: Path) -> None:
    write(store)
    root = store.local_root
    assert root is not None
    with open_reader(root, cache_dir=tmp_path / "cache") as reader:
        assert isinstance(reader, UnifiedShardedReader)
    with pytest.raises(SnapshotKindError, match=r"unified snapshot .* open it with UnifiedShardedReader"):
        ShardedVectorReader(root, cache_dir=tmp_path / "cache")


def test_refresh_serves_new_values(store: Store, tmp_path: Path) -> None:
    write(store)
    with opened(store, tmp_path) as reader:
        assert reader.get(3) == b"value 3"
        write(store, values=[b"new"] * ROWS)
        assert reader.refresh()
        assert reader.get(3) == b"new"


# Damage.


def key_file(store: Store, manifest: Any) -> str:
    return f"{manifest.key_of(manifest.shards[0].db_url)}/shard.db"


@pytest.mark.parametrize("preload", [False, True])
def test_a_damaged_shard_is_an_error_that_names_it(store: Store, tmp_path: Path, backend: str, preload: bool) -> None:
    manifest = write(store, backend=backend)
    name = key_file(store, manifest)
    data = store.get(name)
    store.put(name, data[:-1] + bytes([data[-1] ^ 1]))

    def use() -> None:
        with opened(store, tmp_path, preload=preload) as reader:
            reader.multi_get(INTS)

    with pytest.raises(DigestMismatchError, match=r"shard\.db"):
        use()
    store.put(name, data)
    use()


@pytest.mark.parametrize("ours", [True, False])
def test_counts_of_keys_and_vectors(store: Store, tmp_path: Path, backend: str, ours: bool) -> None:
    """A stock writer counts a repeated key again, and a record without vector, too; we write each once."""
    manifest = write(store, backend=backend, ours=ours)
    for change in (1, -1):
        row = manifest.shards[0].model_copy(update={"row_count": manifest.shards[0].row_count + change})
        custom = {key: value for key, value in manifest.custom.items() if key != "sf_pipelines"}
        if ours:
            custom["sf_pipelines"] = manifest.custom["sf_pipelines"] | {"row_count": ROWS + change}
        publish(store, manifest.model_copy(update={"shards": (row, *manifest.shards[1:]), "custom": custom}))
        with opened(store, tmp_path) as reader:
            if ours or change < 0:
                with pytest.raises(CountMismatchError, match=f"keys, the manifest says {row.row_count}"):
                    reader.multi_get(INTS)
            else:
                assert None not in reader.multi_get(INTS).values()
            if ours:
                with pytest.raises(CountMismatchError, match=f"rows, the manifest says {row.row_count}"):
                    reader.search(QUERIES[0])
            else:
                assert len(reader.search(QUERIES[0], 1000).results) == ROWS


def test_a_shard_without_vectors_is_never_an_empty_answer(store: Store, tmp_path: Path) -> None:
    manifest = write(store, backend="lancedb", sealed=False, ours=False)
    folder = manifest.key_of(manifest.shards[0].db_url)
    for item in list(store.objects(f"{folder}/vector")):
        store.delete(item.key)
    with opened(store, tmp_path) as reader:
        assert None not in reader.multi_get(INTS).values()
        for _ in range(2):
            with pytest.raises(IntegrityError, match=r"shard 0 .* cannot be read"):
                reader.search(QUERIES[0])


@pytest.mark.slow
def test_gets_and_searches_from_many_threads(store: Store, tmp_path: Path, backend: str) -> None:
    write(store, backend=backend)
    start = threading.Barrier(6)
    with opened(store, tmp_path, max_cached_shards=1) as reader, ThreadPoolExecutor(6) as pool:

        def work(at: int) -> bool:
            start.wait()
            for turn in range(20):
                key = (at * 20 + turn) % ROWS
                assert reader.get(key) == VALUES[key]
                assert reader.search(VECTORS[key], 1).results[0].id == key
            return True

        assert all(pool.map(work, range(6)))
