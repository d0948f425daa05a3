"""Tables whose data files alone are not their rows: refused as plain files, until they are read as tables."""

import os
import re
from contextlib import suppress
from itertools import islice

from sf_pipelines.snapshot.errors import SourceSchemaError, StoreDeniedError
from sf_pipelines.snapshot.store import Store
from sf_pipelines.snapshot.store.client import S3Options

# What tells a table of a format, relative to its folder; and how to write out the rows that are its present ones.
_SIGNS = {
    "Delta Lake": r"_delta_log(?:/.*)?",
    "Iceberg": r"metadata/(?:[^/]*\.metadata\.json(?:\.gz)?|[^/]+-m\d+\.avro|snap-[^/]+\.avro)",
    "Hudi": r"\.hoodie(?:/.*)?|\.hoodie_partition_metadata[^/]*",
    "Lance": r"_versions/[^/]+\.manifest",
}
_SIGN = re.compile(f"((?:.*?/)?)(?:{'|'.join(f'({sign})' for sign in _SIGNS.values())})", re.DOTALL)
_EXPORTS = {
    "Delta Lake": "pyarrow.dataset.write_dataset(deltalake.DeltaTable(table).to_pyarrow_dataset(), folder, "
    "format='parquet')",
    "Iceberg": "pyarrow.parquet.write_table(pyiceberg_catalog.load_table(name).scan().to_arrow(), file)",
    "Hudi": "spark.read.format('hudi').load(table).write.parquet(folder)",
    "Lance": "pyarrow.dataset.write_dataset(lance.dataset(table).scanner().to_reader(), folder, format='parquet')",
}
# Where these signs are in a table's own folder.
_FOLDERS = ("_delta_log", "metadata", ".hoodie", "_versions")
# Objects that are looked at in such a folder, as many as S3 lists in one request.
_LOOKED_AT = 1000


def table_of(key: str) -> tuple[str, str] | None:
    """Folder and format of the table that an object is a sign of."""
    match = _SIGN.fullmatch(key)
    return None if match is None else (match[1], list(_SIGNS)[(match.lastindex or 0) - 2])


def table_error(store: Store, key: str) -> SourceSchemaError:
    """Says which table the source is, holds or is part of, and what to do."""
    root, kind = table_of(key) or ("", "")
    return SourceSchemaError(
        f"{store.url_of(root).rstrip('/')} is a table of {kind} ({store.url_of(key)}): its files also hold rows that "
        f"the table has deleted or replaced, and only {kind} knows which. Write its present rows to Parquet files in a "
        f"folder of their own, for example by {_EXPORTS[kind]}, and name that folder as the source"
    )


def refuse_part_of_table(store: Store, s3: S3Options | None) -> None:
    """Raises ``SourceSchemaError`` where the source is part of such a table: its data folder, or one file of it."""
    scheme, place = store.url.split("://", 1)
    lead, pieces = f"{scheme}://", place.split("/")
    if store.local_root is not None:
        lead, pieces = "", str(store.local_root.resolve()).split("/")
    for end in range(len(pieces), 0, -1):
        above = Store.open(lead + ("/".join(pieces[:end]) or "/"), s3)
        for name in _FOLDERS:
            if above.local_root is not None and not os.access(above.local_root / name, os.R_OK | os.X_OK):
                continue
            # Who may not look above the source cannot be told what is there.
            with suppress(StoreDeniedError):
                for info in islice(above.objects(name), _LOOKED_AT):
                    if (table_of(info.key) or (None,))[0] == "":
                        raise table_error(above, info.key)
