"""A source on S3 and configurations over it, for tests that need an engine's workers."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sf_pipelines import ShardedVectorReader, UnifiedShardedReader, WriteConfig
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.engines.misbehaving import Misbehaving
from sf_pipelines_tests.tables import clustered, vector_table

ROWS, DIM, SHARDS = 400, 16, 3
ENGINES = ["local", "dask", "ray", "spark"]
# Rows of a row group; as many as misbehaving workers take into one range.
GROUP, RANGES = 100, 4

TIERS = "abc"
_BY_TIER = {
    "strategy": "cel",
    "cel_expr": "tier == 'a' ? 0 : tier == 'b' ? 1 : 2",
    "cel_columns": {"tier": "string"},
}
_KEYS = {"key_value": {"key_col": "id", "value_cols": ["title"]}, "payload_cols": ()}
# Between them every strategy, both index libraries, with and without keys.
KINDS: dict[str, dict[str, Any]] = {
    "cluster": {"vector_spec": {"dim": DIM, "sharding": {"strategy": "cluster"}}},
    "lsh": {"vector_spec": {"dim": DIM, "backend": "sqlite-vec", "sharding": {"strategy": "lsh"}}},
    "cel": {"vector_spec": {"dim": DIM, "sharding": _BY_TIER}, **_KEYS},
    "hash": {"vector_spec": {"dim": DIM, "backend": "sqlite-vec"}, **_KEYS},
}


@dataclasses.dataclass(frozen=True)
class Lake:
    """A bucket with a source of four row groups.

    Attributes:
        bucket: its name.
        s3: credentials.
        folder: where workers look for orders.
    """

    bucket: str
    s3: S3Options
    folder: Path

    def fill(self, *, seed: int = 0) -> Float32:
        """Writes the source; its vectors."""
        vectors = clustered(ROWS, DIM, seed=seed)
        titles, tiers = [f"row {n}" for n in range(ROWS)], [TIERS[n % 3] for n in range(ROWS)]
        sink = pa.BufferOutputStream()
        pq.write_table(vector_table(vectors, title=titles, tier=tiers), sink, row_group_size=GROUP)
        Store.open(f"s3://{self.bucket}/source", self.s3).put("rows.parquet", sink.getvalue().to_pybytes())
        return vectors

    def order(self, name: str, needle: str) -> None:
        """Has workers misbehave at the writes of objects whose keys contain a text; see ``misbehaving``."""
        (self.folder / name).write_text(needle)

    def config(self, kind: str, store: str) -> WriteConfig:
        """A snapshot of this source."""
        fields: dict[str, Any] = {
            "name": "spread",
            "source": f"s3://{self.bucket}/source/rows.parquet",
            "store": f"s3://{self.bucket}/{store}",
            "s3": self.s3,
            "num_dbs": SHARDS,
            "payload_cols": ("title",),
            "folder": self.folder,
        }
        return Misbehaving(**(fields | KINDS[kind]))

    def reader(self, config: WriteConfig, cache: Path) -> ShardedVectorReader | UnifiedShardedReader:
        """A reader that has seen nothing before."""
        face = ShardedVectorReader if config.key_value is None else UnifiedShardedReader
        return face(config.store, s3=self.s3, cache_dir=cache)


def answers(reader: ShardedVectorReader | UnifiedShardedReader, vectors: Float32) -> list[list[tuple[Any, float]]]:
    """The three nearest rows of each vector, in all shards."""
    responses = reader.batch_search(vectors, top_k=3, shard_ids=list(range(SHARDS)))
    return [[(found.id, found.score) for found in response.results] for response in responses]
