"""Finding the source's files, pinning them, and reading them in record batches."""

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq

from sf_pipelines.snapshot.errors import (
    ObjectMissingError,
    SourceEmptyError,
    SourceNotFoundError,
    SourceSchemaError,
)
from sf_pipelines.snapshot.model import Model
from sf_pipelines.snapshot.store import Credentials, ObjectInfo, PinnedFile, Store

_SUFFIXES = (".parquet", ".pq", ".arrow", ".ipc", ".feather")
_READ_BUFFER = 4 * 1024 * 1024


class SourceFile(Model):
    """One pinned file.

    Attributes:
        key: relative to the source's root.
        size: bytes.
        etag: version; a read of any other version fails.
        first_row: position of its first row in the whole source.
        unit_rows: rows of each row group (Parquet) or record batch (Arrow).
    """

    key: str
    size: int
    etag: str | None
    first_row: int
    unit_rows: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return sum(self.unit_rows)


class SourceListing(Model):
    """What a scan pinned.

    Attributes:
        root: address that the keys are relative to.
        files: in key order.
        columns: the columns that are read and their Arrow types, as text.
        schema_ipc: the same as an Arrow schema message, base64.
    """

    root: str
    files: tuple[SourceFile, ...]
    columns: dict[str, str]
    schema_ipc: str

    @property
    def arrow_schema(self) -> pa.Schema:
        """Types of the columns that are read."""
        return pa_ipc.read_schema(pa.BufferReader(base64.b64decode(self.schema_ipc)))

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)


class Span(Model):
    """Row groups (or record batches) ``first_unit`` to ``last_unit`` (exclusive) of one file."""

    file: int
    first_unit: int
    last_unit: int


@dataclass(frozen=True)
class SourceBatch:
    """Consecutive rows of one file.

    Attributes:
        rows: the columns that were asked for.
        first_row: position of the first row in the whole source.
        file: key of the file.
        file_row: position of the first row in the file.
    """

    rows: pa.RecordBatch
    first_row: int
    file: str
    file_row: int


def find_files(source: str, s3: Credentials | None) -> tuple[Store, list[ObjectInfo]]:
    """The store and the files that a path, folder or glob stands for, in key order.

    Raises:
        SourceNotFoundError: nothing matches.
    """
    scheme, place = source.split("://", 1) if "://" in source else ("", str(Path(source).expanduser().absolute()))
    lead = f"{scheme}://" if scheme else ""
    pieces = place.split("/")
    fixed = next((n for n, piece in enumerate(pieces) if re.search(r"[*?\[]", piece)), len(pieces))
    try:
        if fixed < len(pieces):
            store = Store.open(lead + "/".join(pieces[:fixed]), s3)
            pattern = re.compile(_glob_regex("/".join(pieces[fixed:])))
            found = [info for info in store.objects() if pattern.fullmatch(info.key)]
        else:
            store, found = _one_file_or_folder(lead, pieces, s3)
    except ObjectMissingError as error:
        raise SourceNotFoundError(f"source {source!r} does not exist ({error})") from error
    if not found:
        raise SourceNotFoundError(f"source {source!r} matches no file; expected {', '.join(_SUFFIXES)}")
    return store, sorted(found, key=lambda info: info.key)


def _one_file_or_folder(lead: str, pieces: list[str], s3: Credentials | None) -> tuple[Store, list[ObjectInfo]]:
    folder, name = "/".join(pieces[:-1]), pieces[-1]
    if name.endswith(_SUFFIXES):
        store = Store.open(lead + folder, s3)
        return store, [store.head(name)]
    store = Store.open(lead + "/".join(pieces), s3)
    # Writers of tables leave markers such as _SUCCESS and hidden files beside the data.
    found = [
        info
        for info in store.objects()
        if info.key.endswith(_SUFFIXES) and not any(part.startswith(("_", ".")) for part in info.key.split("/"))
    ]
    return store, found


def _glob_regex(pattern: str) -> str:
    """Shell patterns over whole keys: ``*`` stays inside a folder, ``**/`` crosses them."""
    out, rest = "", pattern
    while rest:
        if rest.startswith("**/"):
            out, rest = out + "(?:[^/]+/)*", rest[3:]
        elif rest.startswith("**"):
            out, rest = out + ".*", rest[2:]
        elif rest[0] == "*":
            out, rest = out + "[^/]*", rest[1:]
        elif rest[0] == "?":
            out, rest = out + "[^/]", rest[1:]
        elif (match := re.match(r"\[(!?)([^\]]+)\]", rest)) is not None:
            inside = match[2].replace("\\", "\\\\").replace("^", "\\^")
            out, rest = out + f"[{'^' if match[1] else ''}{inside}]", rest[match.end() :]
        else:
            out, rest = out + re.escape(rest[0]), rest[1:]
    return out


