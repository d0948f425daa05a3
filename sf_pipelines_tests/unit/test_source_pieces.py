"""How many requests a part of the source takes, and how large they are."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from sf_pipelines.snapshot.source.files import Span, pin, read_span
from sf_pipelines.snapshot.store import ObjectInfo, Store

MB = 1024 * 1024
COLUMNS = ("id", "vector", "title")
UNITS, ROWS, DIM = 40, 1000, 128


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """First byte and end of each request so far."""
    made: list[tuple[int, int]] = []
    get_range = Store.get_range

    def counted(self: Store, info: ObjectInfo, start: int, end: int) -> bytes:
        made.append((start, end))
        return get_range(self, info, start, end)

    monkeypatch.setattr(Store, "get_range", counted)
    return made


def table(*, blob: int = 0) -> pa.Table:
    """20 MB of vectors, and ``blob`` bytes a row between the columns that are read."""
    rng, rows = np.random.default_rng(0), UNITS * ROWS
    vectors = pa.array(rng.standard_normal(rows * DIM, dtype=np.float32))
    columns = {"id": pa.array(np.arange(rows)), "vector": pa.FixedSizeListArray.from_arrays(vectors, DIM)}
    if blob:
        noise = rng.integers(0, 256, ROWS * blob, dtype=np.uint8).tobytes()
        columns["blob"] = pa.array([noise[n * blob : (n + 1) * blob] for n in range(ROWS)] * UNITS, pa.binary())
    return pa.table({**columns, "title": [f"row {n}" for n in range(rows)]})


def read(path: Path, requests: list[tuple[int, int]], first: int, last: int) -> pa.Table:
    """Some row groups or batches of a file; only what was requested for them stays in ``requests``."""
    listing = pin(str(path), None, COLUMNS)
    span = Span(file=0, first_unit=first, last_unit=last)
    requests.clear()
    found = read_span(Store.open(listing.root), listing.files[0], span, listing.arrow_schema, 700)
    return pa.Table.from_batches([batch.rows for batch in found])


def sizes(requests: list[tuple[int, int]]) -> list[int]:
    return [end - start for start, end in requests]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_neighbouring_row_groups_are_one_request(
    tmp_path: Path, requests: list[tuple[int, int]], compression: str
) -> None:
    rows = table()
    pq.write_table(rows, tmp_path / "x.parquet", row_group_size=ROWS, compression=compression, use_dictionary=False)
    assert read(tmp_path / "x.parquet", requests, 0, UNITS).equals(rows.select(COLUMNS))
    # The end of the file, and twice up to 16 MB.
    assert len(requests) == 3
    assert max(sizes(requests)) <= 16 * MB
    assert read(tmp_path / "x.parquet", requests, 10, 20).equals(rows.select(COLUMNS).slice(10 * ROWS, 10 * ROWS))
    assert len(requests) == 2
    assert sum(sizes(requests)) < 6 * MB


def test_columns_that_nobody_wants_are_not_read_if_they_are_large(
    tmp_path: Path, requests: list[tuple[int, int]]
) -> None:
    rows = table(blob=3000)
    pq.write_table(rows, tmp_path / "x.parquet", row_group_size=ROWS, use_dictionary=False, write_statistics=False)
    assert read(tmp_path / "x.parquet", requests, 0, 5).equals(rows.select(COLUMNS).slice(0, 5 * ROWS))
    # Between title of one and id of the next there is nothing; between vector and title are 3 MB.
    assert len(requests) == 7
    assert sum(sizes(requests)) < 4 * MB


def test_a_large_row_group_is_streamed(tmp_path: Path, requests: list[tuple[int, int]]) -> None:
    rows = table()
    pq.write_table(rows, tmp_path / "x.parquet", row_group_size=UNITS * ROWS, compression="none", use_dictionary=False)
    assert read(tmp_path / "x.parquet", requests, 0, 1).equals(rows.select(COLUMNS))
    assert max(sizes(requests)) <= 4 * MB
    assert len(requests) < 12


@pytest.mark.parametrize("compression", ["uncompressed", "lz4"])
def test_small_arrow_batches_share_a_request(tmp_path: Path, requests: list[tuple[int, int]], compression: str) -> None:
    rows = table()
    feather.write_feather(rows, str(tmp_path / "x.feather"), chunksize=ROWS, compression=compression)
    assert read(tmp_path / "x.feather", requests, 0, UNITS).equals(rows.select(COLUMNS))
    assert len(requests) < 8
    assert max(sizes(requests)) <= 4 * MB
    covered = sorted(requests[1:])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(covered)), "read twice"


def test_a_small_file_is_one_request(tmp_path: Path, requests: list[tuple[int, int]]) -> None:
    rows = table().slice(0, 50)
    pq.write_table(rows, tmp_path / "x.parquet", row_group_size=10)
    assert read(tmp_path / "x.parquet", requests, 1, 3).equals(rows.select(COLUMNS).slice(10, 20))
    assert len(requests) == 1
