"""Few, large requests in place of one for each column of each row group.

An answer of an object store takes as long to begin as a megabyte takes to arrive, so what lies close together is read
together: the columns of neighbouring row groups, and the space between them. What is held at a time is bounded.
"""

import io
import struct
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq

from sf_pipelines.snapshot.source.columns import stored_names
from sf_pipelines.snapshot.store import PinnedFile

# Bytes that are asked for together, and the most that are held, the end of the file apart.
_TOGETHER_BYTES = 16 * 1024 * 1024
# A gap that is read and thrown away rather than asked around; as in Rust's object_store and Arrow's dataset readers.
_GAP_BYTES = 1024 * 1024
# Of each column of a row group that is too large to be held, and of anything else that is read from front to back.
AHEAD_BYTES = 4 * 1024 * 1024
# Footers of Parquet and Arrow files are at the end; what Arrow itself begins with.
_TAIL_BYTES = 64 * 1024
# How each message of an Arrow stream begins.
STREAM_MAGIC = b"\xff\xff\xff\xff"
# The kind of a message that holds rows, in its header.
_RECORD_BATCH = 3

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

    @property
    def is_arrow_file(self) -> bool:
        """Whether the file ends as Arrow's random-access files do; streams end anyhow."""
        return self._tail[1].endswith(b"ARROW1")

    def hold(self, extents: Sequence[_Extent]) -> None:
        """Fetches pieces and gives up those of the last time."""
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
    """Rows of some row groups of a Parquet file; neighbours that fit are fetched together, a larger one is streamed."""
    # Pages are streamed: pre-buffering would hold whole row groups, which may be the whole file.
    parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=AHEAD_BYTES)
    columns = stored_names(parquet.schema_arrow, columns)
    for together, extents in _plan(parquet.metadata, units, columns):
        file.hold(extents)
        yield from parquet.iter_batches(batch_rows, row_groups=together, columns=columns)


def stream_rows(file: PieceReader) -> int:
    """Rows of an Arrow stream, which has no footer: by the headers of its messages, without what is in them."""
    rows, place, end = 0, 0, file.seek(0, io.SEEK_END)
    file.ahead = _TAIL_BYTES
    while place < end:
        file.seek(place)
        magic, length = struct.unpack("<4si", file.read(8).ljust(8, b"\0"))
        if magic != STREAM_MAGIC or length < 0:
            raise pa.ArrowInvalid(f"the Arrow stream is damaged at byte {place}")
        if length == 0:
            break
        try:
            kind, its_rows, body = _message(file.read(length))
        except struct.error as error:
            raise pa.ArrowInvalid(f"the Arrow stream is damaged at byte {place}") from error
        rows += its_rows if kind == _RECORD_BATCH else 0
        place += 8 + length + body
    if place > end:
        raise pa.ArrowInvalid(f"the Arrow stream ends in the middle of a message, {place - end} bytes too early")
    return rows


def _message(data: bytes) -> tuple[int, int, int]:
    """Kind, rows and bytes of the body of a message, from its header: a flatbuffer (Message.fbs, Schema.fbs)."""

    def field(table: int, number: int, form: str) -> tuple[int, int]:
        vtable = table - struct.unpack_from("<i", data, table)[0]
        size = struct.unpack_from("<H", data, vtable)[0]
        slot = 4 + 2 * number
        offset = struct.unpack_from("<H", data, vtable + slot)[0] if slot + 2 <= size else 0
        return table + offset, struct.unpack_from(form, data, table + offset)[0] if offset else 0

    message = struct.unpack_from("<I", data, 0)[0]
    kind, body = field(message, 1, "<B")[1], field(message, 3, "<q")[1]
    place, header = field(message, 2, "<I")
    rows = field(place + header, 0, "<q")[1] if kind == _RECORD_BATCH else 0
    if rows < 0 or body < 0:
        raise struct.error("negative length")
    return kind, rows, body


def arrow_footer(raw: PinnedFile) -> tuple[pa.Schema, list[int]]:
    """Schema and rows of each batch; only the batches tell their rows, so the smallest column of each is read."""
    file = pa.PythonFile(raw, mode="r")
    schema = pa_ipc.open_file(file).schema
    smallest = sorted(range(len(schema.names)), key=lambda n: _weight(schema.field(n).type))[:1]
    reader = pa_ipc.open_file(file, options=pa_ipc.IpcReadOptions(included_fields=smallest))
    return schema, [reader.get_batch(n).num_rows for n in range(reader.num_record_batches)]


def _weight(kind: pa.DataType) -> int:
    """Rank of a type by the bits of a value: fixed widths, then strings and the like, then nested types."""
    if pa.types.is_primitive(kind):
        return kind.bit_width
    return 2000 if pa.types.is_nested(kind) else 1000


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
