import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_pipelines.snapshot.config import VectorSpec, WriteConfig
from sf_pipelines.snapshot.errors import SourceSchemaError
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.source.contract import RowContract
from sf_pipelines.snapshot.source.duplicates import DuplicateFinder
from sf_pipelines.snapshot.source.files import SourceBatch
from sf_pipelines.snapshot.source.hashing import RowSetDigest, hash_column, hash_vectors
from sf_pipelines.snapshot.source.sampling import SmallestHashSample

NAN, INF = float("nan"), float("inf")


def config(metric: str = "cosine", **more: Any) -> WriteConfig:
    spec = VectorSpec(dim=2, metric=DistanceMetric(metric))
    return WriteConfig(name="t", source="s", store="s", num_dbs=1, vector_spec=spec, **more)


def check(rows: pa.Table, **more: Any):
    batch = SourceBatch(rows.combine_chunks().to_batches()[0], 100, "f.parquet", 40)
    return RowContract(config(**more), rows.schema).check(batch)


VECTORS = [[1, 0], None, [1], [1, 2, 3], [NAN, 0], [0, INF], [0, 0], [1e20, 1e20], [3, 4], [1e-30, 0], [None, 1]]
REASONS = [
    "",
    "null_vector",
    "wrong_dimension",
    "wrong_dimension",
    "not_finite",
    "not_finite",
    "zero_norm",
    "norm_out_of_range",
    "",
    "zero_norm",
    "not_finite",
]


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32())])
def test_each_bad_vector_is_rejected_for_its_reason(kind: pa.DataType) -> None:
    rows = pa.table({"id": pa.array(range(11)), "vector": pa.array(VECTORS, kind)})
    checked = check(rows)
    found = dict(zip(checked.rejects["row"].to_pylist(), checked.rejects["reason"].to_pylist(), strict=True))
    assert found == {100 + n: reason for n, reason in enumerate(REASONS) if reason}
    assert checked.ids.to_pylist() == [0, 8]
    assert checked.rows.tolist() == [100, 108]
    assert checked.vectors.tolist() == [[1, 0], [3, 4]]
    assert checked.rejects["source_row"].to_pylist()[0] == 41
    assert checked.rejects["source_file"].to_pylist()[0] == "f.parquet"


def test_fixed_size_lists_with_nulls_and_an_offset() -> None:
    vectors = [[9, 9], [1, 0], None, [3, 4], [NAN, 1]]
    rows = pa.table(
        {"id": pa.array(["a", "b", "c", None, "e"]), "vector": pa.array(vectors, pa.list_(pa.float16(), 2))}
    )
    checked = check(rows.slice(1))
    assert checked.vectors.tolist() == [[1, 0]]
    assert checked.rejects["reason"].to_pylist() == ["null_vector", "null_id", "not_finite"]


def test_a_float64_that_overflows_float32_is_not_finite() -> None:
    rows = pa.table({"id": [1], "vector": pa.array([[1e300, 0]], pa.list_(pa.float64()))})
    assert check(rows).rejects["reason"].to_pylist() == ["not_finite"]


@pytest.mark.parametrize("metric", ["l2", "dot_product"])
def test_a_zero_vector_is_fine_where_length_matters(metric: str) -> None:
    rows = pa.table({"id": [1], "vector": pa.array([[0, 0]], pa.list_(pa.float32()))})
    assert check(rows, metric=metric).rejects.num_rows == 0


