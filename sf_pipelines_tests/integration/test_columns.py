"""Any name and any encoding of a column, in every place of a configuration: served as it is, or refused by name."""

import json
import re
import tempfile
import uuid
from pathlib import Path
from typing import Any

import apsw
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.ipc as pa_ipc
import pytest
import sqlite_vec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sf_pipelines import UnifiedShardedReader, WriteConfig, build_snapshot, open_reader
from sf_pipelines.snapshot.errors import ConfigError, SourceSchemaError
from sf_pipelines_tests.tables import clustered

ROWS, DIM, ASKED = 24, 4, 7
VECTORS = clustered(ROWS, DIM)
NUMBERS, TEXTS = list(range(100, 100 + ROWS)), [f"é{n}" for n in range(ROWS)]
UUIDS = [uuid.UUID(int=n * 2**90 + 2**127) for n in range(ROWS)]

# Names that some library reads as a pattern, a path, a keyword or a name of its own.
NAMES = [
    *("^price$", "*", "a.b", "a`b", "[x]", "a\\b", "it's", 'q"u', "a b", "select", "a/b", "..", "%s", "{x}", "?", "--"),
    *("id", "vector", "payload", "_distance", "_rowid", "rowid", "score", "distance", "embedding", "k", "key", "value"),
    *("_kv_key", "shard", "context.x", "query_index", "x__null", "row", "x\0y", "a\nb", "\u017f", "\u212a", "日本"),
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
# The same values as writers encode them, and as a search gives them back.
VALUES: dict[str, tuple[pa.Array, list[Any]]] = {
    "int64": (pa.array(NUMBERS), NUMBERS),
    "uint16": (pa.array(NUMBERS, pa.uint16()), NUMBERS),
    "dictionary of int64": (pa.array(NUMBERS).dictionary_encode(), NUMBERS),
    "string": (pa.array(TEXTS), TEXTS),
    "string_view": (pa.array(TEXTS, pa.string_view()), TEXTS),
    "large_string": (pa.array(TEXTS, pa.large_string()), TEXTS),
    "dictionary of string": (pa.array(TEXTS).dictionary_encode(), TEXTS),
    "uuid": (pa.array([one.bytes for one in UUIDS], pa.uuid()), [str(one) for one in UUIDS]),
    "binary(16)": (pa.array([one.bytes for one in UUIDS], pa.binary(16)), [str(one) for one in UUIDS]),
}
PLACES = ("id_col", "vector_col", "payload_cols", "filter_cols", "value_cols", "shard_id_col")


def is_refused(place: str, name: str, backend: str) -> bool:
    """What docs/reference.md says of the names of filter columns; all others may have any name."""
    if place != "filter_cols":
        return False
    own = {"id", "vector", "payload", "_distance", "_rowid", "query_index"}
    if any(mark in name for mark in ".`\0") or name in own or name.lower().startswith(("_row", "_kv_")):
        return True
    taken = {"rowid", "embedding", "distance", "k"}
    plain = re.fullmatch("[a-zA-Z][a-zA-Z0-9_]*", name) and not name.endswith("__null") and name.lower() not in taken
    return backend == "sqlite-vec" and not plain


def written(root: Path, place: str, name: str, column: pa.Array, backend: str) -> dict[str, Any]:
    """A source whose column of this name is used in this place, and the configuration's fields."""
    flat = pa.FixedSizeListArray.from_arrays(pa.array(VECTORS.ravel()), DIM)
    columns = {"~id": pa.array(NUMBERS), "~vector": flat, "~shard": pa.array(np.arange(ROWS) % 2)}
    plain = {"id_col": "~id", "vector_col": "~vector", "shard_id_col": "~shard"}
    columns[name] = columns.pop(plain[place]) if place in plain and place != "id_col" else column
    plain |= {place: name} if place in plain else {}
    table = pa.Table.from_arrays(list(columns.values()), names=list(columns))
    with pa_ipc.new_file(str(root / "source.arrow"), table.schema) as file:
        file.write_table(table)
    fields: dict[str, Any] = {"id_col": plain["id_col"]}
    spec: dict[str, Any] = {"dim": DIM, "vector_col": plain["vector_col"], "backend": backend, "metric": "l2"}
    if place in {"payload_cols", "filter_cols"}:
        fields[place] = (name,)
    if place == "value_cols":
        fields = {"key_value": {"key_col": "~id", "value_cols": (name,)}}
    if place == "shard_id_col":
        spec["sharding"] = {"strategy": "explicit", "shard_id_col": name}
    return {"name": "odd", "num_dbs": 2, "source": str(root / "source.arrow"), "vector_spec": spec, **fields}


def filter_values(root: Path, name: str) -> list[Any]:
    """Values of a filter column in all shards, read with the index libraries themselves."""
    found: list[Any] = []
    for folder in root.rglob("vector_index.lance"):
        # The library would take a name that is asked for as an expression.
        found += lancedb.connect(str(folder.parent)).open_table(folder.stem).to_arrow().column(name).to_pylist()
    for file in root.rglob("shard.db"):
        connection = apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READONLY)
        connection.enable_load_extension(True)
        connection.load_extension(sqlite_vec.loadable_path())
        found += [value for (value,) in connection.execute(f'SELECT "{name}" FROM vec_index')]  # noqa: S608 - as given
        connection.close()
    return found


