"""What readers answer."""

import reprlib
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sf_pipelines.snapshot.errors import SfPipelinesError
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, Float64

# An answer is looked at in a notebook or a log: its first hits, and payloads cut off, say enough there.
_SHOWN_HITS = 3
_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxdict, _SHORT.maxother = 60, 6, 60


@dataclass(frozen=True, slots=True)
class SearchResult:
    """One neighbour.

    Attributes:
        id: with the type that it was written with.
        score: exact distance in the declared metric, lower is better.
        vector: as stored, float32, shape (dim,); None unless asked for.
        payload: as stored; None where there is none.
    """

    id: int | str
    score: float
    vector: Float32 | None
    payload: dict[str, Any] | None

    def __repr__(self) -> str:
        vector = "" if self.vector is None else f", vector=<{self.vector.dtype} of {len(self.vector)}>"
        payload = "" if self.payload is None else f", payload={_SHORT.repr(self.payload)}"
        return f"SearchResult(id={_SHORT.repr(self.id)}, score={self.score:.6g}{vector}{payload})"


@dataclass(frozen=True, slots=True)
class VectorSearchResponse:
    """Answer to one query.

    Attributes:
        results: nearest first, equal distances by id.
        num_shards_queried: number of ``shard_ids``.
        latency_ms: time from call to answer; of the whole batch in a batch.
        shard_ids: shards that were asked, in the order of the plan; empty shards count.
        missing_shards: those of them that failed or were late; never any unless ``partial`` was asked for.
        errors: why, by shard.
        shortfall: why there are fewer results than asked for; None where there are not.
    """

    results: list[SearchResult]
    num_shards_queried: int
    latency_ms: float
    shard_ids: list[int]
    missing_shards: list[int] = field(default_factory=list)
    errors: dict[int, SfPipelinesError] = field(default_factory=dict)
    shortfall: str | None = None

    def __repr__(self) -> str:
        shown = [f"{_SHORT.repr(hit.id)}: {hit.score:.6g}" for hit in self.results[:_SHOWN_HITS]]
        rest = [] if len(self.results) == len(shown) else [f"... {len(self.results) - len(shown)} more"]
        missing = f", missing_shards={_SHORT.repr(self.missing_shards)}" if self.missing_shards else ""
        shortfall = "" if self.shortfall is None else f", shortfall={_SHORT.repr(self.shortfall)}"
        return (
            f"VectorSearchResponse({{{', '.join(shown + rest)}}}, shard_ids={_SHORT.repr(self.shard_ids)}{missing}"
            f"{shortfall}, latency_ms={self.latency_ms:.1f})"
        )


