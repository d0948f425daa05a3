"""Finding the source's files, pinning them, and reading them in record batches."""

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq

from sf_pipelines.snapshot.errors import (
    ObjectMissingError,
    SfPipelinesError,
    SourceEmptyError,
    SourceNotFoundError,
    SourceSchemaError,
    StoreDeniedError,
    StoreError,
)
from sf_pipelines.snapshot.model import Model
from sf_pipelines.snapshot.source.columns import (
    fitted,
    index_range,
    stored_name,
    stored_names,
    uniform_type,
    wider_type,
)
from sf_pipelines.snapshot.source.pieces import (
    AHEAD_BYTES,
    STREAM_MAGIC,
    PieceReader,
    arrow_footer,
    row_group_batches,
    stream_rows,
)
from sf_pipelines.snapshot.source.table_formats import refuse_part_of_table, table_error, table_of
from sf_pipelines.snapshot.store import ObjectInfo, PinnedFile, Store
from sf_pipelines.snapshot.store.client import S3Options

_SUFFIXES = (".parquet", ".pq", ".arrow", ".arrows", ".ipc", ".feather")


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
        files: in key order; parts of a frame in the frame's order.
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


def find_files(source: str, s3: S3Options | None) -> tuple[Store, list[ObjectInfo]]:
    """The store and the files that a path, folder or glob stands for, in key order.

    A source that exists under its literal name is that file or folder, even if the name has glob characters. Files
    below a folder that a glob matches are taken, too: many writers make ``x.parquet`` a folder.
    """
    scheme, place = source.split("://", 1) if "://" in source else ("", str(Path(source).expanduser().absolute()))
    if scheme == "file":
        scheme, place = "", unquote(place)
    lead, pieces = f"{scheme}://" if scheme else "", place.rstrip("/").split("/")
    looks = [_folder]
    if len(pieces) > 1:
        looks.insert(0 if _is_table(pieces[-1]) else 1, _one_file)
    if any(map(_is_pattern, pieces)):
        looks.append(_glob)
    problem: StoreError | None = None
    for look in looks:
        try:
            store, found = look(lead, pieces, s3)
        except (ObjectMissingError, StoreDeniedError) as error:
            # A refusal says more than that something else is missing.
            problem = problem if isinstance(problem, StoreDeniedError) else error
            continue
        if found:
            return store, sorted(found, key=lambda info: info.key)
    if isinstance(problem, StoreDeniedError):
        raise problem
    raise SourceNotFoundError(
        f"source {source!r} does not exist or matches no file; expected {', '.join(_SUFFIXES)}"
    ) from problem


def _one_file(lead: str, pieces: list[str], s3: S3Options | None) -> tuple[Store, list[ObjectInfo]]:
    store = _open(lead, pieces[:-1], s3)
    return store, [store.head(pieces[-1])]


def _folder(lead: str, pieces: list[str], s3: S3Options | None) -> tuple[Store, list[ObjectInfo]]:
    store, found, odd = _open(lead, pieces, s3), list[ObjectInfo](), list[str]()
    for info in store.objects(odd=odd):
        if table_of(info.key) is not None:
            raise table_error(store, info.key)
        if _is_table(info.key) and not _is_hidden(info.key, []):
            found.append(info)
    _refuse_odd(store, [key for key in odd if _is_table(key) and not _is_hidden(_straight(key), [])])
    return store, _versioned(store, found)


def _glob(lead: str, pieces: list[str], s3: S3Options | None) -> tuple[Store, list[ObjectInfo]]:
    fixed = next(n for n, piece in enumerate(pieces) if _is_pattern(piece))
    store, odd = _open(lead, pieces[:fixed], s3), list[str]()
    pattern = re.compile(_glob_regex("/".join(pieces[fixed:])))
    named = [re.compile(_glob_regex(piece)) for piece in pieces[fixed:] if piece.startswith(("_", "."))]

    def takes(key: str) -> bool:
        asked = pattern.fullmatch(key) or (_is_table(key) and _is_below(key, pattern))
        return bool(asked) and not _is_hidden(key, named)

    found: list[ObjectInfo] = []
    tables: dict[str, str] = {}
    for info in store.objects(odd=odd):
        table = table_of(info.key)
        if table is not None:
            tables.setdefault(table[0], info.key)
        if takes(info.key):
            found.append(info)
    taken = {"", *(info.key[: slash.end()] for info in found for slash in re.finditer("/", info.key))}
    for root, key in tables.items():
        # Tables beside what the pattern takes in are no matter.
        if root in taken or pattern.fullmatch(root.rstrip("/")):
            raise table_error(store, key)
    _refuse_odd(store, [key for key in odd if _is_table(key) and (takes(key) or takes(_straight(key)))])
    return store, _versioned(store, found)