def check_column(place: str, name: str, kind: str, backend: str) -> None:
    """Builds a snapshot and looks whether the column's values are served."""
    column, values = VALUES[kind]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        fields = written(root, place, name, column, backend)
        if is_refused(place, name, backend):
            with pytest.raises(ConfigError, match=re.escape(f"filter_cols: {name}")):
                WriteConfig(store=str(root / "store"), **fields)
            return
        config = WriteConfig(store=str(root / "store"), **fields)
        build_snapshot(config, cache_dir=root / "cache")
        shards = [ASKED % 2] if place == "shard_id_col" else None
        with open_reader(config.store, cache_dir=root / "reader") as reader:
            (hit,) = reader.search(VECTORS[ASKED], top_k=1, shard_ids=shards).results
            assert hit.id == (values if place == "id_col" else NUMBERS)[ASKED]
            assert hit.payload == ({name: values[ASKED]} if place == "payload_cols" else None)
            if isinstance(reader, UnifiedShardedReader):
                assert json.loads(reader.get(NUMBERS[ASKED]) or b"null") == {name: values[ASKED]}
        if place == "filter_cols":
            assert sorted(filter_values(root / "store", name)) == sorted(values)


ANY_COLUMN = (
    st.sampled_from(PLACES),
    st.sampled_from(NAMES) | TEXT,
    st.sampled_from(sorted(VALUES)),
    st.sampled_from(["lancedb", "sqlite-vec"]),
)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(*ANY_COLUMN)
@example("payload_cols", "^price$", "string", "lancedb")
@example("payload_cols", "*", "string_view", "sqlite-vec")
@example("value_cols", "^.*$", "binary(16)", "lancedb")
@example("filter_cols", "\u017f", "int64", "sqlite-vec")
@example("filter_cols", "x\0y", "uuid", "lancedb")
def test_any_column_in_any_place(place: str, name: str, kind: str, backend: str) -> None:
    check_column(place, name, kind, backend)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=80, deadline=None)
@given(*ANY_COLUMN)
def test_any_column_in_any_place_at_length(place: str, name: str, kind: str, backend: str) -> None:
    check_column(place, name, kind, backend)


@pytest.mark.parametrize("kind", ["binary(16)", "binary", "binary_view"])
def test_sixteen_bytes_are_the_bytes_of_an_expression(tmp_path: Path, kind: str) -> None:
    given = [bytes([n + 1]) * 16 for n in range(ROWS)]
    types: dict[str, Any] = {"binary(16)": pa.binary(16), "binary": pa.binary(), "binary_view": pa.binary_view()}
    fields = written(tmp_path, "payload_cols", "code", pa.array(given, types[kind]), "lancedb")
    fields["vector_spec"]["sharding"] = {
        "strategy": "cel",
        "cel_expr": "shard_hash(code) % 2u",
        "cel_columns": {"code": "bytes"},
    }
    build_snapshot(WriteConfig(store=str(tmp_path / "store"), **fields), cache_dir=tmp_path / "cache")
    with open_reader(str(tmp_path / "store"), cache_dir=tmp_path / "reader") as reader:
        (hit,) = reader.search(VECTORS[ASKED], top_k=1, routing_context={"code": given[ASKED]}).results
    assert (hit.id, hit.payload) == (NUMBERS[ASKED], {"code": given[ASKED].hex()})


@pytest.mark.parametrize("place", ["id_col", "vector_col", "payload_cols", "filter_cols", "shard_id_col", "cel"])
def test_a_column_of_a_type_that_nobody_can_use_is_named(tmp_path: Path, place: str) -> None:
    tags = pa.array([0] * ROWS, pa.int8())
    union = pa.UnionArray.from_sparse(tags, [pa.array(NUMBERS), pa.array(TEXTS)])
    fields = written(tmp_path, "payload_cols" if place == "cel" else place, "mixed", union, "lancedb")
    if place in {"vector_col", "shard_id_col"}:
        table = pa.table({"~id": pa.array(NUMBERS), "~vector": pa.array(VECTORS.tolist()), "mixed": pa.nulls(ROWS)})
        table = table.set_column(2, "mixed", union)
        with pa_ipc.new_file(fields["source"], table.schema) as file:
            file.write_table(table)
    if place == "cel":
        del fields["payload_cols"]
        fields["vector_spec"]["sharding"] = {"strategy": "cel", "cel_expr": "mixed", "cel_columns": {"mixed": "int"}}
    with pytest.raises(SourceSchemaError, match=r"mixed|shard_id"):
        build_snapshot(WriteConfig(store=str(tmp_path / "store"), **fields), cache_dir=tmp_path / "cache")
