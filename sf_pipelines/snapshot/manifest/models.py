"""What a manifest says, as typed values.

Everything in a manifest may come from a stranger: types are strict, sizes are capped, and an address in it is
only ever used relative to the manifest's own prefix (see ``Manifest.key_of``).
"""

import re
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import unquote

from pydantic import AwareDatetime, ConfigDict, Field, ValidationError, field_validator, model_validator

from sf_pipelines.snapshot.errors import ManifestError
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.model import Model, describe_validation

FORMAT_VERSION = 4
MANIFEST_CONTENT_TYPE = "application/x-sqlite3"
VECTOR_KEY_COLUMN = "_vector_id"
SHARD_PREFIX = "shards"
DB_PATH_TEMPLATE = "db={db_id:05d}"
EXTRAS_KEY = "sf_pipelines"
EXTRAS_VERSION = 1

# A reader makes an entry for every shard, listed or not.
MAX_SHARDS = 100_000
_MAX_NAME = 4096
_BEYOND_ANY_SHARD = 2**53

Count = Annotated[int, Field(ge=0, lt=_BEYOND_ANY_SHARD)]
Name = Annotated[str, Field(max_length=_MAX_NAME)]
KeyScalar = Annotated[int | str, Field(union_mode="smart")]


# An escape that survived unquoting would be unquoted once more by some client.
_SUSPICIOUS = re.compile(r"[\\%]")


class WireModel(Model):
    """Part of a manifest: no value is converted from another type."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


Part = TypeVar("Part", bound=WireModel)


class ShardObject(WireModel):
    """One object of a shard, sealed; its path is relative to the shard's directory."""

    path: Name
    size: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("path")
    @classmethod
    def _path_stays_inside(cls, value: str) -> str:
        if problem := unsafe_key(value):
            raise ValueError(problem)
        return value