def pin(source: str, s3: Credentials | None, columns: tuple[str, ...]) -> SourceListing:
    """Lists the source's files, reads their footers and pins their versions.

    Args:
        source: path, folder or glob.
        s3: credentials.
        columns: columns that must be there.

    Raises:
        SourceNotFoundError: nothing matches.
        SourceEmptyError: no rows at all.
        SourceSchemaError: a file is of another format, lacks a column, or has another type than the first file.
    """
    store, found = find_files(source, s3)
    files: list[SourceFile] = []
    schema: pa.Schema | None = None
    first_row = 0
    for info in found:
        with store.open_file(info.key, pinned=info) as raw:
            its_schema, unit_rows = _footer(raw, store.url_of(info.key))
        its_schema = _narrow(its_schema, columns, store.url_of(info.key))
        if schema is not None and its_schema != schema:
            raise SourceSchemaError(
                f"{store.url_of(info.key)} has {_spell(its_schema)}, but {store.url_of(found[0].key)} has "
                f"{_spell(schema)}; all files need the same column types"
            )
        schema = its_schema
        files.append(
            SourceFile(key=info.key, size=info.size, etag=info.etag, first_row=first_row, unit_rows=tuple(unit_rows))
        )
        first_row += sum(unit_rows)
    if schema is None or first_row == 0:
        raise SourceEmptyError(f"source {source!r} has {len(files)} files and no rows")
    return SourceListing(
        root=store.url,
        files=tuple(files),
        columns={field.name: str(field.type) for field in schema},
        schema_ipc=base64.b64encode(schema.serialize().to_pybytes()).decode(),
    )


def _narrow(schema: pa.Schema, columns: tuple[str, ...], where: str) -> pa.Schema:
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise SourceSchemaError(f"{where} has no column {', '.join(missing)}; it has {', '.join(schema.names)}")
    return pa.schema([pa.field(name, schema.field(name).type) for name in columns])


def _spell(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _footer(raw: PinnedFile, where: str) -> tuple[pa.Schema, list[int]]:
    magic = raw.read(6)
    raw.seek(0)
    try:
        if magic.startswith(b"PAR1"):
            metadata = pq.ParquetFile(raw).metadata
            return metadata.schema.to_arrow_schema(), [
                metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)
            ]
        if magic == b"ARROW1":
            reader = pa_ipc.open_file(pa.PythonFile(raw, mode="r"))
            # An Arrow file's footer does not tell rows, so its batches are read once here.
            return reader.schema, [reader.get_batch(n).num_rows for n in range(reader.num_record_batches)]
    except pa.ArrowInvalid as error:
        raise SourceSchemaError(f"{where} cannot be read: {error}") from error
    raise SourceSchemaError(f"{where} is neither Parquet nor an Arrow IPC file (it begins with {magic!r})")


def read_span(
    store: Store, file: SourceFile, span: Span, columns: tuple[str, ...], batch_rows: int
) -> Iterator[SourceBatch]:
    """Streams part of a pinned file.

    Raises:
        SourceChangedError: the file is no longer the pinned version.
        SourceSchemaError: the bytes cannot be decoded.
    """
    info = ObjectInfo(file.key, file.size, file.etag)
    file_row = sum(file.unit_rows[: span.first_unit])
    with store.open_file(file.key, pinned=info) as raw:
        try:
            for batch in _batches(raw, span, columns, batch_rows):
                yield SourceBatch(batch, file.first_row + file_row, file.key, file_row)
                file_row += batch.num_rows
        except pa.ArrowInvalid as error:
            raise SourceSchemaError(f"{store.url_of(file.key)} cannot be read: {error}") from error


def _batches(raw: PinnedFile, span: Span, columns: tuple[str, ...], batch_rows: int) -> Iterator[pa.RecordBatch]:
    units = range(span.first_unit, span.last_unit)
    if raw.read(4) == b"PAR1":
        # Pages are streamed: pre-buffering would hold whole row groups, which may be the whole file.
        parquet = pq.ParquetFile(raw, pre_buffer=False, buffer_size=_READ_BUFFER)
        yield from parquet.iter_batches(batch_rows, row_groups=list(units), columns=list(columns))
        return
    reader = pa_ipc.open_file(pa.PythonFile(raw, mode="r"))
    for unit in units:
        batch = reader.get_batch(unit).select(list(columns))
        for start in range(0, batch.num_rows, batch_rows):
            yield batch.slice(start, batch_rows)


def plan_ranges(files: tuple[SourceFile, ...], target_rows: int) -> list[tuple[Span, ...]]:
    """Cuts the source into input ranges of about ``target_rows``, along row groups; small files share a range."""
    ranges: list[tuple[Span, ...]] = []
    current: list[Span] = []
    rows = 0
    for number, file in enumerate(files):
        start = 0
        for unit, unit_rows in enumerate(file.unit_rows):
            if rows and rows + unit_rows > target_rows:
                if unit > start:
                    current.append(Span(file=number, first_unit=start, last_unit=unit))
                ranges.append(tuple(current))
                current, rows, start = [], 0, unit
            rows += unit_rows
        if len(file.unit_rows) > start:
            current.append(Span(file=number, first_unit=start, last_unit=len(file.unit_rows)))
    if current:
        ranges.append(tuple(current))
    return ranges