def _straight(key: str) -> str:
    """The key without empty and dot segments."""
    return "/".join(part for part in key.split("/") if part not in {"", ".", ".."})


def _refuse_odd(store: Store, keys: list[str]) -> None:
    if keys:
        raise SourceSchemaError(
            f"{store.url}/{keys[0]!r} cannot be read: its key has an empty, '.' or '..' segment, a control character "
            f"or bytes that are no text, and no client can ask for that; give it a plain name, or name the source so "
            f"that it is left out ({len(keys)} files are like that)"
        )


def _open(lead: str, pieces: list[str], s3: S3Options | None) -> Store:
    return Store.open(lead + ("/".join(pieces) or ("" if lead else "/")), s3)


def _is_pattern(piece: str) -> bool:
    return re.search(r"[*?\[]", piece) is not None


def _is_table(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def _is_hidden(key: str, named: list[re.Pattern[str]]) -> bool:
    """Writers of tables leave markers such as _SUCCESS and hidden files beside the data."""
    return any(
        part.startswith(("_", ".")) and not any(pattern.fullmatch(part) for pattern in named) for part in key.split("/")
    )


def _is_below(key: str, pattern: re.Pattern[str]) -> bool:
    """Whether a folder that the file is in matches."""
    return any(pattern.fullmatch(key[: slash.start()]) for slash in re.finditer("/", key))


def _versioned(store: Store, found: list[ObjectInfo]) -> list[ObjectInfo]:
    """Leaves out S3's empty objects ``folder/``: they are listed as ``folder``, but there is no such object."""
    infos: list[ObjectInfo] = []
    for info in found:
        if info.size and info.etag:
            infos.append(info)
        elif info.key:
            with suppress(ObjectMissingError):
                infos.append(store.head(info.key))
    return infos


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


def pin(
    source: str,
    s3: S3Options | None,
    columns: tuple[str, ...],
    *,
    optional: frozenset[str] = frozenset(),
    parts: tuple[Store, tuple[str, ...]] | None = None,
) -> SourceListing:
    """Lists the source's files, reads their footers and pins their versions."""
    if parts is None:
        store, found = find_files(source, s3)
        refuse_part_of_table(store, s3)
    else:
        store, found = parts[0], [parts[0].head(key) for key in parts[1]]
    files: list[SourceFile] = []
    kinds: dict[str, tuple[pa.DataType, str]] = {}
    names: dict[str, None] = {}
    first_row = 0
    for info in found:
        where = store.url_of(info.key)
        with store.open_file(info.key, pinned=info) as raw:
            its_schema, unit_rows = _footer(raw, where)
        file = SourceFile(key=info.key, size=info.size, etag=info.etag, first_row=first_row, unit_rows=tuple(unit_rows))
        # The types of a file without rows are what its writer guessed.
        if file.rows:
            _unify(kinds, _narrow(its_schema, columns, optional, file.rows, where), where)
            names |= dict.fromkeys(its_schema.names)
        files.append(file)
        first_row += file.rows
    if not first_row:
        raise SourceEmptyError(f"source {source!r} has {len(files)} files and no rows")
    nowhere = [name for name in columns if name not in kinds]
    if nowhere:
        raise SourceSchemaError(
            f"no file of source {source!r} has a column {', '.join(nowhere)}; there are {', '.join(names)}"
        )
    schema = pa.schema([(name, kinds[name][0]) for name in columns])
    return SourceListing(
        root=store.url,
        files=tuple(files),
        columns={field.name: str(field.type) for field in schema},
        schema_ipc=base64.b64encode(schema.serialize().to_pybytes()).decode(),
    )


def _narrow(
    schema: pa.Schema, columns: tuple[str, ...], optional: frozenset[str], rows: int, where: str
) -> dict[str, pa.DataType]:
    """Types of those columns that a file has."""
    repeated = [name for name in columns if schema.names.count(name) > 1]
    if repeated:
        raise SourceSchemaError(
            f"{where} has more than one column {', '.join(repeated)}; rename or drop all but one of the same name"
        )
    found: dict[str, pa.DataType] = {}
    for name in columns:
        stored = stored_name(schema, name)
        if stored is not None:
            found[name] = uniform_type(schema.field(stored).type)
        elif index_range(schema, name, rows) is not None:
            found[name] = pa.int64()
    missing = [name for name in columns if name not in found and name not in optional]
    if missing:
        raise SourceSchemaError(f"{where} has no column {', '.join(missing)}; it has {', '.join(schema.names)}")
    return found


def _unify(kinds: dict[str, tuple[pa.DataType, str]], more: dict[str, pa.DataType], where: str) -> None:
    """Widens the types so far, each with a file that has it, by those of one more file."""
    for name, kind in more.items():
        so_far, other = kinds.setdefault(name, (kind, where))
        wider = wider_type(so_far, kind)
        if wider is None:
            raise SourceSchemaError(
                f"column {name!r} is {kind} in {where}, but {so_far} in {other}; one cannot be read as the other "
                "without losing something: write both files with the same type"
            )
        if wider != so_far:
            kinds[name] = wider, where


def _footer(raw: PinnedFile, where: str) -> tuple[pa.Schema, list[int]]:
    if raw.size() == 0:
        raise SourceSchemaError(f"{where} is empty (0 bytes); write it again or remove it")
    magic = raw.read(6)
    raw.seek(0)
    with _decoding(where):
        if magic.startswith(b"PAR1"):
            metadata = pq.ParquetFile(raw).metadata
            return metadata.schema.to_arrow_schema(), [
                metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)
            ]
        if magic == b"ARROW1":
            return arrow_footer(raw)
        if magic.startswith(STREAM_MAGIC):
            return pa_ipc.open_stream(pa.PythonFile(raw, mode="r")).schema, [stream_rows(PieceReader(raw))]
    raise SourceSchemaError(f"{where} is neither Parquet nor Arrow IPC, file or stream (it begins with {magic!r})")


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Names the file in Arrow's errors; damaged bytes show as OSError, too. Errors of the store pass."""
    try:
        yield
    except SfPipelinesError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise SourceSchemaError(f"{where} cannot be read: {error}") from error