def test_payload_and_filters_are_stored_with_their_values() -> None:
    words = pa.array(["x", 'q"\n', None]).dictionary_encode()
    rows = pa.table(
        {
            "id": pa.array([1, 2, 3], pa.int32()),
            "vector": pa.array([[1, 0]] * 3, pa.list_(pa.float32())),
            "word": words,
            "tags": pa.array([[1, 2], None, []]),
            "price": pa.array([1.5, None, 2.5]),
        }
    )
    contract = RowContract(config(payload_cols=("word", "tags"), filter_cols=("price", "word")), rows.schema)
    stored, vectors = contract.stored(rows.to_batches()[0])
    payloads = [json.loads(text) for text in stored["payload"].to_pylist()]
    assert payloads == [{"word": "x", "tags": [1, 2]}, {"word": 'q"\n', "tags": None}, {"word": None, "tags": []}]
    assert stored["price"].to_pylist() == [1.5, None, 2.5]
    assert stored["word"].to_pylist() == ["x", 'q"\n', None]
    assert stored.schema.field("id").type == pa.int64()
    assert vectors.shape == (3, 2)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("id", pa.array([1.5]), "ids are integers up to int64 or strings"),
        ("id", pa.array([1], pa.uint64()), "ids are integers up to int64"),
        ("vector", pa.array([[1]], pa.list_(pa.int64())), "expected a list or fixed-size list of float16"),
        ("vector", pa.array(["x"]), "expected a list"),
        ("vector", pa.array([[1, 2, 3]], pa.list_(pa.float32(), 3)), "holds 3 numbers, but vector_spec.dim is 2"),
        ("extra", pa.array([b"x"]), "payload_cols names 'extra'"),
    ],
)
def test_a_column_of_a_wrong_type_is_refused(column: str, values: pa.Array, message: str) -> None:
    columns = {"id": pa.array([1]), "vector": pa.array([[1, 0]], pa.list_(pa.float32())), "extra": pa.array(["x"])}
    columns[column] = values
    with pytest.raises(SourceSchemaError, match=message):
        RowContract(config(payload_cols=("extra",)), pa.table(columns).schema)


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(-20, 20) | st.none(), max_size=60), batch=st.integers(1, 9), strings=st.booleans())
def test_duplicates_are_those_after_their_original(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int | None], batch: int, strings: bool
) -> None:
    kind = pa.string() if strings else pa.int64()
    values = [i for i in ids if i is not None]
    column = pa.array([str(i) if strings else i for i in values], kind)
    folder: Path = tmp_path_factory.mktemp("duplicates")
    # A huge expected count forces several buckets.
    finder = DuplicateFinder(folder, 700_000, kind)
    for start in range(0, len(column), batch):
        part = column[start : start + batch]
        finder.add(part, hash_column(part), np.arange(start, start + len(part)))
    found = sorted(row for table in finder.repeats() for row in table["row"].to_pylist())
    assert found == [n for n, value in enumerate(values) if value in values[:n]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=40) | st.none(), max_size=30), st.integers(0, 5))
def test_string_hashes_depend_on_the_value_alone(values: list[str | None], offset: int) -> None:
    column = pa.array(values, pa.string())
    hashes = hash_column(column)
    assert hash_column(column.slice(offset)).tolist() == hashes[offset:].tolist()
    singles = [int(hash_column(pa.array([value], pa.string()))[0]) for value in values]
    assert singles == hashes.tolist()
    assert len(set(singles)) == len(set(values))


def test_a_sample_does_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.arange(500), np.arange(100)])
    vectors = np.repeat(ids[:, None], 3, axis=1).astype(np.float32)
    takes = []
    for order in (np.arange(600), rng.permutation(600)):
        sample = SmallestHashSample(50, 3, pa.int64())
        for part in np.array_split(order, 7):
            column = pa.array(ids[part])
            sample.add(column, hash_column(column), np.sort(part), vectors[part])
        drawn, found = sample.take()
        assert found[:, 0].tolist() == drawn.to_pylist()
        takes.append(drawn.to_pylist())
    assert takes[0] == takes[1]
    assert len(set(takes[0])) == 50


def test_a_digest_is_of_the_rows_whatever_their_order() -> None:
    rng = np.random.default_rng(1)
    ids, vectors = np.arange(100), rng.standard_normal((100, 8)).astype(np.float32)

    def digest(rows: np.ndarray, changed: np.ndarray = vectors) -> str:
        out = RowSetDigest()
        for part in np.array_split(rows, 3):
            out.add(hash_column(pa.array(ids[part])), hash_vectors(changed[part]), [])
        return out.hexdigest()

    whole = digest(np.arange(100))
    assert digest(rng.permutation(100)) == whole
    assert digest(np.arange(99)) != whole
    assert digest(np.append(np.arange(100), 5)) != whole
    flipped = vectors.copy()
    flipped[3, 7] = -flipped[3, 7]
    assert digest(np.arange(100), flipped) != whole
    merged = RowSetDigest()
    for half in (np.arange(50), np.arange(50, 100)):
        part = RowSetDigest()
        part.add(hash_column(pa.array(ids[half])), hash_vectors(vectors[half]), [])
        merged.merge(part.hexdigest(), part.rows)
    assert (merged.hexdigest(), merged.rows) == (whole, 100)
