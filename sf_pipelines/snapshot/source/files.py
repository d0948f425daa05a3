"""Finding the source's files, pinning them, and reading them in record batches."""

import base64
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

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
from sf_pipelines.snapshot.source.pieces import AHEAD_BYTES, PieceReader, row_group_batches
from sf_pipelines.snapshot.store import Credentials, ObjectInfo, PinnedFile, Store

_SUFFIXES = (".parquet", ".pq", ".arrow", ".ipc", ".feather")

# Formats of tables whose data files alone are not their rows: what tells them, and how to write the rows out.
_TABLE_SIGNS = {
    "Delta Lake": r"_delta_log(?:/.*)?",
    "Iceberg": r"metadata/(?:[^/]*\.metadata\.json(?:\.gz)?|[^/]+-m\d+\.avro|snap-[^/]+\.avro)",
    "Hudi": r"\.hoodie(?:/.*)?|\.hoodie_partition_metadata[^/]*",
    "Lance": r"_versions/[^/]+\.manifest",
}
_TABLE_SIGN = re.compile(f"((?:.*?/)?)(?:{'|'.join(f'({sign})' for sign in _TABLE_SIGNS.values())})", re.DOTALL)
_TABLE_EXPORTS = {
    "Delta Lake": "pyarrow.dataset.write_dataset(deltalake.DeltaTable(table).to_pyarrow_dataset(), folder, "
    "format='parquet')",
    "Iceberg": "pyarrow.parquet.write_table(pyiceberg_catalog.load_table(name).scan().to_arrow(), file)",
    "Hudi": "spark.read.format('hudi').load(table).write.parquet(folder)",
    "Lance": "pyarrow.dataset.write_dataset(lance.dataset(table).scanner().to_reader(), folder, format='parquet')",
}
# Where these signs are in a table's own folder.
_TABLE_FOLDERS = ("_delta_log", "metadata", ".hoodie", "_versions")
# Objects that are looked at in such a folder, as many as S3 lists in one request.
_LOOKED_AT = 1000


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


def find_files(source: str, s3: Credentials | None) -> tuple[Store, list[ObjectInfo]]:
    """The store and the files that a path, folder or glob stands for, in key order.

    A source that exists under its literal name is that file or folder, even if the name has glob characters. Files
    below a folder that a glob matches are taken, too: many writers make ``x.parquet`` a folder.

    Raises:
        SourceNotFoundError: nothing matches.
        SourceSchemaError: it is a table of a format that knows deleted rows, or holds one.
        StoreDeniedError: nothing was found, and looking for it was refused.
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


def _one_file(lead: str, pieces: list[str], s3: Credentials | None) -> tuple[Store, list[ObjectInfo]]:
    store = _open(lead, pieces[:-1], s3)
    return store, [store.head(pieces[-1])]


def _folder(lead: str, pieces: list[str], s3: Credentials | None) -> tuple[Store, list[ObjectInfo]]:
    store, found = _open(lead, pieces, s3), list[ObjectInfo]()
    for info in store.objects():
        if _table_of(info.key) is not None:
            raise _table_error(store, info.key)
        if _is_table(info.key) and not _is_hidden(info.key, []):
            found.append(info)
    return store, _without_markers(store, found)


def _glob(lead: str, pieces: list[str], s3: Credentials | None) -> tuple[Store, list[ObjectInfo]]:
    fixed = next(n for n, piece in enumerate(pieces) if _is_pattern(piece))
    store = _open(lead, pieces[:fixed], s3)
    pattern = re.compile(_glob_regex("/".join(pieces[fixed:])))
    named = [re.compile(_glob_regex(piece)) for piece in pieces[fixed:] if piece.startswith(("_", "."))]
    found: list[ObjectInfo] = []
    tables: dict[str, str] = {}
    for info in store.objects():
        table = _table_of(info.key)
        if table is not None:
            tables.setdefault(table[0], info.key)
        if (pattern.fullmatch(info.key) or (_is_table(info.key) and _is_below(info.key, pattern))) and not _is_hidden(
            info.key, named
        ):
            found.append(info)
    taken = {"", *(info.key[: slash.end()] for info in found for slash in re.finditer("/", info.key))}
    for root, key in tables.items():
        # Tables beside what the pattern takes in are no matter.
        if root in taken or pattern.fullmatch(root.rstrip("/")):
            raise _table_error(store, key)
    return store, _without_markers(store, found)


def _table_of(key: str) -> tuple[str, str] | None:
    """Folder and format of the table that an object is a sign of."""
    match = _TABLE_SIGN.fullmatch(key)
    return None if match is None else (match[1], list(_TABLE_SIGNS)[(match.lastindex or 0) - 2])


def _table_error(store: Store, key: str) -> SourceSchemaError:
    root, kind = _table_of(key) or ("", "")
    return SourceSchemaError(
        f"{store.url_of(root).rstrip('/')} is a table of {kind} ({store.url_of(key)}): its files also hold rows that "
        f"the table has deleted or replaced, and only {kind} knows which. Write its present rows to Parquet files in a "
        f"folder of their own, for example by {_TABLE_EXPORTS[kind]}, and name that folder as the source"
    )


def _refuse_part_of_table(store: Store, s3: Credentials | None) -> None:
    """Raises ``SourceSchemaError`` where the source is part of such a table: its data folder, or one file of it."""
    scheme, place = store.url.split("://", 1)
    lead, pieces = f"{scheme}://", place.split("/")
    if store.local_root is not None:
        lead, pieces = "", str(store.local_root.resolve()).split("/")
    for end in range(len(pieces), 0, -1):
        above = _open(lead, pieces[:end], s3)
        for name in _TABLE_FOLDERS:
            if above.local_root is not None and not os.access(above.local_root / name, os.R_OK | os.X_OK):
                continue
            # Who may not look above the source cannot be told what is there.
            with suppress(StoreDeniedError):
                for info in islice(above.objects(name), _LOOKED_AT):
                    if (_table_of(info.key) or (None,))[0] == "":
                        raise _table_error(above, info.key)


def _open(lead: str, pieces: list[str], s3: Credentials | None) -> Store:
    return Store.open(lead + ("/".join(pieces) or ("" if lead else "/")), s3)


def _is_pattern(piece: str) -> bool:
    return re.search(r"[*?\[]", piece) is not None


def _is_table(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def _is_hidden(key: str, named: list[re.Pattern[str]]) -> bool:
    """Writers of tables leave markers such as _SUCCESS and hidden files beside the data.

    Args:
        key: of a file.
        named: patterns of the names that the source asks for although they look hidden.
    """
    return any(
        part.startswith(("_", ".")) and not any(pattern.fullmatch(part) for pattern in named) for part in key.split("/")
    )


def _is_below(key: str, pattern: re.Pattern[str]) -> bool:
    """Whether a folder that the file is in matches."""
    return any(pattern.fullmatch(key[: slash.start()]) for slash in re.finditer("/", key))


def _without_markers(store: Store, found: list[ObjectInfo]) -> list[ObjectInfo]:
    """Leaves out S3's empty objects ``folder/``: they are listed as ``folder``, but there is no such object."""
    return [info for info in found if info.size or (info.key and _exists(store, info.key))]


