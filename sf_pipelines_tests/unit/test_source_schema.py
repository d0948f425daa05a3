"""Files of one source that differ, as exports of one table by several hands do."""

import datetime as dt
import decimal
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq
import pytest

from sf_pipelines.snapshot.errors import SourceSchemaError
from sf_pipelines.snapshot.source.files import SourceListing, Span, pin, read_span
from sf_pipelines.snapshot.store import PinnedFile, Store

D = decimal.Decimal
U = uuid.UUID("0c18109c-fe5c-4d7a-bcae-bd2ef4d78d20")
TIMES = [dt.datetime(1970, 1, 1, 0, 0, second, tzinfo=dt.UTC) for second in range(2)]
WORDS = pa.dictionary(pa.int8(), pa.string())


def read(listing: SourceListing, batch_rows: int = 2) -> dict[str, list[Any]]:
    """All rows, by batches whose types must be those that were pinned."""
    store, rows = Store.open(listing.root), pa.table(listing.arrow_schema.empty_table())
    for number, file in enumerate(listing.files):
        for unit in range(len(file.unit_rows)):
            span = Span(file=number, first_unit=unit, last_unit=unit + 1)
            for batch in read_span(store, file, span, listing.arrow_schema, batch_rows):
                assert batch.rows.schema == listing.arrow_schema
                assert batch.rows.num_rows <= batch_rows
                batch.rows.validate(full=True)
                assert batch.first_row == rows.num_rows
                rows = pa.concat_tables([rows, pa.Table.from_batches([batch.rows])])
    assert rows.num_rows == listing.rows
    return rows.to_pydict()


def write(path: Path, columns: dict[str, Any]) -> None:
    made = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(made, path, row_group_size=3)
    elif path.suffix == ".arrows":
        with pa_ipc.new_stream(str(path), made.schema) as stream:
            stream.write_table(made, max_chunksize=2)
    else:
        with pa_ipc.new_file(str(path), made.schema) as file:
            file.write_table(made, max_chunksize=2)


def arr(kind: pa.DataType, *values: Any) -> pa.Array:
    return pa.array(values, kind)


