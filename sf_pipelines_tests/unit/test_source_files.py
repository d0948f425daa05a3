import os
from pathlib import Path

import boto3
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import (
    SourceChangedError,
    SourceEmptyError,
    SourceNotFoundError,
    SourceSchemaError,
)
from sf_pipelines.snapshot.source.files import Span, find_files, pin, plan_ranges, read_span
from sf_pipelines.snapshot.store import PinnedFile, Store

COLUMNS = ("id", "vector")


def table(start: int, rows: int, dim: int = 4) -> pa.Table:
    vectors = np.arange(rows * dim, dtype=np.float32)
    return pa.table(
        {
            "id": np.arange(start, start + rows),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors), dim),
            "other": ["x"] * rows,
        }
    )


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    root = tmp_path / "lake"
    (root / "a" / "deep").mkdir(parents=True)
    (root / "_temporary").mkdir()
    pq.write_table(table(0, 10), root / "a" / "1.parquet", row_group_size=4)
    pq.write_table(table(10, 5), root / "a" / "deep" / "2.parquet")
    feather.write_feather(table(15, 7), str(root / "b.feather"), chunksize=3, compression="uncompressed")
    (root / "_SUCCESS").write_bytes(b"")
    (root / "_temporary" / "x.parquet").write_bytes(b"half")
    (root / "notes.txt").write_text("not a table")
    return root


def read_ids(listing, batch_rows: int) -> list[int]:
    store = Store.open(listing.root)
    out: list[int] = []
    for number, file in enumerate(listing.files):
        span = Span(file=number, first_unit=0, last_unit=len(file.unit_rows))
        for batch in read_span(store, file, span, listing.arrow_schema, batch_rows):
            assert batch.first_row == len(out)
            assert batch.rows.schema.names == list(COLUMNS)
            out += batch.rows.column("id").to_pylist()
    return out


def test_a_folder_is_all_its_tables_and_no_marker_files(lake: Path) -> None:
    listing = pin(str(lake), None, COLUMNS)
    assert [file.key for file in listing.files] == ["a/1.parquet", "a/deep/2.parquet", "b.feather"]
    assert [file.unit_rows for file in listing.files] == [(4, 4, 2), (5,), (3, 3, 1)]
    assert listing.rows == 22
    assert listing.arrow_schema.field("vector").type == pa.list_(pa.float32(), 4)
    assert read_ids(listing, 3) == list(range(22))


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("a/*.parquet", ["1.parquet"]),
        ("**/*.parquet", ["a/1.parquet", "a/deep/2.parquet"]),
        ("**/_temporary/*.parquet", ["_temporary/x.parquet"]),
        ("**/_*/*.parquet", ["_temporary/x.parquet"]),
        ("_temporary/*.parquet", ["x.parquet"]),
        ("a/**/[12].parquet", ["1.parquet", "deep/2.parquet"]),
        ("?.feather", ["b.feather"]),
        ("a/[!1].parquet", None),
        ("a/1.parquet", ["1.parquet"]),
        ("nowhere", None),
        ("nowhere/*.parquet", None),
    ],
)
def test_globs(lake: Path, pattern: str, keys: list[str] | None) -> None:
    if keys is None:
        with pytest.raises(SourceNotFoundError, match=r"nowhere|matches no file"):
            find_files(f"{lake}/{pattern}", None)
    else:
        assert [info.key for info in find_files(f"{lake}/{pattern}", None)[1]] == keys


def test_s3_is_read_like_a_folder(lake: Path, moto_options: S3Options, bucket: str) -> None:
    store = Store.open(f"s3://{bucket}/lake", moto_options)
    for path in lake.rglob("*.parquet"):
        store.upload(path, path.relative_to(lake).as_posix())
    listing = pin(f"s3://{bucket}/lake/a", moto_options, COLUMNS)
    assert listing.rows == 15
    only = pin(f"s3://{bucket}/lake/a/1.parquet", moto_options, COLUMNS)
    span = Span(file=0, first_unit=1, last_unit=3)
    source = Store.open(only.root, moto_options)
    batches = list(read_span(source, only.files[0], span, only.arrow_schema, 100))
    assert [row for batch in batches for row in batch.rows.column("id").to_pylist()] == [4, 5, 6, 7, 8, 9]
    assert batches[0].first_row == 4
    with pytest.raises(SourceNotFoundError):
        pin(f"s3://{bucket}/nothing", moto_options, COLUMNS)