def read_span(store: Store, file: SourceFile, span: Span, schema: pa.Schema, batch_rows: int) -> Iterator[SourceBatch]:
    """Streams part of a pinned file."""
    info, where = ObjectInfo(file.key, file.size, file.etag), store.url_of(file.key)
    file_row = sum(file.unit_rows[: span.first_unit])
    with store.open_file(file.key, pinned=info) as raw, _decoding(where):
        for batch in _batches(raw, span, tuple(schema.names), batch_rows):
            rows = _conform(batch, schema, file, file_row, where)
            yield SourceBatch(rows, file.first_row + file_row, file.key, file_row)
            file_row += batch.num_rows


def _batches(raw: PinnedFile, span: Span, columns: tuple[str, ...], batch_rows: int) -> Iterator[pa.RecordBatch]:
    units, file = range(span.first_unit, span.last_unit), PieceReader(raw)
    if file.is_parquet:
        yield from row_group_batches(file, units, columns, batch_rows)
        return
    file.ahead = AHEAD_BYTES
    source = pa.PythonFile(file, mode="r")
    if file.is_arrow_file:
        reader = pa_ipc.open_file(source)
        batches = (reader.get_batch(unit) for unit in units)
    else:
        # A stream is one unit: what a batch means may depend on those before it.
        batches = iter(pa_ipc.open_stream(source))
    for batch in batches:
        wanted = batch.select(stored_names(batch.schema, columns))
        for start in range(0, batch.num_rows, batch_rows):
            yield wanted.slice(start, batch_rows)


def _conform(batch: pa.RecordBatch, schema: pa.Schema, file: SourceFile, file_row: int, where: str) -> pa.RecordBatch:
    """The batch with the columns and types that ``pin`` promises."""
    columns: list[pa.Array] = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        stored = stored_name(batch.schema, name)
        if stored is not None:
            column = batch.column(stored)
        elif (index := index_range(batch.schema, name, file.rows)) is not None:
            column = pa.array(index.start + index.step * np.arange(file_row, file_row + batch.num_rows))
        else:
            column = pa.nulls(batch.num_rows, kind)
        try:
            columns.append(fitted(column, kind))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise SourceSchemaError(
                f"{where}: column {name!r} ({column.type}) does not fit {kind}, as which all files are read: {error}"
            ) from error
    return pa.RecordBatch.from_arrays(columns, schema=schema)


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