F32, F64 = pa.float32(), pa.float64()
FITTING = {
    "ids": (arr(pa.int32(), 1, None), arr(pa.int64(), 2**40), "int64", [1, None, 2**40]),
    "signs": (arr(pa.uint32(), 2**32 - 1), arr(pa.int32(), -1), "int64", [2**32 - 1, -1]),
    "large signs": (arr(pa.uint64(), 2**63 - 1), arr(pa.int64(), -1), "int64", [2**63 - 1, -1]),
    "text": (arr(pa.string(), "a"), arr(pa.large_string(), "b"), "large_string", ["a", "b"]),
    "words": (arr(pa.string(), "a"), arr(WORDS, "b", None, "b"), "string", ["a", "b", None, "b"]),
    "categories": (arr(WORDS, "a"), arr(pa.dictionary(pa.int32(), pa.string()), "b"), None, ["a", "b"]),
    "views": (arr(pa.string_view(), "a"), arr(pa.string(), "b"), "string", ["a", "b"]),
    "vectors": (arr(pa.list_(F32), [1, 2]), arr(pa.list_(F32, 2), [3, 4], None), None, [[1, 2], [3, 4], None]),
    "wider vectors": (arr(pa.list_(pa.float16(), 1), [1]), arr(pa.list_(F64, 1), [2]), None, [[1], [2]]),
    "large vectors": (arr(pa.list_(F32, 1), [1], None), arr(pa.large_list(F64), [2]), None, [[1], None, [2]]),
    "vector views": (arr(pa.list_(F32, 2), [1, 2]), arr(pa.list_view(F32), [3, 4], None, [5, 6]), None, None),
    "large views": (arr(pa.large_list_view(F32), [1], None, [], [2, 3]), arr(pa.list_(F32), [4]), None, None),
    "doubles": (arr(F32, 0.5), arr(F64, 1e300), "double", [0.5, 1e300]),
    "small numbers": (arr(pa.int16(), 7), arr(F32, 0.5), "float", [7, 0.5]),
    "numbers": (arr(pa.int32(), 2**31 - 1), arr(F64, 0.5), "double", [2**31 - 1, 0.5]),
    "nothing": (pa.nulls(2), arr(pa.list_(F32, 1), [1]), None, [None, None, [1]]),
    "nothing inside": (arr(pa.list_(pa.null()), [], [None]), arr(pa.list_(pa.string()), ["a"]), None, None),
    "prices": (arr(pa.decimal128(5, 2), D("1.25")), arr(pa.decimal128(9, 4), D("0.0001")), None, None),
    "whole prices": (arr(pa.decimal128(5, 2), D("1.25")), arr(pa.int32(), 3), None, None),
    "days": (arr(pa.date32(), dt.date(2024, 2, 29)), arr(pa.date64(), dt.date(2024, 3, 1)), None, None),
    "times": (
        arr(pa.timestamp("s", "UTC"), dt.datetime(2024, 1, 1, tzinfo=dt.UTC)),
        arr(pa.timestamp("us", "UTC"), dt.datetime(2024, 1, 1, 0, 0, 0, 5, tzinfo=dt.UTC)),
        "timestamp[us, tz=UTC]",
        None,
    ),
    "zones": (arr(pa.timestamp("s", "Z"), 0), arr(pa.timestamp("s", "+00:00"), 1), None, TIMES),
    "words inside of a view": (arr(pa.list_view(WORDS), ["a"]), arr(pa.list_(WORDS), ["b"], None), None, None),
    "bytes in a struct": (
        arr(pa.struct({"a": pa.binary(16), "v": pa.string_view()}), {"a": U.bytes, "v": "x"}),
        arr(pa.struct({"a": pa.binary(16)}), {"a": U.bytes}, None),
        "struct<a: binary, v: string>",
        [{"a": U.bytes, "v": "x"}, {"a": U.bytes, "v": None}, None],
    ),
    "uuids": (arr(pa.uuid(), U.bytes, None), arr(pa.string(), str(U)), "string", [str(U), None, str(U)]),
    "plain uuids": (arr(pa.uuid(), U.bytes), arr(pa.binary(16), U.bytes, None), "string", [str(U), str(U), None]),
    "bytes": (arr(pa.binary(2), b"ab"), arr(pa.binary(), b"c"), "binary", [b"ab", b"c"]),
    "maps": (
        arr(pa.map_(pa.string(), pa.int8()), [("a", 1)], None),
        arr(pa.map_(pa.string(), pa.int64()), [], [("b", 2**40)]),
        "map<string, int64>",
        None,
    ),
    "structs": (
        arr(pa.struct({"a": pa.int8(), "b": pa.list_view(F32)}), {"a": 1, "b": [1]}, None, {"a": 2, "b": None}),
        arr(pa.struct({"c": pa.string(), "a": pa.int64()}), {"c": "x", "a": 2**40}),
        "struct<a: int64, b: list<item: float>, c: string>",
        [{"a": 1, "b": [1], "c": None}, None, {"a": 2, "b": None, "c": None}, {"a": 2**40, "b": None, "c": "x"}],
    ),
    "maps of views": (
        arr(pa.map_(pa.string(), pa.list_view(F32)), [("a", [1]), ("b", None)], None, [("c", [2, 3])]),
        arr(pa.map_(pa.string(), pa.list_(F32)), [("d", [])]),
        None,
        None,
    ),
}


@pytest.mark.parametrize("case", FITTING)
@pytest.mark.parametrize("suffix", ["parquet", "arrow", "arrows"])
@pytest.mark.parametrize("turned", [False, True])
def test_what_loses_nothing_is_unified(tmp_path: Path, case: str, suffix: str, turned: bool) -> None:
    one, other, kind, values = FITTING[case]
    if suffix == "parquet" and pa.float16() in (one.type, other.type):
        pytest.skip("nothing to add")
    values = [*one.to_pylist(), *other.to_pylist()] if values is None else values
    if turned:
        one, other = other, one
        values = [*values[-len(one) :], *values[: len(other)]]
    write(tmp_path / f"1.{suffix}", {"x": one})
    write(tmp_path / f"2.{suffix}", {"z": pa.nulls(len(other)), "x": other})
    write(tmp_path / f"3.{suffix}", {"y": pa.array([], F32)})
    listing = pin(str(tmp_path), None, ("x",))
    if kind is not None and not turned:
        assert listing.columns["x"] == kind
    assert read(listing)["x"] == values