def _exists(store: Store, key: str) -> bool:
    try:
        store.head(key)
    except ObjectMissingError:
        return False
    return True


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
    s3: Credentials | None,
    columns: tuple[str, ...],
    *,
    parts: tuple[Store, tuple[str, ...]] | None = None,
) -> SourceListing:
    """Lists the source's files, reads their footers and pins their versions.

    Args:
        source: path, folder or glob.
        s3: credentials.
        columns: columns that must be there.
        parts: these very files, in this order, whatever else is at ``source``; None looks there.

    Raises:
        SourceNotFoundError: nothing matches.
        SourceEmptyError: no rows at all.
        SourceSchemaError: a file is empty, damaged, of another format, part of a table that knows deleted rows, lacks a
            column, has it twice, or has another type than the first file.
    """
    if parts is None:
        store, found = find_files(source, s3)
        _refuse_part_of_table(store, s3)
    else:
        store, found = parts[0], [parts[0].head(key) for key in parts[1]]
    files: list[SourceFile] = []
    schema: pa.Schema | None = None
    first_row = 0
    for info in found:
        where = store.url_of(info.key)
        with store.open_file(info.key, pinned=info) as raw:
            its_schema, unit_rows = _footer(raw, where)
        its_schema = _narrow(its_schema, columns, where)
        if schema is not None and its_schema != schema:
            raise SourceSchemaError(
                f"{where} has {_spell(its_schema)}, but {store.url_of(found[0].key)} has "
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
    repeated = [name for name in columns if schema.names.count(name) > 1]
    if repeated:
        raise SourceSchemaError(
            f"{where} has more than one column {', '.join(repeated)}; rename or drop all but one of the same name"
        )
    return pa.schema([pa.field(name, _uniform(schema.field(name).type)) for name in columns])


def _uniform(kind: pa.DataType) -> pa.DataType:
    """The type without what writers differ in: names of list items, and whether inner values may be null."""
    if pa.types.is_list(kind):
        return pa.list_(_uniform(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_uniform(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_uniform(kind.value_type), kind.list_size)
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _uniform(field.type)) for field in kind])
    return kind


def _spell(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


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
            return _arrow_footer(raw)
    raise SourceSchemaError(f"{where} is neither Parquet nor an Arrow IPC file (it begins with {magic!r})")


def _arrow_footer(raw: PinnedFile) -> tuple[pa.Schema, list[int]]:
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


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Names the file in Arrow's errors; damaged bytes show as OSError, too. Errors of the store pass."""
    try:
        yield
    except SfPipelinesError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise SourceSchemaError(f"{where} cannot be read: {error}") from error


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
    with store.open_file(file.key, pinned=info) as raw, _decoding(store.url_of(file.key)):
        for batch in _batches(raw, span, columns, batch_rows):
            yield SourceBatch(_conform(batch, columns), file.first_row + file_row, file.key, file_row)
            file_row += batch.num_rows


def _batches(raw: PinnedFile, span: Span, columns: tuple[str, ...], batch_rows: int) -> Iterator[pa.RecordBatch]:
    units, file = range(span.first_unit, span.last_unit), PieceReader(raw)
    if file.is_parquet:
        yield from row_group_batches(file, units, columns, batch_rows)
        return
    file.ahead = AHEAD_BYTES
    reader = pa_ipc.open_file(pa.PythonFile(file, mode="r"))
    for unit in units:
        batch = reader.get_batch(unit).select(list(columns))
        for start in range(0, batch.num_rows, batch_rows):
            yield batch.slice(start, batch_rows)


def _conform(batch: pa.RecordBatch, columns: tuple[str, ...]) -> pa.RecordBatch:
    """The batch with the types that ``pin`` promises."""
    schema = pa.schema([pa.field(name, _uniform(batch.schema.field(name).type)) for name in columns])
    arrays = [batch.column(name) for name in columns]
    # A cast of inner nullability copies nothing.
    same = [array if array.type == kind else array.cast(kind) for array, kind in zip(arrays, schema.types, strict=True)]
    return pa.RecordBatch.from_arrays(same, schema=schema)


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
