"""What a user says about a snapshot. The same fields, in the same words, are the YAML of the Dagster component."""

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.model import ConfigModel

IndexType = Literal["auto", "flat", "ivf_flat", "ivf_sq", "hnsw", "hnsw_flat"]

# Columns of the stored index that no user column may shadow.
RESERVED_COLUMNS = frozenset({"id", "vector", "payload", "_distance", "_rowid", "query_index"})

# Index libraries name their own columns so: _rowid, _rowaddr, _rowoffset, _row_created_at_version, ...
_RESERVED_PREFIX = "_row"

ColumnName = Annotated[str, Field(min_length=1)]

# Raise when the same config and source must give other bytes than before.
BUILD_VERSION = 1


class S3Options(ConfigModel):
    """One set of credentials for every client. What is left out comes from the environment (``AWS_*``).

    Attributes:
        endpoint_url: for servers other than AWS; ``http://`` is allowed when it says so.
        region: bucket's region.
        access_key_id: key id.
        secret_access_key: secret.
        session_token: for temporary credentials.
    """

    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: SecretStr | None = None
    session_token: SecretStr | None = None


class ClusterSharding(ConfigModel):
    """Shards are k-means clusters; a query asks the ``num_probes`` shards with the nearest centroids.

    Attributes:
        num_probes: shards that a reader asks by default; ``"auto"`` takes the smallest number that meets the gate.
        training_rows: size of the training sample; None is 256 rows a shard, at least 10,000.
        seed: of k-means.
        max_iter: most rounds of k-means.
    """

    strategy: Literal["cluster"] = "cluster"
    num_probes: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    training_rows: Annotated[int, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    max_iter: Annotated[int, Field(gt=0)] = 50


class IndexParams(ConfigModel):
    """Knobs of the index families; None leaves the family's own default.

    Attributes:
        num_partitions: of the IVF families; None is the square root of the shard's rows.
        m: neighbours of an HNSW node.
        ef_construction: candidates while an HNSW graph is built.
    """

    num_partitions: Annotated[int, Field(gt=0)] | None = None
    m: Annotated[int, Field(ge=4, le=128)] = 20
    ef_construction: Annotated[int, Field(ge=8, le=2000)] = 300


class VectorSpec(ConfigModel):
    """The vector of each row and how it is indexed.

    Attributes:
        dim: numbers in a vector.
        vector_col: source column: a fixed-size or variable list of float16, float32 or float64; stored as float32.
        metric: ``cosine``, ``l2`` (squared Euclidean) or ``dot_product``.
        backend: index library of the shards.
        index_type: one family for all shards; ``auto`` is ``flat`` for small shards, then ``ivf_sq``, then ``hnsw``.
        index_params: knobs of that family.
        sharding: which shard a vector belongs to.
    """

    dim: Annotated[int, Field(gt=0, le=65_536)]
    vector_col: ColumnName = "vector"
    metric: DistanceMetric = DistanceMetric.COSINE
    backend: Literal["lancedb"] = "lancedb"
    index_type: IndexType = "auto"
    index_params: IndexParams = IndexParams()
    sharding: ClusterSharding = ClusterSharding()


class RecallGate(ConfigModel):
    """What must be proven before a snapshot is published.

    Attributes:
        k: neighbours asked for.
        min_recall: the lower confidence bound (one-sided, 95 %) of recall@k must reach this.
        query_rows: rows drawn as sample queries; half of them tune ``num_probes``, the other half judges. Below 200 a
            sample proves little. In a table of fewer than 400 rows every row is a query: recall is then counted, not
            estimated.
    """

    k: Annotated[int, Field(gt=0, le=1000)] = 10
    min_recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    query_rows: Annotated[int, Field(ge=200, le=10_000)] = 500


class WriteConfig(ConfigModel):
    """One snapshot: where its rows come from, where it is published, how it is sharded, indexed and gated.

    Attributes:
        name: of the snapshot; Dagster's asset key prefix.
        source: Parquet or Arrow IPC files: a path, a folder, a glob, or an ``s3://`` address of these.
        store: root of the snapshot: ``s3://bucket/prefix`` or a folder.
        num_dbs: number of shards.
        id_col: unique int64 or string id of a row.
        payload_cols: columns that a search returns with each hit, as JSON values. JSON has no NaN and no infinity:
            these become null.
        filter_cols: columns stored beside the vector with their type (float16 as float32). A name has no dot and does
            not begin with ``_row``.
        vector_spec: the vector and its index.
        recall_gate: what must be proven before publishing.
        max_reject_fraction: rejected rows beyond this share stop the build.
        max_shard_skew: largest shard over mean shard that may be published; None only warns above 4.
        batch_rows: rows read at a time.
        s3: credentials and endpoint of source and store; None takes the environment's.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
    source: Annotated[str, Field(min_length=1)]
    store: Annotated[str, Field(min_length=1)]
    num_dbs: Annotated[int, Field(gt=0, le=100_000)]
    id_col: ColumnName = "id"
    payload_cols: tuple[ColumnName, ...] = ()
    filter_cols: tuple[ColumnName, ...] = ()
    vector_spec: VectorSpec
    recall_gate: RecallGate = RecallGate()
    max_reject_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_shard_skew: Annotated[float, Field(ge=1)] | None = None
    batch_rows: Annotated[int, Field(gt=0, le=1_000_000)] = 8192
    s3: S3Options | None = None

    @field_validator("store")
    @classmethod
    def _store_has_no_trailing_slash(cls, value: str) -> str:
        # A trailing slash would give keys with "//", which object clients refuse.
        stripped = value.rstrip("/")
        if value.startswith("s3://") and "/" not in stripped.removeprefix("s3://"):
            raise ValueError("an s3:// store needs a key prefix after the bucket, as in s3://bucket/products")
        return stripped or "/"

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        special = [self.id_col, self.vector_spec.vector_col]
        if special[0] == special[1]:
            raise ValueError(f"id_col and vector_spec.vector_col are both {self.id_col!r}")
        for field in ("payload_cols", "filter_cols"):
            columns: tuple[str, ...] = getattr(self, field)
            repeated = sorted({name for name in columns if columns.count(name) > 1})
            if repeated:
                raise ValueError(f"{field} names {', '.join(repeated)} more than once")
            if self.vector_spec.vector_col in columns:
                raise ValueError(f"{field} names the vector column {self.vector_spec.vector_col!r}")
        dotted = sorted(name for name in self.filter_cols if "." in name)
        if dotted:
            raise ValueError(
                f"filter_cols: {', '.join(dotted)} has a dot, which means a nested field; rename the column"
            )
        clash = sorted(
            name for name in self.filter_cols if name in RESERVED_COLUMNS or name.lower().startswith(_RESERVED_PREFIX)
        )
        if clash:
            raise ValueError(f"filter_cols: {', '.join(clash)} is a name that the index itself uses; rename the column")
        probes = self.vector_spec.sharding.num_probes
        if probes != "auto" and probes > self.num_dbs:
            raise ValueError(f"vector_spec.sharding.num_probes {probes} is more than num_dbs {self.num_dbs}")
        return self

    @property
    def row_columns(self) -> tuple[str, ...]:
        """Source columns that are read, without repeats: id, vector, payload, filters."""
        names = (self.id_col, self.vector_spec.vector_col, *self.payload_cols, *self.filter_cols)
        return tuple(dict.fromkeys(names))

    def build_fields(self) -> dict[str, Any]:
        """The fields that change a shard's bytes: not where it is published, not the gate, not the credentials."""
        spec = self.vector_spec.model_dump(mode="json")
        spec["sharding"].pop("num_probes", None)
        return {
            "build_version": BUILD_VERSION,
            "num_dbs": self.num_dbs,
            "id_col": self.id_col,
            "payload_cols": self.payload_cols,
            "filter_cols": self.filter_cols,
            "vector_spec": spec,
            "query_rows": self.recall_gate.query_rows,
            "k": self.recall_gate.k,
        }

    def gate_key(self) -> str:
        """Digest of what decides ``num_probes`` and the verdicts on one and the same set of shards."""
        return digest_json(
            {
                "gate": self.recall_gate.model_dump(mode="json"),
                "num_probes": self.vector_spec.sharding.num_probes,
                "max_shard_skew": self.max_shard_skew,
            }
        )


def digest_json(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