LOSING = {
    "int64 to float": (arr(pa.int64(), 1), arr(F64, 0.5)),
    "int32 to float": (arr(pa.int32(), 1), arr(pa.list_(F32), [0.5])),
    "text to number": (arr(pa.string(), "1"), arr(pa.int64(), 1)),
    "text to dictionary of numbers": (arr(pa.string(), "1"), arr(pa.int64(), 1).dictionary_encode()),
    "text to bytes": (arr(pa.string(), "1"), arr(pa.binary(), b"1")),
    "boolean to number": (arr(pa.bool_(), True), arr(pa.int8(), 1)),
    "decimal to float": (arr(pa.decimal128(4, 2), D("0.10")), arr(F64, 0.1)),
    "dimension": (arr(pa.list_(F32, 2), [1, 2]), arr(pa.list_(F32, 3), [1, 2, 3])),
    "zone": (arr(pa.timestamp("us", "UTC"), 0), arr(pa.timestamp("us"), 0)),
    "day to time": (arr(pa.date32(), 0), arr(pa.timestamp("us"), 0)),
    "list to value": (arr(pa.list_(F32), [1]), arr(F32, 1)),
    "inside of a list": (arr(pa.list_(pa.int64()), [1]), arr(pa.list_(F64), [0.5])),
    "inside of a struct": (arr(pa.struct({"a": pa.int64()}), {"a": 1}), arr(pa.struct({"a": pa.string()}), {"a": "1"})),
    "inside of a map": (arr(pa.map_(WORDS.value_type, F64), []), arr(pa.map_(WORDS.value_type, pa.string()), [])),
    "uuid to bytes": (arr(pa.uuid(), U.bytes), arr(pa.binary(), U.bytes)),
}


@pytest.mark.parametrize("case", LOSING)
def test_what_would_lose_is_refused_and_names_both_files(tmp_path: Path, case: str) -> None:
    for name, column in zip(("1.arrow", "2.arrow", "3.arrow"), (LOSING[case][0], *LOSING[case]), strict=True):
        write(tmp_path / name, {"x": column})
    with pytest.raises(SourceSchemaError, match=r"column 'x' is .*/3\.arrow, but .*/1\.arrow; one cannot be read as"):
        pin(str(tmp_path), None, ("x",))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (arr(pa.int64(), -1), arr(pa.uint64(), 2**63)),
        (arr(pa.timestamp("ns"), 0), arr(pa.timestamp("us"), 253_402_214_400_000_000)),
    ],
)
def test_a_value_without_room_in_the_common_type_names_file_and_column(
    tmp_path: Path, one: pa.Array, other: pa.Array
) -> None:
    write(tmp_path / "1.parquet", {"x": one})
    write(tmp_path / "2.parquet", {"x": other})
    listing = pin(str(tmp_path), None, ("x",))
    with pytest.raises(SourceSchemaError, match=r"2\.parquet: column 'x' \(.*\) does not fit .*, as which all files"):
        read(listing)


