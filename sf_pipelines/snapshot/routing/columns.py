"""Columns that decide a row's shard, whatever their encoding."""

import pyarrow as pa

from sf_pipelines.snapshot.errors import SourceSchemaError


def column_of(schema: pa.Schema, name: str, strategy: str) -> pa.DataType:
    """Type of the column that has this name.

    Raises:
        SourceSchemaError: none has, or more than one.
    """
    found = schema.get_all_field_indices(name)
    if len(found) != 1:
        there = "there is none" if not found else f"there are {len(found)}"
        raise SourceSchemaError(
            f"{strategy} sharding needs one column {name!r}, but {there} ({', '.join(schema.names)})"
        )
    return schema.field(found[0]).type
