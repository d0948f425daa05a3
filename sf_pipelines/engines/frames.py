"""What all engines do with their frames: write them once, build from that, and remove it again."""

import uuid
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError, SourceEmptyError, SourceSchemaError
from sf_pipelines.snapshot.run.build import scratch
from sf_pipelines.snapshot.run.ledger import STAGING
from sf_pipelines.snapshot.run.tasks import Engine
from sf_pipelines.snapshot.source.vectors import call_vector_fn
from sf_pipelines.snapshot.stages.pipeline import BuildResult, run_build
from sf_pipelines.snapshot.store import Store

# Vectors of one row group: input ranges are cut between these.
_GROUP_BYTES = 32 * 1024 * 1024

VectorFn = Callable[[pa.RecordBatch], Any]


class Staging(Protocol):
    """How an engine has its workers write a frame."""

    def __call__(self, folder: str) -> list[str]:
        """Writes the parts with ``write_part``; keys of those that count, in the frame's order."""
        ...


def build_from_frame(
    config: WriteConfig, vector_fn: VectorFn | None, engine: Engine | None, stage: Staging
) -> BuildResult:
    """Writes a frame once, builds, gates and publishes from that, and removes it.

    What a build that fails has read stays, for whoever looks at its rejects; cleanup removes it when it is stale.
    """
    if vector_fn is not None and config.vector_spec.vector_fn is not None:
        raise ConfigError(
            f"write_sharded: vector_fn is given, and WriteConfig.vector_spec.vector_fn is "
            f"{config.vector_spec.vector_fn!r}; leave one of them out"
        )
    store = Store.open(config.store, config.s3, create=True)
    folder = f"{STAGING}/frames/{uuid.uuid4().hex}"
    keys = tuple(stage(folder))
    if not keys:
        raise SourceEmptyError(f"the frame for snapshot {config.name!r} has no rows")
    pinned = config.model_copy(update={"source": store.url_of(folder)})
    result = run_build(pinned, engine=engine, parts=keys)
    store.delete_many([info.key for info in store.objects(folder)])
    return result


def frame_columns(config: WriteConfig, names: Iterable[str], vector_fn: VectorFn | None) -> list[str]:
    """Columns of a frame that its workers need: those that are read, or all where a function is given."""
    there = list(names)
    made = {config.vector_spec.vector_col} if vector_fn is not None else set[str]()
    missing = [name for name in config.row_columns if name not in there and name not in made]
    if missing:
        raise SourceSchemaError(f"the frame has no column {', '.join(missing)}; it has {', '.join(there)}")
    return [name for name in config.row_columns if name in there] if vector_fn is None else there


def write_part(
    config: WriteConfig, folder: str, vector_fn: VectorFn | None, batches: Iterable[pa.RecordBatch]
) -> str | None:
    """Writes one partition of a frame to a Parquet file of its own name; what a worker does."""
    with scratch() as here:
        path, rows = here / "part.parquet", 0
        group_rows = max(1, _GROUP_BYTES // (4 * config.vector_spec.dim))
        writer: pq.ParquetWriter | None = None
        try:
            for batch in batches:
                if not batch.num_rows:
                    continue
                plain = _plain(config, batch, vector_fn)
                writer = writer or pq.ParquetWriter(path, plain.schema)
                writer.write_batch(plain, row_group_size=group_rows)
                rows += plain.num_rows
        finally:
            if writer is not None:
                writer.close()
        if not rows:
            return None
        key = f"{folder}/part-{uuid.uuid4().hex}.parquet"
        Store.open(config.store, config.s3, create=True).upload(path, key)
    return key


def _plain(config: WriteConfig, batch: pa.RecordBatch, vector_fn: VectorFn | None) -> pa.RecordBatch:
    """The columns that are read, without extension types; the vector as lists of float32, as it will be stored."""
    spec = config.vector_spec
    rows = pa.record_batch([_storage(column) for column in batch.columns], names=batch.schema.names)
    columns = {name: rows.column(name) for name in config.row_columns if name in rows.schema.names}
    if vector_fn is not None:
        columns[spec.vector_col] = call_vector_fn(vector_fn, rows, spec.dim, "vector_fn")
    if spec.vector_fn is None:
        vectors = columns[spec.vector_col]
        if pa.types.is_null(vectors.type) or _is_list(vectors.type):
            # Frames have no type of fixed-size lists that all engines keep, and float64 is rounded here as it is there.
            columns[spec.vector_col] = pc.cast(vectors, pa.list_(pa.float32()), safe=False)
    return pa.record_batch([columns[name] for name in config.row_columns], names=list(config.row_columns))


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in lists) and pa.types.is_floating(kind.value_type)


def _storage(column: pa.Array) -> pa.Array:
    """A tensor column as what it is stored in: lists of its numbers."""
    if not isinstance(column, pa.ExtensionArray):
        return column
    storage = column.storage
    if pa.types.is_struct(storage.type) and storage.type.get_field_index("data") >= 0:
        # Tensors of several shapes: numbers beside a shape.
        return pc.call_function("struct_field", [storage], pc.StructFieldOptions("data"))
    return storage