def test_columns_may_be_missing_where_they_may(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", {"id": [1], "v": [0.5]})
    write(tmp_path / "2.arrows", {"w": ["a", "b"], "id": arr(pa.int32(), 2, 3)})
    listing = pin(str(tmp_path), None, ("id", "v", "w"), optional=frozenset({"v", "w"}))
    assert read(listing) == {"id": [1, 2, 3], "v": [0.5, None, None], "w": [None, "a", "b"]}
    with pytest.raises(SourceSchemaError, match=r"2\.arrows has no column v; it has w, id"):
        pin(str(tmp_path), None, ("id", "v", "w"), optional=frozenset({"w"}))
    with pytest.raises(SourceSchemaError, match=r"no file of source .* has a column nix"):
        pin(str(tmp_path), None, ("id", "nix"), optional=frozenset({"nix"}))


def test_a_pinned_source_stays_what_it_was_where_nothing_differs(tmp_path: Path) -> None:
    """What a build key is made of: another text would build every snapshot again."""
    columns = {
        "id": arr(pa.int32(), 1),
        "vector": arr(pa.list_(F32, 2), [1, 2]),
        "tags": arr(pa.struct([pa.field("a", pa.list_(WORDS), nullable=False)]), {"a": ["x"]}),
        "at": arr(pa.timestamp("us", "UTC"), 0),
    }
    for name in ("1.arrow", "2.arrow"):
        write(tmp_path / name, columns)
    listing = pin(str(tmp_path), None, tuple(columns))
    assert listing.columns == {
        "id": "int32",
        "vector": "fixed_size_list<item: float>[2]",
        "tags": "struct<a: list<item: dictionary<values=string, indices=int8, ordered=0>>>",
        "at": "timestamp[us, tz=UTC]",
    }
    assert listing.arrow_schema.metadata is None


def test_pandas_indexes_are_columns_by_their_names(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": np.arange(5.0)})
    frame.set_index(pd.RangeIndex(10, 20, 2, name="id")).to_parquet(tmp_path / "1.parquet", row_group_size=2)
    frame.set_index(pd.Index([7, 5, 3, 1, 0], name="id")).to_parquet(tmp_path / "2.parquet")
    listing = pin(str(tmp_path), None, ("x", "id"))
    assert listing.columns["id"] == "int64"
    assert read(listing)["id"] == [10, 12, 14, 16, 18, 7, 5, 3, 1, 0]
    # Older writers, and those whose index is called like a column, give it a name of its own.
    stored = pa.Table.from_pandas(frame.set_index(pd.Index(list("abcde"), name="sku")))
    renamed = stored.rename_columns(["x", "__index_level_0__"]).replace_schema_metadata(
        {
            b"pandas": stored.schema.metadata[b"pandas"].replace(
                b'"field_name": "sku"', b'"field_name": "__index_level_0__"'
            )
        }
    )
    pq.write_table(renamed, tmp_path / "3.parquet")
    assert read(pin(str(tmp_path / "3.parquet"), None, ("sku",)))["sku"] == list("abcde")


def test_a_range_of_another_length_is_no_index(tmp_path: Path) -> None:
    frame = pa.Table.from_pandas(pd.DataFrame({"x": np.arange(5.0)}).rename_axis("id"))
    pq.write_table(frame.filter(pc.field("x") > 1), tmp_path / "1.parquet")
    with pytest.raises(SourceSchemaError, match=r"1\.parquet has no column id; it has x"):
        pin(str(tmp_path), None, ("id",))
    for said in (b"no JSON", b"[1]", b'{"index_columns": [{"kind": "range"}], "columns": 5}'):
        pq.write_table(frame.replace_schema_metadata({b"pandas": said}), tmp_path / "1.parquet")
        with pytest.raises(SourceSchemaError, match=r"1\.parquet has no column id; it has x"):
            pin(str(tmp_path), None, ("id",))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_scan_of_a_stream_leaves_its_rows_alone(
    tmp_path: Path, compression: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, options = np.random.default_rng(0), pa_ipc.IpcWriteOptions(compression=compression)
    columns = {
        "word": pa.array([f"w{n % 7}" for n in range(40_000)]).dictionary_encode(),
        "vector": pa.FixedSizeListArray.from_arrays(rng.standard_normal(40_000 * 64).astype(np.float32), 64),
    }
    made = pa.table(columns)
    path = tmp_path / "big.arrows"
    with pa_ipc.new_stream(str(path), made.schema, options=options) as stream:
        stream.write_table(made, max_chunksize=10_000)
    whole, sizes = PinnedFile.read, list[int]()

    def counted(self: PinnedFile, size: int | None = -1) -> bytes:
        data = whole(self, size)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(PinnedFile, "read", counted)
    listing = pin(str(path), None, ("word", "vector"))
    assert listing.files[0].unit_rows == (40_000,)
    assert sum(sizes) < path.stat().st_size / 5
    assert read(listing, 3000)["word"] == made["word"].to_pylist()


def test_damaged_streams_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.arrows"
    write(path, {"x": list(range(1000))})
    data = path.read_bytes()
    for damaged in (
        data[:-200],
        data[:5],
        data[:8] + b"\xff" * 200 + data[208:],
        data[:300] + b"\x01" * 300 + data[600:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(SourceSchemaError, match=r"bad\.arrows"):
            read(pin(str(path), None, ("x",)))
