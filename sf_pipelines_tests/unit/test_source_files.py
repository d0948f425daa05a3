from pathlib import Path

import numpy as np
import pyarrow as pa
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
from sf_pipelines.snapshot.store import Store

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
        for batch in read_span(store, file, span, COLUMNS, batch_rows):
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
        ("**/*.parquet", ["_temporary/x.parquet", "a/1.parquet", "a/deep/2.parquet"]),
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
    batches = list(read_span(source, only.files[0], span, COLUMNS, 100))
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
    with pytest.raises(SourceSchemaError, match="all files need the same column types"):
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