def test_a_file_that_changes_is_noticed(lake: Path) -> None:
    listing = pin(str(lake / "b.feather"), None, COLUMNS)
    feather.write_feather(table(100, 7), str(lake / "b.feather"), chunksize=3, compression="uncompressed")
    with pytest.raises(SourceChangedError, match=r"b\.feather changed while it was read"):
        read_ids(listing, 100)
    (lake / "b.feather").unlink()
    with pytest.raises(SourceChangedError):
        read_ids(listing, 100)


def test_what_cannot_be_used_is_refused_by_name(lake: Path) -> None:
    with pytest.raises(SourceSchemaError, match="no column nothing"):
        pin(str(lake), None, ("id", "nothing"))
    (lake / "bad.parquet").write_bytes(b"garbage, not a table")
    with pytest.raises(SourceSchemaError, match=r"bad\.parquet is neither Parquet nor"):
        pin(str(lake), None, COLUMNS)
    (lake / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(SourceSchemaError, match=r"bad\.parquet cannot be read"):
        pin(str(lake), None, COLUMNS)
    pq.write_table(table(0, 3, dim=5), lake / "bad.parquet")
    with pytest.raises(
        SourceSchemaError, match=r"\[5\] in .*/bad\.parquet, but .*\[4\] in .*/a/1\.parquet; one cannot"
    ):
        pin(str(lake), None, COLUMNS)


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    pq.write_table(table(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(SourceEmptyError, match="no rows"):
        pin(str(tmp_path), None, COLUMNS)


@pytest.mark.parametrize("target", [1, 3, 6, 9, 100])
def test_ranges_cover_every_unit_once(lake: Path, target: int) -> None:
    listing = pin(str(lake), None, COLUMNS)
    units = [
        (span.file, unit)
        for spans in plan_ranges(listing.files, target)
        for span in spans
        for unit in range(span.first_unit, span.last_unit)
    ]
    assert units == [(n, unit) for n, file in enumerate(listing.files) for unit in range(len(file.unit_rows))]
    for spans in plan_ranges(listing.files, target):
        rows = sum(sum(listing.files[s.file].unit_rows[s.first_unit : s.last_unit]) for s in spans)
        assert rows <= max(target, 5)


def found_keys(source: str, options: S3Options | None = None) -> list[str]:
    return [info.key for info in find_files(source, options)[1]]


@pytest.fixture
def spark(tmp_path: Path) -> Path:
    """Two tables as folders, beside a file of the same kind of name."""
    root = tmp_path / "spark"
    for name, start in (("x.parquet", 0), ("y.PARQUET", 4)):
        (root / name).mkdir(parents=True)
        pq.write_table(table(start, 4), root / name / "part-0.parquet")
        (root / name / "_SUCCESS").write_bytes(b"")
        (root / name / ".part-0.parquet.crc").write_bytes(b"crc")
        (root / name / "notes.txt").write_text("not a table")
    pq.write_table(table(8, 4), root / "z.parquet")
    pq.write_table(table(8, 4), root / ".hidden.parquet")
    return root


def test_a_folder_may_be_named_like_a_file(spark: Path) -> None:
    assert read_ids(pin(str(spark / "x.parquet"), None, COLUMNS), 10) == [0, 1, 2, 3]
    assert found_keys(f"{spark}/*.parquet") == ["x.parquet/part-0.parquet", "z.parquet"]
    assert found_keys(str(spark)) == ["x.parquet/part-0.parquet", "y.PARQUET/part-0.parquet", "z.parquet"]
    assert found_keys(f"{spark}/.*.parquet") == [".hidden.parquet"]


def test_folders_on_s3_may_be_named_like_files_and_have_markers(
    spark: Path, moto_options: S3Options, bucket: str
) -> None:
    assert moto_options.secret_access_key is not None
    client = boto3.client(
        "s3",
        endpoint_url=moto_options.endpoint_url,
        region_name=moto_options.region,
        aws_access_key_id=moto_options.access_key_id,
        aws_secret_access_key=moto_options.secret_access_key.get_secret_value(),
    )
    for marker in ("spark/", "spark/x.parquet/", "spark/none.parquet/"):
        client.put_object(Bucket=bucket, Key=marker, Body=b"")
    client.close()
    store = Store.open(f"s3://{bucket}/spark", moto_options)
    store.upload(spark / "x.parquet" / "part-0.parquet", "x.parquet/part-0.parquet")
    store.upload(spark / "z.parquet", "datafile")
    for source in ("spark", "spark/", "spark/*.parquet", "spark/**"):
        expected = ["datafile"] * (source == "spark/**") + ["x.parquet/part-0.parquet"]
        assert found_keys(f"s3://{bucket}/{source}", moto_options) == expected
    assert found_keys(f"s3://{bucket}/spark/x.parquet", moto_options) == ["part-0.parquet"]
    assert found_keys(f"s3://{bucket}/spark/datafile", moto_options) == ["datafile"]
    assert found_keys(f"s3://{bucket}", moto_options) == ["spark/x.parquet/part-0.parquet"]
    with pytest.raises(SourceNotFoundError, match=r"none\.parquet"):
        find_files(f"s3://{bucket}/spark/none.parquet", moto_options)


@pytest.mark.parametrize("name", ["part[1].parquet", "datafile", "DATA.PARQUET", "a b%20*.parquet"])
def test_a_file_is_found_by_its_literal_name(tmp_path: Path, name: str) -> None:
    pq.write_table(table(0, 3), tmp_path / name)
    assert read_ids(pin(str(tmp_path / name), None, COLUMNS), 10) == [0, 1, 2]
    assert read_ids(pin((tmp_path / name).as_uri(), None, COLUMNS), 10) == [0, 1, 2]


def test_brackets_are_a_pattern_where_no_such_file_is(tmp_path: Path) -> None:
    for name in ("part1.parquet", "part2.parquet"):
        pq.write_table(table(0, 3), tmp_path / name)
    assert found_keys(f"{tmp_path}/part[1].parquet") == ["part1.parquet"]


def test_suffixes_are_known_in_any_case(tmp_path: Path) -> None:
    pq.write_table(table(0, 3), tmp_path / "DATA.PARQUET")
    assert found_keys(str(tmp_path)) == ["DATA.PARQUET"]


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_damaged_parquet_pages_name_the_file(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "bad.parquet"
    pq.write_table(table(0, 5000), path, compression=compression, use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start + 60 : start + 2000] = b"\xff" * 1940
    path.write_bytes(data)
    listing = pin(str(path), None, COLUMNS)
    with pytest.raises(SourceSchemaError, match=r"bad\.parquet cannot be read"):
        read_ids(listing, 10_000)


def test_a_damaged_parquet_footer_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    pq.write_table(table(0, 50), path)
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[-8:-4], "little")
    data[-8 - length : -8] = b"\xff" * length
    path.write_bytes(data)
    with pytest.raises(SourceSchemaError, match=r"bad\.parquet cannot be read"):
        pin(str(path), None, COLUMNS)


def test_a_damaged_arrow_body_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.arrow"
    feather.write_feather(table(0, 5000), str(path), compression="zstd")
    data = path.read_bytes()
    frame = data.index(b"\x28\xb5\x2f\xfd")  # how a zstd frame begins
    path.write_bytes(data[: frame + 12] + b"\xff" * 500 + data[frame + 512 :])
    with pytest.raises(SourceSchemaError, match=r"bad\.arrow cannot be read"):
        read_ids(pin(str(path), None, COLUMNS), 10_000)


@pytest.mark.parametrize("size", [0, 1])
def test_an_empty_file_is_called_empty(lake: Path, size: int) -> None:
    (lake / "bad.parquet").write_bytes(b"x" * size)
    expected = r"bad\.parquet is empty \(0 bytes\)" if size == 0 else r"bad\.parquet is neither"
    with pytest.raises(SourceSchemaError, match=expected):
        pin(str(lake), None, COLUMNS)


def test_a_repeated_column_is_named(tmp_path: Path) -> None:
    rows = table(0, 3).rename_columns(["id", "vector", "id"])
    with pa_ipc.new_file(str(tmp_path / "twice.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    with pytest.raises(SourceSchemaError, match=r"twice\.arrow has more than one column id"):
        pin(str(tmp_path), None, COLUMNS)
    assert pin(str(tmp_path), None, ("vector",)).rows == 3


def test_names_and_nullability_of_inner_fields_may_differ(tmp_path: Path) -> None:
    plain = pa.schema(
        [
            ("id", pa.int64()),
            ("vector", pa.list_(pa.float32(), 2)),
            ("tags", pa.struct([("names", pa.list_(pa.string()))])),
        ]
    )
    strict_names = pa.list_(pa.field("element", pa.string(), nullable=False))
    strict = pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            ("vector", pa.list_(pa.field("element", pa.float32(), nullable=False), 2)),
            ("tags", pa.struct([pa.field("names", strict_names, nullable=False)])),
        ]
    )
    rows = {"id": [1, 2], "vector": [[1, 2], [3, 4]], "tags": [{"names": ["a"]}, {"names": []}]}
    for name, schema in (("1.arrow", strict), ("2.arrow", plain)):
        with pa_ipc.new_file(str(tmp_path / name), schema) as writer:
            writer.write_table(pa.table(rows, schema=schema))
    pq.write_table(pa.table(rows, schema=strict), tmp_path / "3.parquet")
    listing = pin(str(tmp_path), None, tuple(plain.names))
    assert listing.arrow_schema == plain
    assert listing.columns["vector"] == "fixed_size_list<item: float>[2]"
    store = Store.open(listing.root)
    for number, file in enumerate(listing.files):
        for batch in read_span(store, file, Span(file=number, first_unit=0, last_unit=1), plain, 10):
            assert batch.rows.schema == plain
            assert batch.rows.to_pydict() == rows


@pytest.mark.parametrize("compression", ["uncompressed", "lz4"])
def test_a_scan_of_arrow_files_leaves_the_vectors_alone(
    tmp_path: Path, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "big.arrow"
    rows = table(0, 4000, dim=64)
    feather.write_feather(rows, str(path), chunksize=1000, compression=compression)
    whole, sizes = PinnedFile.read, list[int]()

    def counted(self: PinnedFile, size: int | None = -1) -> bytes:
        data = whole(self, size)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(PinnedFile, "read", counted)
    assert pin(str(path), None, COLUMNS).files[0].unit_rows == (1000,) * 4
    assert sum(sizes) < path.stat().st_size / 5


TABLE_SIGNS = {
    "Delta Lake": "_delta_log/00000000000000000000.json",
    "Iceberg": "metadata/00001-0c2a.metadata.json",
    "Hudi": ".hoodie/hoodie.properties",
    "Lance": "_versions/18446744073709551614.manifest",
}


def put_table(root: Path, sign: str, data: str = "data/part-0.parquet") -> None:
    """A folder as such a format lays it out: files of rows, and a sign that says which of them count."""
    for name in (sign, data):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / sign).write_bytes(b"{}")
    pq.write_table(table(0, 3), root / data)


@pytest.mark.parametrize("kind", TABLE_SIGNS)
@pytest.mark.parametrize(
    "source",
    ["t", "", "t/data", "t/data/part-0.parquet", "t/data/*.parquet", "t/**/*.parquet", "*/data/*.parquet", "*", "t/*"],
)
def test_tables_that_know_deleted_rows_are_refused(tmp_path: Path, kind: str, source: str) -> None:
    lake = tmp_path / "lake"
    put_table(lake / "t", TABLE_SIGNS[kind])
    with pytest.raises(SourceSchemaError, match=rf"lake/t is a table of {kind} \(.*deleted or replaced.*{kind} knows"):
        pin(f"{lake}/{source}", None, COLUMNS)


@pytest.mark.parametrize("kind", TABLE_SIGNS)
def test_tables_on_s3_are_refused_and_what_lies_beside_them_is_read(
    tmp_path: Path, kind: str, moto_options: S3Options, bucket: str
) -> None:
    put_table(tmp_path / "x" / "t.parquet", TABLE_SIGNS[kind])
    pq.write_table(table(0, 3), tmp_path / "x" / "plain.parquet")
    # A log of this name is no sign of a table, nor is a file of such a name in a folder of another.
    pq.write_table(table(3, 3), tmp_path / "x" / "my_delta_log.parquet")
    pq.write_table(table(3, 3), tmp_path / "x" / "t.parquet" / "_versions.parquet")
    store = Store.open(f"s3://{bucket}/a", moto_options)
    for path in tmp_path.rglob("*.*"):
        if path.is_file():
            store.upload(path, path.relative_to(tmp_path).as_posix())
    for source in ("a", "a/x/t.parquet", "a/x/t.parquet/data", "a/x/t.parquet/data/part-0.parquet", "a/x/*.parquet"):
        with pytest.raises(SourceSchemaError, match=rf"a/x/t\.parquet is a table of {kind}"):
            pin(f"s3://{bucket}/{source}", moto_options, COLUMNS)
    assert pin(f"s3://{bucket}/a/x/[pm]*.parquet", moto_options, COLUMNS).rows == 6
    assert pin(str(tmp_path / "x" / "plain.parquet"), None, COLUMNS).rows == 3


def test_a_real_lance_dataset_is_refused_though_it_has_no_parquet(tmp_path: Path) -> None:
    lancedb.connect(tmp_path / "lake").create_table("t", table(0, 3))
    for source in ("lake", "lake/t.lance", "lake/*.lance", "lake/**"):
        with pytest.raises(SourceSchemaError, match=r"lake/t\.lance is a table of Lance"):
            pin(str(tmp_path / source), None, COLUMNS)


ODD_KEYS = [
    "lake//x.txt",
    "lake/a/../b.txt",
    "lake/./x.txt",
    "lake/a\x01b.txt",
    "lake/tab\tx",
    "lake/dir//",
    "lake//_y.parquet",
]


def test_objects_whose_keys_no_client_can_ask_for_do_not_stop_a_build(
    lake: Path, moto_options: S3Options, bucket: str
) -> None:
    assert moto_options.secret_access_key is not None
    client = boto3.client(
        "s3",
        endpoint_url=moto_options.endpoint_url,
        region_name=moto_options.region,
        aws_access_key_id=moto_options.access_key_id,
        aws_secret_access_key=moto_options.secret_access_key.get_secret_value(),
    )
    store = Store.open(f"s3://{bucket}/lake", moto_options)
    for path in lake.rglob("*.parquet"):
        store.upload(path, path.relative_to(lake).as_posix())
    plain = pin(f"s3://{bucket}/lake", moto_options, COLUMNS)
    for key in ODD_KEYS:
        client.put_object(Bucket=bucket, Key=key, Body=b"odd")
    for source in ("lake", "lake/**/*.parquet"):
        assert pin(f"s3://{bucket}/{source}", moto_options, COLUMNS) == plain
    assert {info.key for info in store.objects()} == {"a/1.parquet", "a/deep/2.parquet", "_temporary/x.parquet"}
    assert all(info.etag for info in store.objects())
    for key in ("lake/a//rows.parquet", "lake/a/./rows.parquet", "lake/a/r\x02.parquet"):
        client.put_object(Bucket=bucket, Key=key, Body=b"odd")
        for source in ("lake", "lake/**/*.parquet", "lake/a/*.parquet"):
            with pytest.raises(SourceSchemaError, match=r"rows\.parquet' cannot be|r\\x02\.parquet' cannot be"):
                pin(f"s3://{bucket}/{source}", moto_options, COLUMNS)
        assert pin(f"s3://{bucket}/lake/a/deep", moto_options, COLUMNS).rows == 5
        client.delete_object(Bucket=bucket, Key=key)
    client.close()


@pytest.mark.parametrize("name", [b"a\x01b", b"line\nbreak", b"\xff"])
def test_local_files_of_odd_names_do_not_stop_a_build(lake: Path, name: bytes) -> None:
    plain = pin(str(lake), None, COLUMNS)
    Path(os.fsdecode(bytes(lake / "a") + b"/" + name + b".txt")).write_bytes(b"odd")
    assert pin(str(lake), None, COLUMNS) == plain
    Path(os.fsdecode(bytes(lake / "a") + b"/" + name + b".parquet")).write_bytes(b"odd")
    with pytest.raises(SourceSchemaError, match=r"\.parquet' cannot be read: its key has"):
        pin(str(lake), None, COLUMNS)
