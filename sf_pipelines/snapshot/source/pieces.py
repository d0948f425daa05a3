"""Few, large requests in place of one for each column of each row group.

An answer of an object store takes as long to begin as a megabyte takes to arrive, so what lies close together is read
together: the columns of neighbouring row groups, and the space between them. What is held at a time is bounded.
"""

import io
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from sf_pipelines.snapshot.store import PinnedFile

# Bytes that are asked for together, and the most that are held, the end of the file apart.
_TOGETHER_BYTES = 16 * 1024 * 1024
# A gap that is read and thrown away rather than asked around; as in Rust's object_store and Arrow's dataset readers.
_GAP_BYTES = 1024 * 1024
# Of each column of a row group that is too large to be held, and of anything else that is read from front to back.
AHEAD_BYTES = 4 * 1024 * 1024
# Footers of Parquet and Arrow files are at the end; what Arrow itself begins with.
_TAIL_BYTES = 64 * 1024

_Extent = tuple[int, int]


class PieceReader(io.RawIOBase):
    """A pinned file as a file that keeps its last bytes and those pieces that were asked for in advance.

    Attributes:
        ahead: bytes that a read fetches at least where nothing is kept, for a file that is read from front to back.

    Args:
        raw: the file.

    Raises:
        SourceChangedError: the file is no longer the pinned version; here and by ``read``.
    """

    def __init__(self, raw: PinnedFile) -> None:
        self.ahead = 0
        self._raw = raw
        self._position = 0
        self._pieces: list[tuple[int, bytes]] = []
        size = raw.size()
        self._tail = self._fetch(max(0, size - _TAIL_BYTES), size)

    @property
    def is_parquet(self) -> bool:
        """Whether the file ends as Parquet files do."""
        return self._tail[1].endswith(b"PAR1")

    def hold(self, extents: Sequence[_Extent]) -> None:
        """Fetches pieces and gives up those of the last time.

        Args:
            extents: first byte and end of each; one request each.
        """
        self._pieces = []
        self._pieces = [self._fetch(*extent) for extent in extents if extent[0] < self._tail[0]]

    def _fetch(self, start: int, end: int) -> tuple[int, bytes]:
        self._raw.seek(start)
        return start, self._raw.read(end - start)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Present offset in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to an offset."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._raw.size()}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Up to ``size`` bytes; short only at the end of the file."""
        whole = self._raw.size()
        start = self._position
        end = whole if size is None or size < 0 else min(whole, start + size)
        if end <= start:
            return b""
        data = self._held(start, end)
        if data is None:
            data = self._read_ahead(start, end) if self.ahead else self._fetch(start, end)[1]
        self._position = start + len(data)
        return data

    def _read_ahead(self, start: int, end: int) -> bytes:
        """The bytes asked for; those after them are held, and what is held already is not fetched again."""
        known = next((data[start - first :] for first, data in self._pieces if 0 <= start - first < len(data)), b"")
        stop = max(end, min(self._raw.size(), start + self.ahead))
        data = known + self._fetch(start + len(known), stop)[1]
        self._pieces = [(start, data)]
        return data[: end - start]

    def _held(self, start: int, end: int) -> bytes | None:
        for first, data in (self._tail, *self._pieces):
            if first <= start and end <= first + len(data):
                return data[start - first : end - first]
        return None


def row_group_batches(
    file: PieceReader, units: Sequence[int], columns: Sequence[str], batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """Rows of some row groups of a Parquet file; neighbours that fit are fetched together, a larger one is streamed.

    Args:
        file: over the object.
        units: numbers of the row groups.
        columns: names.
        batch_rows: most rows of a batch.
    """
    # Pages are streamed: pre-buffering would hold whole row groups, which may be the whole file.
    parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=AHEAD_BYTES)
    for together, extents in _plan(parquet.metadata, units, columns):
        file.hold(extents)
        yield from parquet.iter_batches(batch_rows, row_groups=together, columns=list(columns))


def _plan(
    metadata: pq.FileMetaData, units: Sequence[int], columns: Sequence[str]
) -> Iterator[tuple[list[int], list[_Extent]]]:
    """Row groups that are read together, and what is fetched for them: nothing where one is too large."""
    paths = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
    # A name with a dot may take in a column that is not wanted: it is fetched, no more.
    leaves = [n for n, path in enumerate(paths) if any(path == name or path.startswith(f"{name}.") for name in columns)]
    together: list[int] = []
    extents: list[_Extent] = []
    for unit in units:
        more = _joined(extents + [_extent(metadata.row_group(unit).column(leaf)) for leaf in leaves])
        if together and _bytes(more) > _TOGETHER_BYTES:
            yield together, extents if _bytes(extents) <= _TOGETHER_BYTES else []
            together = []
            more = _joined([_extent(metadata.row_group(unit).column(leaf)) for leaf in leaves])
        together.append(unit)
        extents = more
    if together:
        yield together, extents if _bytes(extents) <= _TOGETHER_BYTES else []


def _extent(chunk: pq.ColumnChunkMetaData) -> _Extent:
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    return start, start + chunk.total_compressed_size


def _joined(extents: list[_Extent]) -> list[_Extent]:
    """The same bytes in fewer pieces, gaps between them included."""
    joined: list[_Extent] = []
    for start, end in sorted(extents):
        if joined and start - joined[-1][1] <= _GAP_BYTES:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _bytes(extents: list[_Extent]) -> int:
    return sum(end - start for start, end in extents)
