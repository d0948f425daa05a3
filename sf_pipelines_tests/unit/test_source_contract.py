import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_pipelines.snapshot.config import VectorSpec, WriteConfig
from sf_pipelines.snapshot.errors import ConfigError, SourceSchemaError
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.source import hashing, samples
from sf_pipelines.snapshot.source.contract import RowContract
from sf_pipelines.snapshot.source.files import SourceBatch
from sf_pipelines.snapshot.source.hashing import RowSetDigest, hash_column, hash_vectors
from sf_pipelines.snapshot.source.samples import DuplicateFinder, SmallestHashSample

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


@pytest.mark.parametrize(
    ("metric", "reasons"), [("dot_product", ["norm_out_of_range"] * 2), ("l2", []), ("cosine", ["zero_norm"] * 3)]
)
def test_tiny_vectors_that_break_index_training_are_rejected(metric: str, reasons: list[str]) -> None:
    vectors = [[1e-25, 0], [0, 0], [1e-45, 1e-45], [1e-17, 0]]
    rows = pa.table({"id": range(4), "vector": pa.array(vectors, pa.list_(pa.float32()))})
    checked = check(rows, metric=metric)
    assert checked.rejects["reason"].to_pylist() == reasons
    if metric == "dot_product":
        assert checked.ids.to_pylist() == [1, 3]
        assert "squared norm below 1e-36" in checked.rejects["detail"].to_pylist()[0]


def stored_columns(columns: dict[str, pa.Array], **more: Any) -> pa.RecordBatch:
    count = len(next(iter(columns.values())))
    rows = pa.table({"id": range(count), "vector": pa.array([[1, 0]] * count, pa.list_(pa.float32())), **columns})
    contract, batch = RowContract(config(**more), rows.schema), rows.combine_chunks().to_batches()[0]
    checked = contract.check(SourceBatch(batch, 0, "f", 0))
    assert checked.rejects.num_rows == 0
    return checked.stored


@pytest.mark.parametrize("encoded", [False, True])
def test_float16_filters_are_stored_as_float32(encoded: bool) -> None:
    halves = pa.array([0.1, None, INF], pa.float16())
    if encoded:
        halves = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), halves)
    stored = stored_columns({"half": halves}, filter_cols=("half",))["half"]
    assert stored.type == pa.float32()
    assert stored.to_pylist() == [float(np.float16(0.1)), None, INF]


WORDS = pa.dictionary(pa.int32(), pa.string())
NESTED = [
    (pa.list_(WORDS), [["a", None], None, []]),
    (pa.large_list(pa.large_string()), [["a", None], None, []]),
    (pa.list_(WORDS, 2), [["a", "b"], None, ["a", None]]),
    (pa.struct({"w": WORDS, "l": pa.list_(WORDS)}), [{"w": "a", "l": ["b"]}, {"w": None, "l": None}]),
    (pa.list_(pa.float16()), [[0.5, None], None]),
    (pa.float16(), [0.5, None]),
]


@pytest.mark.parametrize(("kind", "values"), NESTED)
def test_nested_dictionaries_are_payload_by_their_values(kind: pa.DataType, values: list[Any]) -> None:
    # Readers pass on slices.
    column = pa.array([values[0], *values], kind)[1:]
    stored = stored_columns({"extra": column}, payload_cols=("extra",))
    assert [json.loads(text)["extra"] for text in stored["payload"].to_pylist()] == values


def test_a_number_that_json_cannot_say_is_null_in_the_payload() -> None:
    columns = {"x": pa.array([NAN, INF, 1.5]), "y": pa.array([[NAN], [-INF, 2.5], []])}
    stored = stored_columns(columns, payload_cols=("x", "y"))
    payloads = [json.loads(text) for text in stored["payload"].to_pylist()]
    assert payloads == [{"x": None, "y": [None]}, {"x": None, "y": [None, 2.5]}, {"x": 1.5, "y": []}]


@pytest.mark.parametrize(
    "name",
    ["a.b", "_rowid", "_rowaddr", "_rowoffset", "_row_created_at_version", "_row_last_updated_at_version", "_ROW_x"],
)
def test_filter_columns_that_the_index_cannot_name_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"filter_cols: {name} "):
        config(filter_cols=("price", name))
    assert config(payload_cols=(name,), filter_cols=("row", "_ro")).payload_cols == (name,)


