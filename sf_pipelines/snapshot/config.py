"""What a user says about a snapshot. The same fields, in the same words, are the YAML of the Dagster component."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.model import ConfigModel, digest_json
from sf_pipelines.snapshot.sharding import (
    CelSharding,
    ClusterSharding,
    ColumnName,
    ExplicitSharding,
    HashSharding,
    LshSharding,
    Sharding,
)
from sf_pipelines.snapshot.store.addresses import location_fault
from sf_pipelines.snapshot.store.client import S3Options

IndexType = Literal["auto", "flat", "ivf_flat", "ivf_sq", "hnsw", "hnsw_flat"]

# Columns of the stored index that no user column may shadow.
RESERVED_COLUMNS = frozenset({"id", "vector", "payload", "_distance", "_rowid", "query_index"})

# Index libraries name their own columns so: _rowid, _rowaddr, _rowoffset, _row_created_at_version, ...; the second
# is how routed rows carry keys and values.
_RESERVED_PREFIXES = ("_row", "_kv_")
# sqlite-vec allows 16 metadata columns, and each filter column needs a second one for its nulls (``…__null``).
_SQLITE_VEC_FILTERS = 8
_SQLITE_VEC_NAME = re.compile(r"^(?!.*__null\Z)[a-zA-Z][a-zA-Z0-9_]*\Z")
_SQLITE_VEC_DIM = 8192
_SQLITE_VEC_TAKEN = frozenset({"rowid", "embedding", "distance", "k"})

KeyEncoding = Literal["u64be", "u32be", "utf8", "raw"]

# Raise when the same config and source must give other bytes than before.
BUILD_VERSION = 2


class KeyValueSpec(ConfigModel):
    """The key and the value of each row, in a snapshot that serves both keys and vectors.

    The vector's id is the key (of bytes, their hex digits), so what a search finds can be fetched.

    Attributes:
        key_col: unique source column: integers, strings or bytes.
        value_cols: columns that make up the value, as one JSON object.
        value_col: or one column of bytes or strings that is the value as it is.
        key_encoding: how keys are stored; ``auto`` is ``u64be`` for integers, ``utf8`` for strings, ``raw`` for bytes.
    """

    key_col: ColumnName
    value_cols: tuple[ColumnName, ...] = ()
    value_col: ColumnName | None = None
    key_encoding: KeyEncoding | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _one_kind_of_value(self) -> Self:
        if bool(self.value_cols) == (self.value_col is not None):
            raise ValueError("give either value_cols (one JSON object) or value_col (bytes as they are)")
        if repeated := _repeated(self.value_cols):
            raise ValueError(f"value_cols names {repeated} more than once")
        return self

    @property
    def value_format(self) -> Literal["json", "bytes"]:
        """What a value is: a JSON object of columns, or bytes as given."""
        return "json" if self.value_cols else "bytes"

    @property
    def columns(self) -> tuple[str, ...]:
        """Source columns of key and value."""
        return (self.key_col, *self.value_cols, *([self.value_col] if self.value_col is not None else []))


class IndexParams(ConfigModel):
    """Knobs of the index families; None leaves the family's own default.

    Attributes:
        num_partitions: partitions of the IVF families (None: one for every 1,000 rows), graphs of the HNSW ones (None:
            one for every 100,000).
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
        vector_fn: ``package.module:function`` that makes the vectors instead: it is given a record batch of
            ``vector_fn_cols`` and returns an array of so many lists of ``dim`` numbers. The same rows must always
            give the same vectors.
        vector_fn_cols: source columns that it is given.
        vector_fn_version: version of what it computes; another one is another build.
        metric: ``cosine``, ``l2`` (squared Euclidean) or ``dot_product``.
        backend: index library of the shards: ``lancedb``, or ``sqlite-vec`` (one SQLite file a shard, exact scan;
            cosine and l2 only).
        index_type: one family for all shards; ``auto`` is ``flat`` for small shards, then ``ivf_sq``, then ``hnsw``.
        index_params: knobs of that family.
        quantization: ``fp16`` stores vectors as float16; ``i8`` indexes 8-bit numbers and keeps the full vectors for
            exact scores; None stores float32. LanceDB only.
        sharding: which shard a vector belongs to; None is HASH by key where there are keys, else CLUSTER.
    """

    dim: Annotated[int, Field(gt=0, le=65_536)]
    vector_col: ColumnName = "vector"
    vector_fn: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    vector_fn_cols: tuple[ColumnName, ...] = ()
    vector_fn_version: str = "1"
    metric: DistanceMetric = DistanceMetric.COSINE
    backend: Literal["lancedb", "sqlite-vec"] = "lancedb"
    index_type: IndexType = "auto"
    index_params: IndexParams = IndexParams()
    quantization: Literal["fp16", "i8"] | None = None
    sharding: Sharding | None = None

    @model_validator(mode="after")
    def _backend_can_do_it(self) -> Self:
        if (self.vector_fn is None) != (not self.vector_fn_cols):
            raise ValueError("vector_fn and vector_fn_cols go together: the function and the columns that it is given")
        if self.vector_fn is None and "vector_fn_version" in self.model_fields_set:
            raise ValueError("vector_fn_version means nothing without vector_fn; leave it out")
        if self.vector_fn is not None and "vector_col" in self.model_fields_set:
            raise ValueError("vector_col and vector_fn exclude each other: leave one of them out")
        if _repeated(self.vector_fn_cols):
            raise ValueError(f"vector_fn_cols names a column twice: {', '.join(self.vector_fn_cols)}")
        self._check_index_params()
        if self.quantization == "i8" and self.index_type not in {"auto", "ivf_sq", "hnsw"}:
            raise ValueError(
                f"quantization i8 needs an 8-bit index, but index_type is {self.index_type!r}; use auto, ivf_sq or hnsw"
            )
        if self.backend == "sqlite-vec":
            self._check_sqlite_vec()
        return self

    def _check_sqlite_vec(self) -> None:
        dim, quantization, index_type = self.dim, self.quantization, self.index_type
        for holds, fault in (
            (self.metric is DistanceMetric.DOT_PRODUCT, "has no dot_product; use metric cosine or l2, or"),
            (dim > _SQLITE_VEC_DIM, f"holds vectors of up to {_SQLITE_VEC_DIM} numbers, and dim is {dim}; use"),
            (quantization, f"has no quantization {quantization!r}; leave it out or use"),
            (index_type not in {"auto", "flat"}, f"scans and has no index_type {index_type!r}; use auto, or"),
        ):
            if holds:
                raise ValueError(f"backend sqlite-vec {fault} backend lancedb")

    def _check_index_params(self) -> None:
        """A knob that the index does not have would change nothing, and nobody would know."""
        given = self.index_params.model_fields_set
        graph, partitioned = {"auto", "hnsw", "hnsw_flat"}, self.index_type != "flat"
        known = {"num_partitions"} if partitioned else set()
        known |= {"m", "ef_construction"} if self.index_type in graph else set()
        unknown = sorted(given - (known if self.backend == "lancedb" else set()))
        if unknown:
            raise ValueError(
                f"index_params.{', '.join(unknown)} means nothing for index_type {self.index_type!r} on backend "
                f"{self.backend!r}; leave it out"
            )

    @property
    def vector_type(self) -> Literal["float32", "float16"]:
        """How a vector is stored."""
        return "float16" if self.quantization == "fp16" else "float32"

    @property
    def source_columns(self) -> tuple[str, ...]:
        """Source columns that the vector is made of."""
        return self.vector_fn_cols if self.vector_fn is not None else (self.vector_col,)


class RecallGate(ConfigModel):
    """What must be proven before a snapshot is published.

    Attributes:
        k: neighbours asked for.
        min_recall: the lower confidence bound (one-sided, 95 %) of recall@k must reach this.
        query_rows: rows drawn as sample queries; half of them tune ``num_probes``, the other half judges. Below 200 a
            sample proves little. In a table of fewer than 400 rows every row is a query: recall is then counted, not
            estimated.
        blocking: checks that also keep a snapshot from being published; without it they warn: ``recall_spread`` (the
            recall of single shards) and ``rows_reachable`` (rows that their own vector finds).
    """

    k: Annotated[int, Field(gt=0, le=1000)] = 10
    min_recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    query_rows: Annotated[int, Field(ge=200, le=10_000)] = 500
    blocking: tuple[Literal["recall_spread", "rows_reachable"], ...] = ()


class DriftLimits(ConfigModel):
    """How far a new snapshot may differ from the current one before the drift check says so.

    Attributes:
        min_overlap: mean share of the same rows in the answers of both snapshots to the query sample.
        max_gone_fraction: rows that are gone, as a share of the current snapshot's.
        max_added_fraction: rows that are new, as a share of the current snapshot's.
        max_changed_fraction: rows that have another vector, as a share of the current snapshot's.
        max_routing_shift: furthest that a centroid or a hyperplane has moved: 1 - cos, of centroids under l2 and
            dot_product the Euclidean distance.
        blocking: whether a snapshot beyond a limit is kept from being published; else it is a warning.
    """

    min_overlap: Annotated[float, Field(ge=0, le=1)] | None = None
    max_gone_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    max_added_fraction: Annotated[float, Field(ge=0)] | None = None
    max_changed_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    max_routing_shift: Annotated[float, Field(ge=0)] | None = None
    blocking: bool = False

    @model_validator(mode="after")
    def _blocks_by_something(self) -> Self:
        limits = self.model_dump(exclude={"blocking"})
        if self.blocking and all(limit is None for limit in limits.values()):
            raise ValueError(f"blocking means nothing without one of {', '.join(limits)}")
        return self


class WriteConfig(ConfigModel):
    """One snapshot: where its rows come from, where it is published, how it is sharded, indexed and gated.

    Attributes:
        name: of the snapshot; Dagster's asset key prefix.
        source: Parquet or Arrow IPC files (or streams): a path, a folder, a glob, or an ``s3://`` address of these.
        store: root of the snapshot: ``s3://bucket/prefix`` or a folder.
        num_dbs: number of shards; ``auto`` goes by rows and bytes of the source, and keeps the number of the current
            snapshot while that is within a factor of two (docs/kinds.md has the rule).
        id_col: unique id of a row: integers, strings or UUIDs (which become text); with ``key_value`` always the key.
        payload_cols: columns that a search returns with each hit, as JSON values. NaN and infinity become null, dates
            and times ISO 8601 text, decimals text, UUIDs text, bytes hex digits, maps objects.
        filter_cols: columns stored beside the vector with their type (float16 as float32). A name has no
            dot, backtick or NUL and does not begin with ``_row``; on sqlite-vec it is a letter, then ASCII letters,
            digits and underscores.
        key_value: the key and the value of each row, for a unified snapshot; None is vectors only.
        vector_spec: the vector and its index.
        recall_gate: what must be proven before publishing.
        max_reject_fraction: rejected rows beyond this share stop the build.
        drift: how far a snapshot may differ from the current one; None only measures.
        max_shard_skew: largest shard over mean shard that may be published; None only warns above 4.
        retrain: whether centroids or hyperplanes of the current snapshot are used again, so that shards whose rows have
            not changed are copied in place of built: ``auto`` does until the data has drifted from them or the gate
            fails with them, ``always`` trains anew each time, ``never`` as long as they fit the configuration.
        batch_rows: rows read at a time.
        s3: credentials and endpoint of source and store; None takes the environment's.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
    source: Annotated[str, Field(min_length=1)]
    store: Annotated[str, Field(min_length=1)]
    num_dbs: Annotated[int, Field(gt=0, le=100_000)] | Literal["auto"] = "auto"
    id_col: ColumnName = "id"
    payload_cols: tuple[ColumnName, ...] = ()
    filter_cols: tuple[ColumnName, ...] = ()
    key_value: KeyValueSpec | None = None
    vector_spec: VectorSpec
    recall_gate: RecallGate = RecallGate()
    max_reject_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drift: DriftLimits | None = None
    max_shard_skew: Annotated[float, Field(ge=1)] | None = None
    retrain: Literal["auto", "always", "never"] = "auto"
    batch_rows: Annotated[int, Field(gt=0, le=1_000_000)] = 8192
    s3: S3Options | None = None
    # Whether num_dbs was chosen by the rule: then it is no part of what makes a build another one.
    _auto: bool = PrivateAttr(default=False)

    @field_validator("source", "store")
    @classmethod
    def _can_be_opened(cls, value: str, info: ValidationInfo) -> str:
        if fault := location_fault(value):
            raise ValueError(fault)
        if info.field_name == "source":
            return value
        # A trailing slash would give keys with "//", which object clients refuse.
        stripped = value.rstrip("/")
        if value.startswith("s3://") and "/" not in stripped.removeprefix("s3://"):
            raise ValueError("an s3:// store needs a key prefix after the bucket, as in s3://bucket/products")
        return stripped or "/"

    @model_validator(mode="before")
    @classmethod
    def _id_is_the_key(cls, data: Any) -> Any:
        key_value = data.get("key_value") if isinstance(data, dict) else None
        if key_value is None:
            return data
        key = key_value.get("key_col") if isinstance(key_value, dict) else getattr(key_value, "key_col", None)
        return data if key is None else {"id_col": key, **data}

    @field_validator("vector_spec")
    @classmethod
    def _sharding_has_a_default(cls, spec: VectorSpec, info: ValidationInfo) -> VectorSpec:
        if spec.sharding is not None:
            return spec
        default = ClusterSharding() if info.data.get("key_value") is None else HashSharding()
        return spec.model_copy(update={"sharding": default})

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        spec = self.vector_spec
        if spec.vector_fn is None and self.id_col == spec.vector_col:
            raise ValueError(f"id_col and vector_spec.vector_col are both {self.id_col!r}")
        if self.key_value is not None and self.id_col != self.key_value.key_col:
            raise ValueError(
                f"id_col is {self.id_col!r}, but in a snapshot with keys the id is the key: leave id_col out, or make "
                f"it key_value.key_col {self.key_value.key_col!r}"
            )
        for field in ("payload_cols", "filter_cols"):
            columns: tuple[str, ...] = getattr(self, field)
            if repeated := _repeated(columns):
                raise ValueError(f"{field} names {repeated} more than once")
            if spec.vector_fn is None and spec.vector_col in columns:
                raise ValueError(f"{field} names the vector column {spec.vector_col!r}")
        self._check_filter_names()
        return self

    def _check_filter_names(self) -> None:
        def refuse(wrong: Callable[[str], object], why: str) -> None:
            if names := sorted(name for name in self.filter_cols if wrong(name)):
                raise ValueError(f"filter_cols: {', '.join(names)} {why}; rename the column")

        refuse(
            lambda name: any(mark in name for mark in ".`\0"),
            "has a dot or a backtick, which mean nested fields, or a NUL, which ends a name",
        )
        refuse(
            lambda name: name in RESERVED_COLUMNS or name.lower().startswith(_RESERVED_PREFIXES),
            "is a name that the index itself uses",
        )
        if self.vector_spec.backend != "sqlite-vec":
            return
        if len(self.filter_cols) > _SQLITE_VEC_FILTERS:
            raise ValueError(
                f"filter_cols names {len(self.filter_cols)} columns; sqlite-vec can store {_SQLITE_VEC_FILTERS}"
            )
        taken = [*_SQLITE_VEC_TAKEN, *(name.lower() for name in self.filter_cols)]
        refuse(
            lambda name: not _SQLITE_VEC_NAME.match(name) or taken.count(name.lower()) > 1,
            "cannot be a column of sqlite-vec: a letter, then letters, digits and underscores, not ending in __null, "
            f"not {', '.join(sorted(_SQLITE_VEC_TAKEN))}, different whatever the case",
        )

    @model_validator(mode="after")
    def _sharding_fits(self) -> Self:
        sharding, where = self.sharding, "vector_spec.sharding"
        keyed = isinstance(sharding, HashSharding) or (self.key_value is not None and isinstance(sharding, CelSharding))
        if self.key_value is not None and not keyed:
            raise ValueError(
                f"{where} is {sharding.strategy!r}, but rows with keys are sharded by hash or cel, so that a key "
                "says where it is"
            )
        if self.key_value is None and isinstance(sharding, HashSharding):
            raise ValueError(
                f"{where} is 'hash', which needs key_value; vectors alone use cluster, lsh, explicit or cel"
            )
        if self.num_dbs == "auto":
            if self.shard_count is None and isinstance(sharding, ExplicitSharding | CelSharding):
                raise ValueError(
                    f"num_dbs: auto means nothing for {where} {sharding.strategy!r}, by which rows name their shard; "
                    "say how many there are"
                )
        else:
            sharding.check_number(where, self.num_dbs)
        if isinstance(sharding, CelSharding) and sharding.routing_values is not None:
            values = sharding.routing_values
            if self.num_dbs not in {"auto", len(values)}:
                raise ValueError(f"{where}.routing_values has {len(values)} values for num_dbs {self.num_dbs} shards")
            if self.key_value is not None and isinstance(values[0], bytes):
                raise ValueError(f"{where}.routing_values: with keys the format knows no bytes here; use text")
        return self

    @property
    def most_shards(self) -> int | None:
        """What the sharding's own fields allow; None where they say nothing."""
        return self.sharding.most_shards

    @property
    def shard_count(self) -> int | None:
        """Number of shards; None where the source decides it."""
        if self.num_dbs != "auto":
            return self.num_dbs
        values = self.sharding.routing_values if isinstance(self.sharding, CelSharding) else None
        return None if values is None else len(values)

    @property
    def shards(self) -> int:
        """Number of shards; a ``ConfigError`` where it is ``auto`` and no scan has looked at the source yet."""
        count = self.shard_count
        if count is None:
            raise ConfigError("WriteConfig.num_dbs: auto has no number before the source was scanned")
        return count

    def sized(self, num_dbs: int) -> Self:
        """The same with the number of shards that ``auto`` has come to; a ``ConfigError`` if it cannot be that."""
        if self.num_dbs != "auto" and not self._auto:
            return self
        sized = self.model_copy(update={"num_dbs": num_dbs})
        sized._auto = True  # noqa: SLF001 - of this class
        try:
            self.sharding.check_number("vector_spec.sharding", num_dbs)
        except ValueError as error:
            raise ConfigError(f"WriteConfig: {error}, which auto has chosen; say num_dbs yourself") from None
        return sized

    def below(self, folder: Path) -> Self:
        """The same with relative paths of source and store taken from a folder, in place of the process's own."""
        paths = {name: getattr(self, name) for name in ("source", "store") if "://" not in getattr(self, name)}
        return self.model_copy(
            update={name: str(folder.absolute() / Path(path).expanduser()) for name, path in paths.items()}
        )

    @property
    def sharding(self) -> ClusterSharding | LshSharding | ExplicitSharding | CelSharding | HashSharding:
        """How rows find their shard, with the default filled in."""
        sharding = self.vector_spec.sharding
        if sharding is None:
            raise ConfigError("WriteConfig.vector_spec was replaced without a sharding; make a new WriteConfig")
        return sharding

    @property
    def num_probes(self) -> int | Literal["auto"]:
        """Shards that a reader asks by default, where the strategy leaves a choice."""
        sharding = self.sharding
        return sharding.num_probes if isinstance(sharding, ClusterSharding | LshSharding) else "auto"

    @property
    def routing_columns(self) -> dict[str, str]:
        """Source column of each value that decides a row's shard, by the name that the strategy knows it by."""
        return self.sharding.columns(self.id_col, keyed=self.key_value is not None)

    @property
    def row_columns(self) -> tuple[str, ...]:
        """Source columns that are read, without repeats."""
        names = (
            self.id_col,
            *self.vector_spec.source_columns,
            *self.payload_cols,
            *self.filter_cols,
            *(self.key_value.columns if self.key_value else ()),
            *self.routing_columns.values(),
        )
        return tuple(dict.fromkeys(names))

    @property
    def bytes_columns(self) -> frozenset[str]:
        """Source columns in which 16 bytes are bytes: anywhere else they are a UUID, and so text."""
        keyed, sharding = self.key_value, self.sharding
        named = set() if keyed is None else {keyed.key_col} | ({keyed.value_col} if keyed.value_col else set())
        if isinstance(sharding, CelSharding):
            named |= {self.routing_columns[name] for name, kind in sharding.cel_columns.items() if kind == "bytes"}
        return frozenset(named)

    @property
    def optional_columns(self) -> frozenset[str]:
        """Those source columns that a file may lack: what decides a row's id, vector and shard must be there."""
        keyed = self.key_value
        needed = {self.id_col, *self.vector_spec.source_columns, *self.routing_columns.values()}
        needed |= {keyed.value_col} if keyed is not None and keyed.value_col is not None else set()
        return frozenset(self.row_columns) - needed

    def build_fields(self) -> dict[str, Any]:
        """The fields that change a shard's bytes: not where it is published, not the gate, not the credentials."""
        spec = self.vector_spec.model_dump(mode="json")
        spec["sharding"].pop("num_probes", None)
        return {
            "build_version": BUILD_VERSION,
            "num_dbs": "auto" if self._auto else self.num_dbs,
            "id_col": self.id_col,
            "payload_cols": self.payload_cols,
            "filter_cols": self.filter_cols,
            "key_value": None if self.key_value is None else self.key_value.model_dump(mode="json"),
            "vector_spec": spec,
            "query_rows": self.recall_gate.query_rows,
            "k": self.recall_gate.k,
            "retrain": self.retrain,
        }

    def gate_key(self) -> str:
        """Digest of what decides ``num_probes`` and the verdicts on one and the same set of shards."""
        gate: dict[str, Any] = {
            "gate": self.recall_gate.model_dump(mode="json"),
            "num_probes": self.num_probes,
            "max_shard_skew": self.max_shard_skew,
        }
        if self.drift is not None and self.drift.blocking:
            gate["drift"] = self.drift.model_dump(mode="json")
        return digest_json(gate)


def _repeated(names: tuple[str, ...]) -> str:
    return ", ".join(sorted({name for name in names if names.count(name) > 1}))