@dataclass(frozen=True, slots=True)
class ExplainedShard:
    """A shard in the order in which a query asks them.

    Attributes:
        db_id: its number.
        distance: from the query to what stands for the shard: its centroid in the declared metric, or for hyperplanes
            how far the query would have to move; None where the vector does not decide.
        rows: its rows as the manifest counts them.
        asked: whether the query asks it.
        in_memory: whether it would be answered by a scan of vectors that are in memory now.
    """

    db_id: int
    distance: float | None
    rows: int
    asked: bool
    in_memory: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a search would do.

    Attributes:
        shards: those that may be asked, in the order of their turn; those that are come first.
        num_shards: how many are asked.
        rows: share of the snapshot's rows that lie in these shards, 0 to 1.
        recall: mean recall@``recall_k`` that was measured at so many shards before the snapshot was published: at the
            default number the recall that its gate judged it by, at others that of the queries that chose the default;
            None where nothing was measured for such a search.
        recall_lower: its lower confidence bound.
        recall_k: neighbours that it was measured for.
    """

    shards: list[ExplainedShard]
    num_shards: int
    rows: float
    recall: float | None
    recall_lower: float | None
    recall_k: int | None

    def __repr__(self) -> str:
        asked = [shard.db_id for shard in self.shards if shard.asked]
        recall = "" if self.recall is None else f", recall@{self.recall_k}={self.recall:.4f}"
        return f"Explanation(asks {_SHORT.repr(asked)}, {self.rows:.1%} of the rows{recall})"


@dataclass(frozen=True, slots=True)
class SearchArrays:
    """Answers to many queries, as arrays.

    Attributes:
        ids: shape (n, k): int64 or str objects (in snapshots of others maybe both); where a query has fewer than k
            hits, an object array with None.
        scores: float64, shape (n, k), NaN where there is no hit.
        counts: hits of each query, shape (n,).
        distances: what they are ranked by, of the shape of ``scores``: under dot_product ``-x·y``, of which the score
            rounds small differences away; else the scores.
    """

    ids: NDArray[Any]
    scores: Float64
    counts: NDArray[np.int64]
    distances: Float64

    def __repr__(self) -> str:
        return f"SearchArrays({self.ids.shape[0]} queries, up to {self.ids.shape[1]} hits each)"


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """The snapshot that a reader serves.

    Attributes:
        run_id: build that made it.
        num_dbs: number of shards, empty ones included.
        dim: numbers in a vector.
        metric: declared distance.
        sharding: strategy.
        kind: ``vector``, or ``unified`` with keys and values too.
        backend: index library of the shards; None where the manifest does not say.
        key_encoding: how keys are stored, in a unified snapshot.
        cel_columns: values that a ``routing_context`` gives, with their CEL types; empty for other strategies.
        num_probes: shards asked by default; of a unified snapshot all, without a ``routing_context``.
        recall: mean recall@``recall_k`` that its gate judged it by; None in snapshots of others, and in those published
            before manifests recorded it.
        recall_lower: its lower confidence bound.
        recall_k: neighbours that it was measured for.
        index_type: kind of index, as the writer called it.
        quantization: of the index, as the writer called it.
        id_type: ``int64`` or ``string``; None where the manifest does not say.
        payload_columns: what a hit's payload is made of; None where the manifest does not say.
        filter_columns: columns that are stored beside the vector, with their Arrow types.
        manifest_ref: address of its manifest under the reader's root.
        total_vectors: rows of all shards.
        total_bytes: size of all shards; None where the writer recorded none.
        created_at: when it was built.
        published_at: when the pointer was moved to it; None for a pinned manifest.
    """

    run_id: str
    num_dbs: int
    dim: int
    metric: DistanceMetric
    sharding: str
    kind: Literal["vector", "unified"]
    backend: str | None
    key_encoding: str | None
    cel_columns: dict[str, str]
    num_probes: int
    recall: float | None
    recall_lower: float | None
    recall_k: int | None
    index_type: str
    quantization: str | None
    id_type: str | None
    payload_columns: list[str] | None
    filter_columns: dict[str, str]
    manifest_ref: str
    total_vectors: int
    total_bytes: int | None
    created_at: datetime
    published_at: datetime | None


@dataclass(frozen=True, slots=True)
class UnifiedVectorMeta:
    """How the vectors of a unified snapshot are indexed.

    Attributes:
        dim: numbers in a vector.
        metric: declared distance.
        index_type: kind of index, as the writer called it.
        quantization: of the index, as the writer called it.
        index_params: knobs of the index.
        backend: index library.
        kv_backend: library of the keys and values.
    """

    dim: int
    metric: DistanceMetric
    index_type: str
    quantization: str | None
    index_params: dict[str, Any]
    backend: str | None
    kv_backend: str | None


@dataclass(frozen=True, slots=True)
class ShardDetail:
    """One shard.

    Attributes:
        db_id: its number.
        db_url: address of its directory under the reader's root; None for an empty shard.
        vector_count: its rows as the manifest counts them.
        bytes: its size; None where the writer recorded none.
        checkpoint_id: opaque id of its bytes.
    """

    db_id: int
    db_url: str | None
    vector_count: int
    bytes: int | None
    checkpoint_id: str | None


@dataclass(frozen=True, slots=True)
class Health:
    """State of a reader.

    Attributes:
        status: ``unhealthy`` when closed; ``degraded`` when the snapshot is older than the threshold, the last refresh
            failed, or an older snapshot is served than the pointer names; else ``healthy``.
        manifest_ref: address of the manifest that is served.
        manifest_age_seconds: since the pointer was moved to it; since it was built for a pinned one.
        num_shards: shards of the snapshot.
        is_closed: whether the reader was closed.
        last_error: why the last refresh failed; None after a good one.
        last_error_age_seconds: since then.
        fallback: what the pointer named when the reader was opened, and why that could not be served; None where it is.
        open_shards: numbers of the shards that are open.
        memory_bytes: about what they hold in memory.
    """

    status: Literal["healthy", "degraded", "unhealthy"]
    manifest_ref: str
    manifest_age_seconds: float
    num_shards: int
    is_closed: bool
    last_error: str | None
    last_error_age_seconds: float | None
    fallback: str | None
    open_shards: list[int] = field(repr=False)
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class RefreshOutcome:
    """What a refresh did. Truthy only when another snapshot is served now.

    Attributes:
        status: ``unchanged``, ``updated`` or ``failed``.
        run_id: build that is served now.
        error: why it failed; the old snapshot keeps serving.
    """

    status: Literal["unchanged", "updated", "failed"]
    run_id: str
    error: SfPipelinesError | None = None

    def __bool__(self) -> bool:
        return self.status == "updated"