@pytest.mark.parametrize(("field", "value"), [("payload_cols", ("a", "")), ("filter_cols", ("a", "")), ("id_col", "")])
def test_an_empty_column_name_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"WriteConfig\.{field}.*at least 1 character"):
        config(**{field: value})
    with pytest.raises(ConfigError, match=r"VectorSpec\.vector_col.*at least 1 character"):
        VectorSpec(dim=2, vector_col="")


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
    checked = contract.check(SourceBatch(rows.to_batches()[0], 0, "f", 0))
    stored, vectors = checked.stored, checked.vectors
    payloads = [json.loads(text) for text in stored["payload"].to_pylist()]
    assert payloads == [{"word": "x", "tags": [1, 2]}, {"word": 'q"\n', "tags": None}, {"word": None, "tags": []}]
    assert stored["price"].to_pylist() == [1.5, None, 2.5]
    assert stored["word"].to_pylist() == ["x", 'q"\n', None]
    assert stored.schema.field("id").type == pa.int64()
    assert vectors.shape == (3, 2)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("id", pa.array([1.5]), "ids are integers, strings or UUIDs"),
        ("vector", pa.array([[1]], pa.list_(pa.int64())), "expected a list or fixed-size list of float16"),
        ("vector", pa.array(["x"]), "expected a list"),
        ("vector", pa.array([[1, 2, 3]], pa.list_(pa.float32(), 3)), "holds 3 numbers, but vector_spec.dim is 2"),
        ("extra", pa.array([1], pa.duration("s")), r"payload_cols names 'extra', which is duration\[s\]; JSON has no"),
        ("extra", pa.array([[1]], pa.list_(pa.duration("s"))), "payload_cols names 'extra'"),
    ],
)
def test_a_column_of_a_wrong_type_is_refused(column: str, values: pa.Array, message: str) -> None:
    columns = {"id": pa.array([1]), "vector": pa.array([[1, 0]], pa.list_(pa.float32())), "extra": pa.array(["x"])}
    columns[column] = values
    with pytest.raises(SourceSchemaError, match=message):
        RowContract(config(payload_cols=("extra",)), pa.table(columns).schema)


@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.integers(-20, 20) | st.none(), max_size=60),
    batch=st.integers(1, 9),
    strings=st.booleans(),
    split_again=st.booleans(),
)
def test_duplicates_are_those_after_their_original(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int | None], batch: int, strings: bool, split_again: bool
) -> None:
    kind = pa.string() if strings else pa.int64()
    values = [i for i in ids if i is not None]
    column = pa.array([str(i) if strings else i for i in values], kind)
    folder: Path = tmp_path_factory.mktemp("duplicates")
    with pytest.MonkeyPatch.context() as patch:
        # Either a huge expected count gives several buckets, or tiny buckets are split again.
        patch.setattr(samples, "_BUCKET_ROWS", 4 if split_again else 100_000)
        finder = DuplicateFinder(folder, 10 if split_again else 700_000, kind)
        for start in range(0, len(column), batch):
            part = column[start : start + batch]
            finder.add(part, hash_column(part), np.arange(start, start + len(part)))
        found = sorted(row for table in finder.repeats() for row in table["row"].to_pylist())
    assert list(folder.iterdir()) == []
    assert found == [n for n, value in enumerate(values) if value in values[:n]]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_huge_table_opens_few_files_and_its_buckets_are_split_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    finder = DuplicateFinder(tmp_path, 10**9, pa.int64())
    assert len(list(tmp_path.iterdir())) == 256
    assert open_files() - before <= 256
    monkeypatch.setattr(samples, "_BUCKET_ROWS", 50)
    ids = np.concatenate([np.arange(100_000), np.arange(0, 100_000, 7)])
    finder.add(pa.array(ids), hash_column(pa.array(ids)), np.arange(len(ids)))
    tables, most = [], 0
    for table in finder.repeats():
        tables.append(table)
        most = max(most, open_files() - before)
    assert len(tables) > 2 * 256
    # A bucket's share, some 450 rows, would hold some 56 repeats.
    assert max(map(len, tables)) < 40
    assert most <= 256
    assert sorted(row for table in tables for row in table["row"].to_pylist()) == list(range(100_000, len(ids)))
    assert list(tmp_path.iterdir()) == []


def test_one_long_string_does_not_cost_a_round_for_each_of_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 0

    def counted(values: hashing.UInt64) -> hashing.UInt64:
        nonlocal rounds
        rounds += 1
        return mix(values)

    mix = hashing.mix
    monkeypatch.setattr(hashing, "mix", counted)
    hash_column(pa.array(["x" * 4_000_000, *map(str, range(100)), "y" * 256]))
    assert rounds <= 2 + 256 // 8


@pytest.mark.parametrize("length", [255, 256, 257, 264, 5000])
def test_long_strings_hash_by_every_byte_whatever_else_is_there(length: int) -> None:
    base = "é" * (length // 2) + "a" * (length % 2)
    others = ["b" + base[1:], base[:-1] + "b", base + "\0", base[: length // 4] + "b" + base[length // 4 + 1 :]]
    values = ["", base, *others, base, None, "short"]
    hashes = hash_column(pa.array(values)).tolist()
    assert [int(hash_column(pa.array([value], pa.string()))[0]) for value in values] == hashes
    assert hash_column(pa.array(["z" * 300, *values])[2:]).tolist() == hashes[1:]
    assert len(set(hashes)) == len(set(values))


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
        sample = SmallestHashSample(50, 3, pa.schema([("id", pa.int64()), ("place", pa.int64())]))
        for part in np.array_split(order, 7):
            column = pa.array(ids[part])
            kept = pa.record_batch({"id": column, "place": pa.array(10 * ids[part])})
            sample.add(kept, hash_column(column), np.sort(part), vectors[part])
        drawn, found = sample.take()
        assert found[:, 0].tolist() == drawn.column("id").to_pylist()
        assert (10 * found[:, 0]).tolist() == drawn.column("place").to_pylist()
        takes.append(drawn.column("id").to_pylist())
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