class ShardRow(WireModel):
    """One shard.

    Attributes:
        db_url: address of its directory; None for an empty shard.
        attempt: which attempt at building it won.
        checkpoint_id: opaque id of these bytes.
        writer_info: anything that the writer noted.
        objects: every object with size and digest; None where the writer recorded none (stock).
    """

    db_id: Annotated[int, Field(ge=0, lt=MAX_SHARDS)]
    db_url: Name | None
    attempt: Count = 0
    row_count: Count
    db_bytes: Count
    min_key: KeyScalar | None = None
    max_key: KeyScalar | None = None
    checkpoint_id: Name | None = None
    writer_info: dict[str, Any] = Field(default_factory=dict)
    objects: Annotated[tuple[ShardObject, ...], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.db_url is None and self.row_count:
            raise ValueError(f"has {self.row_count} rows but no db_url")
        paths = [item.path for item in self.objects or ()]
        if len(set(paths)) != len(paths):
            raise ValueError("names one object twice")
        return self


class ShardingRecord(WireModel):
    """How keys find their shard. Vector-only snapshots carry the default as a placeholder.

    ``routing_values`` has the expression's value for each shard; None where it gives the shard's number.
    """

    strategy: Literal["hash", "cel"] = "hash"
    hash_algorithm: Literal["xxh3_64"] = "xxh3_64"
    cel_expr: str | None = None
    cel_columns: dict[str, str] | None = None
    routing_values: Annotated[tuple[int | str, ...], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.strategy == "hash":
            for name in ("cel_expr", "cel_columns", "routing_values"):
                if getattr(self, name) is not None:
                    raise ValueError(f"strategy 'hash' has no {name}")
            return self
        if not self.cel_expr or not self.cel_columns:
            raise ValueError("strategy 'cel' needs cel_expr and cel_columns")
        values = self.routing_values
        if values is not None:
            if len({type(value) for value in values}) > 1:
                raise ValueError("routing_values mixes numbers and text")
            if len(set(values)) != len(values):
                raise ValueError("routing_values names a value twice")
        return self


class VectorMeta(WireModel):
    """``custom.vector``: what a vector reader needs. Unknown fields are somebody else's and ignored.

    Vector-only snapshots may leave out ``metric`` (cosine) and ``sharding_strategy`` (explicit): readers of the format
    take these defaults. In unified ones the metric is required, and there is no strategy.

    Attributes:
        index_type: informational, as ``quantization`` and ``total_vectors`` are.
        num_probes: shards that a reader asks by default.
        centroids_ref: address of the ``.npy`` with one centroid per shard (cluster).
        hyperplanes_ref: address of the ``.npy`` with one hyperplane per bit (lsh).
        routing_values: value of ``cel_expr`` for each shard; bytes as ``{"__bytes_hex__": "…"}``.
        unified: whether the shards hold keys and values too.
    """

    model_config = ConfigDict(extra="ignore")

    dim: Annotated[int, Field(gt=0, le=65_536)]
    metric: Annotated[DistanceMetric, Field(strict=False)]
    index_type: str = "hnsw"
    quantization: str | None = None
    total_vectors: Count | None = None
    sharding_strategy: Literal["cluster", "lsh", "explicit", "cel"] | None = None
    num_probes: Annotated[int, Field(gt=0, lt=_BEYOND_ANY_SHARD)] = 1
    centroids_ref: Name | None = None
    hyperplanes_ref: Name | None = None
    num_hash_bits: Annotated[int, Field(gt=0, le=4096)] | None = None
    cel_expr: str | None = None
    cel_columns: dict[str, str] | None = None
    routing_values: Annotated[tuple[int | str | dict[str, str], ...], Field(strict=False)] | None = None
    unified: bool = False
    backend: Literal["lancedb", "sqlite-vec"] | None = None
    kv_backend: Literal["sqlite-vec", "sqlite", "slatedb"] | None = None
    index_params: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _vector_only_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("unified", False) is not False:
            return data
        return {"metric": DistanceMetric.COSINE, "sharding_strategy": "explicit", **data}


class CurvePoint(WireModel):
    """Recall of the tuning queries at one number of probes, and the share of rows in the asked shards; means."""

    model_config = ConfigDict(extra="ignore")

    num_probes: Annotated[int, Field(gt=0, le=MAX_SHARDS)]
    recall: float
    lower: float
    rows_searched: float


class JudgedRecord(WireModel):
    """The recall of the snapshot: of the judging queries, which did not choose ``num_probes``, asked as readers ask.

    The lower bound is one-sided, of 95 %. The fifth percentile is None in snapshots published before it was recorded.
    """

    model_config = ConfigDict(extra="ignore")

    num_probes: Annotated[int, Field(gt=0, le=MAX_SHARDS)]
    queries: Count
    recall: float
    lower: float
    percentile_5: float | None = None


class RecallRecord(WireModel):
    """What was measured before publishing; nothing judged in snapshots published before that was recorded here."""

    model_config = ConfigDict(extra="ignore")

    k: Annotated[int, Field(gt=0, le=1000)]
    min_recall: Annotated[float, Field(gt=0, le=1)]
    judged: JudgedRecord | None = None
    curve: Annotated[tuple[CurvePoint, ...], Field(strict=False, max_length=MAX_SHARDS)] = ()


class SnapshotExtras(WireModel):
    """``custom.sf_pipelines``: what this package adds. A reader must be able to do without.

    Attributes:
        version: of these fields.
        build_key: digest of source version and config.
        gate_key: digest of the gate that the snapshot was assembled for.
        vector_type: how vectors are stored; under ``float16`` they are routed as rounded to it.
        payload_columns: columns of a hit's payload; None in snapshots published before it was recorded.
        filter_columns: columns beside the vector with their Arrow types.
        value_format: ``json`` object of columns or ``bytes`` as given (unified snapshots).
        rejected: rows that the data contract turned away.
        routing_sha256: hex digest of the object that ``centroids_ref`` or ``hyperplanes_ref`` names.
    """

    model_config = ConfigDict(extra="ignore")

    version: Literal[1] = 1
    build_key: str
    gate_key: str
    index_family: str
    id_type: Literal["int64", "string"]
    backend: Literal["lancedb", "sqlite-vec"] = "lancedb"
    vector_type: Literal["float32", "float16"] = "float32"
    payload_columns: Annotated[tuple[Name, ...], Field(strict=False)] | None = None
    filter_columns: dict[str, str] = Field(default_factory=dict)
    key_type: Literal["int64", "string", "bytes"] | None = None
    value_format: Literal["json", "bytes"] | None = None
    row_count: Count
    rejected: Count = 0
    recall: RecallRecord | None = None
    routing_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    def to_custom(self) -> dict[str, Any]:
        """The fields as the manifest stores them."""
        return self.model_dump(mode="json", exclude_none=True)


class Manifest(WireModel):
    """One snapshot.

    Attributes:
        num_dbs: number of shards, empty ones included.
        s3_prefix: address of the root that it was written for.
        db_path_template: Python format of a shard's directory.
        shard_prefix: directory of all shards.
        key_encoding: of the keys; ``raw`` for vectors.
        custom: kind-specific fields (``vector``) and everybody's extras.
        shards: shards that have a row, by ``db_id``.
    """

    run_id: Annotated[str, Field(min_length=1, max_length=512)]
    created_at: AwareDatetime
    num_dbs: Annotated[int, Field(gt=0, le=MAX_SHARDS)]
    s3_prefix: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://.", max_length=_MAX_NAME)]
    key_col: Name = VECTOR_KEY_COLUMN
    db_path_template: Name = DB_PATH_TEMPLATE
    shard_prefix: Name = SHARD_PREFIX
    format_version: Literal[4] = FORMAT_VERSION
    key_encoding: Literal["u64be", "u32be", "utf8", "raw"] = "raw"
    sharding: ShardingRecord = ShardingRecord()
    custom: dict[str, Any] = Field(default_factory=dict)
    shards: Annotated[tuple[ShardRow, ...], Field(strict=False)]

    @property
    def row_count(self) -> int:
        """Rows of all shards."""
        return sum(shard.row_count for shard in self.shards)

    @property
    def vector(self) -> VectorMeta:
        """The vector fields; a ``ManifestError`` where there are none, or one is missing or of the wrong type."""
        return self._part(VectorMeta, "vector")

    @property
    def extras(self) -> SnapshotExtras | None:
        """What this package added; None in snapshots of others.

        Another version is refused: what it says of how vectors are stored and found may then mean something else.
        """
        found = self.custom.get(EXTRAS_KEY)
        if found is None:
            return None
        if isinstance(found, dict) and found.get("version") != EXTRAS_VERSION:
            raise ManifestError(
                f"custom.{EXTRAS_KEY}.version is {found.get('version', 'missing')!r:.40}, must be {EXTRAS_VERSION}; "
                "use the version of this package that wrote it"
            )
        return self._part(SnapshotExtras, EXTRAS_KEY)

    def validated(self) -> Self:
        """This manifest; a ``ManifestError`` that says which of its parts do not agree."""
        seen: set[int] = set()
        for shard in self.shards:
            where = f"shards row db_id={shard.db_id}"
            if shard.db_id >= self.num_dbs:
                raise ManifestError(f"{where}: is not below build_meta.num_dbs {self.num_dbs}")
            if shard.db_id in seen:
                raise ManifestError(f"{where}: is there twice")
            seen.add(shard.db_id)
            if shard.db_url is not None:
                self.key_of(shard.db_url, field=f"{where} db_url")
        values = self.sharding.routing_values
        if values is not None and len(values) != self.num_dbs:
            raise ManifestError(
                f"build_meta.sharding.routing_values has {len(values)} values for {self.num_dbs} shards"
            )
        self._check_custom()
        return self

    def key_of(self, ref: str, *, field: str = "ref") -> str:
        """Key below the root of an address in this manifest, relative to its own ``s3_prefix``.

        So a copied snapshot is read where it is, and nothing outside of the root is ever touched.
        """
        prefix = self.s3_prefix.rstrip("/") + "/"
        if not ref.startswith(prefix):
            raise ManifestError(f"{field} {ref!r:.300} is not below the manifest's own {self.s3_prefix!r:.300}")
        try:
            return tail_of(ref, ref[len(prefix) :])
        except ValueError as error:
            raise ManifestError(f"{field} {ref!r:.300}: {error}") from error

    def _check_custom(self) -> None:
        if "vector" in self.custom:
            vector = self.vector
            placeholder = self.sharding == ShardingRecord() and self.key_encoding == "raw"
            if not vector.unified and not placeholder:
                raise ManifestError(
                    f"build_meta: a vector-only snapshot has sharding {self.sharding.strategy!r} and "
                    f"key_encoding {self.key_encoding!r}, must be the placeholder 'hash' and 'raw'"
                )
            for name in ("centroids_ref", "hyperplanes_ref"):
                ref: str | None = getattr(vector, name)
                if ref is not None:
                    self.key_of(ref, field=f"custom.vector.{name}")
        extras = self.extras
        if extras is not None and extras.row_count != self.row_count:
            raise ManifestError(
                f"custom.{EXTRAS_KEY}.row_count is {extras.row_count}, but the shards have {self.row_count}"
            )

    def _part(self, kind: type[Part], name: str) -> Part:
        found = self.custom.get(name)
        if found is None:
            raise ManifestError(f"custom.{name} is missing")
        try:
            return kind.model_validate(found)
        except ValidationError as error:
            raise ManifestError(describe_validation(f"custom.{name}", error)) from error


def tail_of(ref: str, tail: str) -> str:
    """The plain key that the tail of an address names, unquoted for local files; else a ``ValueError``."""
    if ref.startswith("file://"):
        try:
            tail = unquote(tail, errors="strict")
        except UnicodeDecodeError as error:
            raise ValueError("has escapes that are no UTF-8") from error
    if problem := unsafe_key(tail):
        raise ValueError(problem)
    return tail


def unsafe_key(key: str) -> str | None:
    """Why a key from somebody else must not be used below a root; None when it may."""
    if not key or key.startswith("/"):
        return "is no relative key"
    if _SUSPICIOUS.search(key) or not key.isprintable():
        return "holds a backslash, an escape or a character that cannot be printed"
    if any(segment in {"", ".", ".."} for segment in key.split("/")):
        return "has an empty, '.' or '..' segment"
    return None
