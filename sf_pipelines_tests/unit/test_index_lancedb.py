"""The LanceDB backend against float64 brute force, over every family, metric and size that matters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from lancedb.index import HnswPq, IvfFlat

from sf_pipelines.snapshot.config import IndexParams
from sf_pipelines.snapshot.errors import ConfigError, IndexBuildError, IntegrityError
from sf_pipelines.snapshot.index import backend_named
from sf_pipelines.snapshot.index.lancedb import LanceDBShard
from sf_pipelines.snapshot.index.protocol import IndexFamily, VectorType, choose_family
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, pair_distances
from sf_pipelines_tests.snapshots import clustered, table_of
from sf_pipelines_tests.tables import exact_distances

SIZES = (1, 2, 17, 256, 3000)
DIM = 8


def make(
    folder: Path,
    vectors: Float32,
    ids: list[Any] | None = None,
    *,
    family: IndexFamily = IndexFamily.FLAT,
    metric: DistanceMetric = DistanceMetric.COSINE,
    in_memory: bool = False,
    vector_type: VectorType = "float32",
) -> LanceDBShard:
    backend = LanceDBShard
    rows = table_of(list(range(len(vectors))) if ids is None else ids, vectors)
    backend.build(rows, folder, family=family, metric=metric, params=IndexParams(), vector_type=vector_type)
    shard = backend.open(folder, metric=metric, dim=vectors.shape[1], in_memory=in_memory)
    assert shard.rows == shard.indexed_rows == len(vectors)
    return shard


@pytest.mark.parametrize("metric", DistanceMetric)
@pytest.mark.parametrize("family", IndexFamily)
@pytest.mark.parametrize("size", SIZES)
def test_scores_are_those_of_exact_distances(
    tmp_path: Path, size: int, family: IndexFamily, metric: DistanceMetric
) -> None:
    vectors, queries = clustered(size, DIM, seed=1), clustered(9, DIM, seed=2)
    shard = make(tmp_path, vectors, family=family, metric=metric)
    truth = exact_distances(queries, vectors, metric)
    hits = shard.search(queries, 10)
    k = min(10, size)
    assert hits.counts.tolist() == [k] * 9
    np.testing.assert_allclose(
        hits.distances[:, :k],
        np.take_along_axis(truth, hits.ids[:, :k], axis=1),
        rtol=1e-6,
        atol=1e-6,
    )
    assert (np.diff(hits.distances[:, :k], axis=1) >= 0).all()
    found = (hits.distances[:, :k] <= np.sort(truth, axis=1)[:, k - 1 : k] + 1e-9).mean()
    # A graph over inner products of vectors of unequal length misses more: the gate is there to notice.
    floor = 0.7 if family in {IndexFamily.HNSW, IndexFamily.HNSW_FLAT} and metric == "dot_product" else 0.9
    assert found == 1.0 if family is IndexFamily.FLAT or size < SIZES[-1] else found > floor


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("family", [IndexFamily.IVF_SQ, IndexFamily.HNSW])
def test_a_batch_answers_as_single_queries_do(tmp_path: Path, family: IndexFamily, in_memory: bool) -> None:
    vectors, queries = clustered(2000, DIM), clustered(40, DIM, seed=3)
    shard = make(tmp_path, vectors, family=family, in_memory=in_memory)
    batch = shard.search(queries, 7)
    for at in range(len(queries)):
        one = shard.search(queries[at : at + 1], 7)
        assert one.ids[0].tolist() == batch.ids[at].tolist()
        assert one.distances[0].tolist() == batch.distances[at].tolist()


@pytest.mark.parametrize("family", IndexFamily)
def test_more_hits_than_rows_gives_all_rows(tmp_path: Path, family: IndexFamily) -> None:
    shard = make(tmp_path, clustered(40, DIM), family=family)
    hits = shard.search(clustered(3, DIM, seed=5), 1000)
    assert hits.counts.tolist() == [40, 40, 40]
    assert all(sorted(row[:40].tolist()) == list(range(40)) for row in hits.ids)


@pytest.mark.parametrize("metric", DistanceMetric)
@pytest.mark.parametrize("family", IndexFamily)
def test_equal_vectors_come_back_full_and_with_the_right_score(
    tmp_path: Path, family: IndexFamily, metric: DistanceMetric
) -> None:
    vectors = np.tile(np.linspace(1, 2, DIM, dtype=np.float32), (500, 1))
    hits = make(tmp_path, vectors, family=family, metric=metric).search(vectors[:2], 10)
    assert hits.counts.tolist() == [10, 10]
    assert all(len(set(row.tolist())) == 10 for row in hits.ids)
    scores = exact_distances(vectors[:2], vectors[:10], metric)
    np.testing.assert_allclose(hits.distances, scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", DistanceMetric)
def test_a_scan_tells_apart_what_float32_products_cannot(tmp_path: Path, metric: DistanceMetric) -> None:
    rng = np.random.default_rng(3)
    vectors = (1000 + rng.standard_normal((400, DIM)) * 0.01).astype(np.float32)
    queries = (1000 + rng.standard_normal((20, DIM)) * 0.01).astype(np.float32)
    truth = np.argsort(exact_distances(queries, vectors, metric), axis=1, kind="stable")[:, :5]
    shard = make(tmp_path, vectors, metric=metric, in_memory=True)
    scores = np.take_along_axis(exact_distances(queries, vectors, metric), truth, axis=1)
    np.testing.assert_allclose(shard.search(queries, 5).distances, scores, rtol=1e-9, atol=1e-12)


def test_a_scan_breaks_ties_by_id(tmp_path: Path) -> None:
    vectors = np.tile(np.linspace(1, 2, DIM, dtype=np.float32), (500, 1))
    ids = np.random.default_rng(0).permutation(500)
    shard = make(tmp_path, vectors, ids.tolist(), in_memory=True)
    assert shard.search(vectors[:1], 5).ids[0].tolist() == [0, 1, 2, 3, 4]
    text = make(tmp_path / "text", vectors, [str(i) for i in ids], in_memory=True)
    assert text.search(vectors[:1], 5).ids[0].tolist() == ["0", "1", "10", "100", "101"]


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    ("ids", "kind"),
    [([7, -3, 2**62], int), (["a", "bé", "c\0d"], str), (["007", "7", "42"], str)],
    ids=["int", "text", "digits"],
)
def test_ids_keep_their_type(tmp_path: Path, ids: list[object], kind: type, in_memory: bool) -> None:
    vectors = np.eye(3, DIM, dtype=np.float32)
    shard = make(tmp_path, vectors, ids, in_memory=in_memory)
    found = shard.search(vectors, 1).ids.tolist()
    assert found == [[value] for value in ids]
    assert all(type(value) is kind for row in found for value in row)
    assert shard.id_type == ("int64" if kind is int else "string")


@pytest.mark.parametrize("in_memory", [False, True])
def test_rows_give_back_their_payloads_and_vectors_in_order(tmp_path: Path, in_memory: bool) -> None:
    vectors = clustered(300, DIM)
    backend = LanceDBShard
    payloads = [None if i % 3 == 0 else {"i": i} for i in range(300)]
    rows = table_of(list(range(300)), vectors, payloads)
    backend.build(rows, tmp_path, family=IndexFamily.IVF_FLAT, metric=DistanceMetric.L2, params=IndexParams())
    shard = backend.open(tmp_path, metric=DistanceMetric.L2, dim=DIM, in_memory=in_memory)
    hits = shard.search(vectors[[5, 250, 3]], 20)
    for ids, at in zip(hits.ids.tolist(), hits.rows, strict=True):
        assert shard.payloads(at) == [payloads[i] for i in ids]
        np.testing.assert_array_equal(shard.vectors(at), vectors[ids])
    assert shard.payloads(hits.rows[0][[1, 1, 0]]) == [payloads[hits.ids[0][i]] for i in (1, 1, 0)]
    ids, sampled = shard.sample(11)
    assert len(ids) == 11
    np.testing.assert_array_equal(sampled, vectors[ids])
    assert ids.tolist() == shard.sample(11)[0].tolist()


def test_payload_text_of_strangers_that_is_no_object_is_no_payload(tmp_path: Path) -> None:
    rows = table_of([1, 2, 3], np.eye(3, DIM, dtype=np.float32))
    rows = rows.set_column(2, "payload", pa.array(["[1]", "{broken", "{}"]))
    backend = LanceDBShard
    backend.build(rows, tmp_path, family=IndexFamily.FLAT, metric=DistanceMetric.COSINE, params=IndexParams())
    shard = backend.open(tmp_path, metric=DistanceMetric.COSINE, dim=DIM)
    assert shard.payloads(np.array([0, 1, 2])) == [None, None, {}]


@pytest.mark.parametrize("metric", DistanceMetric)
@pytest.mark.parametrize("state", ["none", "empty entry", "another metric", "coarse codes", "rows added later"])
def test_foreign_shards_are_searched_in_the_declared_metric(tmp_path: Path, state: str, metric: DistanceMetric) -> None:
    rows = 400 if state == "coarse codes" else 60
    vectors, queries = clustered(rows, DIM) * np.linspace(0.2, 3, rows, dtype=np.float32)[:, None], clustered(5, DIM)
    table = lancedb.connect(tmp_path).create_table("vector_index", table_of(list(range(rows)), vectors))
    other = "l2" if metric is not DistanceMetric.L2 else "cosine"
    if state in {"empty entry", "coarse codes"}:
        table.create_index("vector", config=HnswPq(distance_type="cosine", num_sub_vectors=1))
    elif state != "none":
        own = {"cosine": "cosine", "l2": "l2", "dot_product": "dot"}[metric]
        distance: Any = other if state == "another metric" else own
        table.create_index("vector", config=IvfFlat(distance_type=distance, num_partitions=1))
    if state == "rows added later":
        extra = clustered(5, DIM, seed=9)
        table.add(table_of(list(range(rows, rows + 5)), extra))
        vectors = np.concatenate([vectors, extra])
    shard = LanceDBShard.open(tmp_path, metric=metric, dim=DIM, in_memory=False)
    truth = exact_distances(queries, vectors, metric)
    hits = shard.search(queries, 5)
    assert hits.ids.tolist() == np.argsort(truth, axis=1)[:, :5].tolist()
    np.testing.assert_allclose(hits.distances, np.sort(truth, axis=1)[:, :5], rtol=1e-6, atol=1e-6)


def test_rows_that_the_index_leaves_out_are_found_all_the_same(tmp_path: Path) -> None:
    vectors = clustered(300, DIM)
    vectors[40:] = 0
    shard = make(tmp_path, vectors, family=IndexFamily.IVF_FLAT)
    hits = shard.search(vectors[:1], 50)
    assert hits.counts.tolist() == [50]
    assert set(hits.ids[0][hits.distances[0] < 1].tolist()) <= set(range(40))
    assert np.isclose(hits.distances[0], 1.0).sum() >= 10


def test_repeated_foreign_ids_do_not_crowd_out_others(tmp_path: Path) -> None:
    vectors = np.concatenate([np.tile(np.eye(1, DIM, dtype=np.float32), (6, 1)), np.eye(4, DIM, dtype=np.float32)[1:]])
    shard = make(tmp_path, vectors, [1] * 6 + [2, 3, 4], in_memory=True)
    assert set(shard.search(vectors[:1], 3).ids[0].tolist()) >= {1, 2, 3}


def test_half_precision_vectors_of_strangers_are_understood(tmp_path: Path) -> None:
    vectors = clustered(30, DIM).astype(np.float16)
    rows = pa.table(
        {
            "id": pa.array([str(i) for i in range(30)]),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM),
        }
    )
    lancedb.connect(tmp_path).create_table("vector_index", rows)
    shard = LanceDBShard.open(tmp_path, metric=DistanceMetric.L2, dim=DIM)
    hits = shard.search(vectors[:2].astype(np.float32), 1)
    assert hits.ids.tolist() == [["0"], ["1"]]
    assert shard.payloads(hits.rows[0]) == [None]


@pytest.mark.parametrize("metric", DistanceMetric)
@pytest.mark.parametrize("family", IndexFamily)
@pytest.mark.parametrize("vector_type", ["float32", "float16"])
def test_small_shards_and_equal_vectors_are_indexed_in_every_family(
    tmp_path: Path, vector_type: VectorType, family: IndexFamily, metric: DistanceMetric
) -> None:
    queries = clustered(4, DIM, seed=2)
    for size in (1, 2, 255, 256, 257):
        for equal in (False, True):
            vectors = clustered(size, DIM, seed=1).astype(np.float16).astype(np.float32)
            vectors = np.tile(vectors[:1], (size, 1)) if equal else vectors
            folder, k = tmp_path / f"{size}-{equal}", min(5, size)
            shard = make(folder, vectors, family=family, metric=metric, vector_type=vector_type)
            truth = exact_distances(queries, vectors, metric)
            hits = shard.search(queries, 5)
            assert hits.counts.tolist() == [k] * 4
            found = np.take_along_axis(truth, hits.ids[:, :k], axis=1)
            np.testing.assert_allclose(hits.distances[:, :k], found, rtol=1e-6, atol=1e-6)
            assert (found <= np.sort(truth, axis=1)[:, k - 1 : k] + 1e-9).mean() > 0.9
            table: Any = lancedb.connect(folder).open_table("vector_index")
            assert table.schema.field("vector").type.value_type == pa.type_for_alias(vector_type)
            plain = table.search(queries[0]).limit(k).to_arrow()["id"].to_pylist()
            assert len(set(plain)) == k
            # A reader without options, on half or 8-bit numbers, and by a graph over inner products: most of them.
            kth = np.sort(truth[0])[k - 1]
            assert (truth[0][plain] <= kth + 0.01 * abs(kth) + 0.01).mean() > 0.7


def test_vectors_that_are_no_float16_numbers_are_not_rounded_silently(tmp_path: Path) -> None:
    for value in (0.1, 1e6):
        with pytest.raises(IndexBuildError, match="the vectors are not float16 numbers"):
            make(tmp_path, np.full((2, DIM), value, np.float32), vector_type="float16")


def test_filter_columns_of_large_shards_have_an_index_beside_that_of_the_vector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sf_pipelines.snapshot.index.lancedb._FILTER_INDEX_ROWS", 2000)
    columns = {
        "many": pa.array([None, *range(1, 2000)]),
        "section": pa.array([f"s{n % 9}" for n in range(2000)]),
        "flag": pa.array([n % 2 == 0 for n in range(2000)]),
        "share": pa.array(np.where(np.arange(2000) % 3, 0.5, np.nan)),
        "day": pa.array(np.arange(2000) % 30, pa.int32()).cast(pa.date32()),
        "large": pa.array(np.arange(2000), pa.uint64()),
    }
    rows = table_of(list(range(2000)), clustered(2000, DIM))
    for name, values in columns.items():
        rows = rows.append_column(name, values)
    backend, options = LanceDBShard, {"metric": DistanceMetric.L2, "params": IndexParams()}
    backend.build(rows, tmp_path / "large", family=IndexFamily.IVF_SQ, **options)
    backend.build(rows.slice(0, 1999), tmp_path / "small", family=IndexFamily.IVF_SQ, **options)
    kinds = {
        index.columns[0]: index.index_type
        for index in lancedb.connect(tmp_path / "large").open_table("vector_index").list_indices()
    }
    trees = dict.fromkeys(("many", "share", "day", "large"), "BTree")
    assert kinds == {"vector": "IvfSq", "section": "Bitmap", "flag": "Bitmap", **trees}
    assert len(list(lancedb.connect(tmp_path / "small").open_table("vector_index").list_indices())) == 1
    shard = backend.open(tmp_path / "large", metric=DistanceMetric.L2, dim=DIM, in_memory=False)
    assert shard.indexed_rows == 2000
    assert not shard._scans


def test_raw_search_is_that_of_a_reader_without_options(tmp_path: Path) -> None:
    vectors, queries = clustered(500, DIM), clustered(6, DIM, seed=4)
    shard = make(tmp_path, vectors, family=IndexFamily.IVF_SQ)
    hits = shard.search_raw(queries, 5)
    table = lancedb.connect(tmp_path).open_table("vector_index")
    for at, query in enumerate(queries):
        found = table.search(query).limit(5).to_arrow()
        assert hits.ids[at].tolist() == found["id"].to_pylist()
        np.testing.assert_allclose(hits.distances[at], found["_distance"].to_numpy())


def test_a_shard_of_another_shape_is_refused(tmp_path: Path) -> None:
    make(tmp_path, clustered(5, DIM))
    with pytest.raises(IntegrityError, match=r"'vector' is .*, the manifest says 9 numbers"):
        LanceDBShard.open(tmp_path, metric=DistanceMetric.L2, dim=9)
    with pytest.raises(IntegrityError, match=r"holds no vector_index\.lance"):
        LanceDBShard.open(tmp_path / "nothing", metric=DistanceMetric.L2, dim=DIM)
    (tmp_path / "broken" / "vector_index.lance").mkdir(parents=True)
    with pytest.raises(IntegrityError, match="cannot open the LanceDB table"):
        LanceDBShard.open(tmp_path / "broken", metric=DistanceMetric.L2, dim=DIM)
    named = pa.table({"key": ["a"], "vector": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(DIM, "f4")), DIM)})
    lancedb.connect(tmp_path / "named").create_table("vector_index", named)
    with pytest.raises(IntegrityError, match="no column 'id'"):
        LanceDBShard.open(tmp_path / "named", metric=DistanceMetric.L2, dim=DIM)


def test_building_fails_loudly(tmp_path: Path) -> None:
    backend, options = LanceDBShard, {"family": IndexFamily.FLAT, "metric": DistanceMetric.L2}
    rows = table_of([1, 2], np.eye(2, DIM, dtype=np.float32))
    with pytest.raises(IndexBuildError, match="without rows"):
        backend.build(rows.slice(0, 0), tmp_path, params=IndexParams(), **options)
    backend.build(rows, tmp_path, params=IndexParams(), **options)
    with pytest.raises(IndexBuildError, match="cannot build a flat index of 2 rows"):
        backend.build(rows, tmp_path, params=IndexParams(), **options)


class PanicException(BaseException):
    """What a bug of a library in Rust becomes in Python."""


def test_a_panic_of_the_library_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(_: str) -> Any:
        raise PanicException("index out of bounds")

    make(tmp_path, clustered(5, DIM)).close()
    monkeypatch.setattr(lancedb, "connect", panic)
    with pytest.raises(IntegrityError, match=r"cannot open the LanceDB table in .*: index out of bounds"):
        LanceDBShard.open(tmp_path, metric=DistanceMetric.L2, dim=DIM)
    rows = table_of([1, 2], np.eye(2, DIM, dtype=np.float32))
    options = {"family": IndexFamily.FLAT, "metric": DistanceMetric.L2, "params": IndexParams()}
    with pytest.raises(IndexBuildError, match=r"cannot build a flat index of 2 rows.*: index out of bounds"):
        LanceDBShard.build(rows, tmp_path / "other", **options)


def test_the_family_follows_the_largest_shard() -> None:
    assert choose_family("auto", 3999) is IndexFamily.FLAT
    assert choose_family("auto", 4000) is IndexFamily.IVF_SQ
    assert choose_family("auto", 200_000) is IndexFamily.IVF_SQ
    assert choose_family("auto", 200_001) is IndexFamily.HNSW
    assert choose_family("hnsw_flat", 10) is IndexFamily.HNSW_FLAT
    with pytest.raises(ConfigError, match="'pq' is unknown"):
        choose_family("pq", 10)
    with pytest.raises(ConfigError, match="'faiss' is unknown"):
        backend_named("faiss")
    assert backend_named("lancedb").directory == "vector_index.lance"


@pytest.mark.parametrize("metric", DistanceMetric)
def test_pair_distances_are_the_definition(metric: DistanceMetric) -> None:
    queries, rows = clustered(40, DIM), clustered(40, DIM, seed=8)
    np.testing.assert_allclose(
        pair_distances(queries, rows, metric), np.diagonal(exact_distances(queries, rows, metric))
    )
    if metric is not DistanceMetric.DOT_PRODUCT:
        assert pair_distances(rows, rows, metric).tolist() == [0.0] * 40


# Datasets of strangers.


def stranger(folder: Path, vectors: Float32, ids: pa.Array | None = None) -> Any:
    columns = {
        "id": pa.array(list(range(len(vectors)))) if ids is None else ids,
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        "payload": pa.array([f'{{"n": {n}}}' for n in range(len(vectors))]),
    }
    fill: Any = {"on_bad_vectors": "fill", "fill_value": float("nan")}
    return lancedb.connect(str(folder)).create_table("vector_index", pa.table(columns), **fill)


def opened(folder: Path, metric: DistanceMetric = DistanceMetric.L2, in_memory: bool = True) -> LanceDBShard:
    return LanceDBShard.open(folder, metric=metric, dim=DIM, in_memory=in_memory)


def test_a_dataset_that_reads_from_another_place_is_refused(tmp_path: Path) -> None:
    stranger(tmp_path / "whole", clustered(60, DIM)).create_index(
        "vector", config=IvfFlat(distance_type="l2", num_partitions=1)
    )
    assert opened(tmp_path / "whole").rows == 60
    source = str(tmp_path / "whole" / "vector_index.lance")
    clone: Any = lancedb.connect(str(tmp_path / "clone"))
    clone.clone_table("vector_index", source, is_shallow=True)
    with pytest.raises(IntegrityError, match=r"\.manifest: the dataset reads from other places \(base_paths\)"):
        opened(tmp_path / "clone")


def _rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Changes the message of a manifest, and its length with it."""
    data = path.read_bytes()
    at = int.from_bytes(data[-16:-8], "little")
    message = change(data[at + 4 : -16])
    path.write_bytes(data[:at] + len(message).to_bytes(4, "little") + message + data[-16:])


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (b"\x12\x0b\x12\x09\x0a\x07/etc/pw", "names the file b'/etc/pw'"),
        (b"\x12\x0b\x12\x09\x0a\x07../../x", "names the file b'../../x'"),
        (b"\x12\x0b\x12\x09\x0a\x07s3://xy", "names the file b's3://xy'"),
        (b"\x12\x09\x32\x07\x0a\x05/etc/", "names the file b'/etc/'"),
        (b"\x12\x0d\x5a\x0b\x0a\x09\x0a\x07/etc/pw", "names the file b'/etc/pw'"),
        (b"\x92\x01\x00", "reads from other places"),
        (b"\x92\x01\x04\x22\x02/x", "reads from other places"),
        (b"\xa2\x01\x01b", "is a branch of another"),
        (b"\x30\xff\xff\xff\xff\x7f", "has no room for"),
        (b"\x12\x7f", "no room for the 127 bytes of field 2"),
        (b"\x13", "unknown kind 3"),
        (b"\xff" * 11, "a number that does not end"),
        (b"\x10\x01", "field 2 of the manifest is a number"),
    ],
)
def test_manifests_that_name_other_files_are_refused(tmp_path: Path, added: bytes, message: str) -> None:
    stranger(tmp_path, clustered(5, DIM))
    (path,) = (tmp_path / "vector_index.lance").rglob("*.manifest")
    _rewritten(path, lambda data: data)
    assert opened(tmp_path).rows == 5
    _rewritten(path, lambda data: data + added)
    with pytest.raises(IntegrityError) as caught:
        opened(tmp_path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_manifests_without_an_end_or_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger(tmp_path, clustered(5, DIM))
    (path,) = (tmp_path / "vector_index.lance").rglob("*.manifest")
    data = path.read_bytes()
    for broken in (b"", data[:-1], data[:-16] + (1 << 60).to_bytes(8, "little") + data[-8:], data[-16:]):
        path.write_bytes(broken)
        with pytest.raises(IntegrityError, match="manifest"):
            opened(tmp_path)
    path.write_bytes(data)
    monkeypatch.setattr("sf_pipelines.snapshot.index.lance_file._MAX_BYTES", len(data) - 1)
    with pytest.raises(IntegrityError, match="the manifests are larger than"):
        opened(tmp_path)


def test_an_index_that_names_files_of_its_own_is_refused(tmp_path: Path) -> None:
    stranger(tmp_path, clustered(60, DIM)).create_index("vector", config=IvfFlat(num_partitions=1))
    assert opened(tmp_path).rows == 60
    for path in (tmp_path / "vector_index.lance").rglob("*.manifest"):
        path.write_bytes(
            path.read_bytes().replace(
                b"/lance.index.pb.VectorIndexDetails", b"/x.FragmentReuseIndexDetails".rjust(34, b"x")
            )
        )
    with pytest.raises(IntegrityError, match="FragmentReuseIndexDetails', which may read from other places"):
        opened(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("metric", DistanceMetric)
def test_rows_of_strangers_that_are_not_finite_are_in_no_answer(
    tmp_path: Path, metric: DistanceMetric, bad: float
) -> None:
    vectors = clustered(50, DIM)
    vectors[3, 2] = bad
    stranger(tmp_path, vectors)
    shard, queries = opened(tmp_path, metric), clustered(4, DIM, seed=1)
    hits = shard.search(queries, 50)
    others = np.delete(np.arange(50), 3)
    assert hits.counts.tolist() == [49] * 4
    assert [sorted(ids) for ids in hits.ids[:, :49].tolist()] == [others.tolist()] * 4
    truth = np.sort(exact_distances(queries, vectors[others], metric), axis=1)
    np.testing.assert_allclose(hits.distances[:, :49], truth, rtol=1e-6, atol=1e-6)
    assert shard.payloads(hits.rows[0, :49]) == [{"n": n} for n in hits.ids[0, :49].tolist()]
    np.testing.assert_array_equal(shard.vectors(hits.rows[0, :49]), vectors[hits.ids[0, :49]])


def test_ids_that_no_int64_holds_are_refused(tmp_path: Path) -> None:
    stranger(tmp_path, clustered(5, DIM), pa.array([2**63 + n for n in range(5)], pa.uint64()))
    with pytest.raises(IntegrityError, match="column 'id' is uint64 with values that are no int64"):
        opened(tmp_path).search(clustered(1, DIM), 1)


def test_repeated_ids_of_an_indexed_shard_do_not_crowd_out_others(tmp_path: Path) -> None:
    spread = np.random.default_rng(0).standard_normal((4000, DIM)) * 1e-3
    vectors = (np.repeat(clustered(100, DIM), 40, axis=0) + spread).astype(np.float32)
    shard = make(tmp_path, vectors, [n // 40 for n in range(4000)], metric=DistanceMetric.L2)
    hits = shard.search(vectors[:3], 10)
    nearest = exact_distances(vectors[:3], vectors, DistanceMetric.L2).reshape(3, 100, 40).min(axis=2)
    for at in range(3):
        found = list(dict.fromkeys(hits.ids[at, : hits.counts[at]].tolist()))[:10]
        assert found == np.argsort(nearest[at])[:10].tolist()
