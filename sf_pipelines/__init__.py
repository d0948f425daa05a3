"""Recall-gated, sharded vector-search snapshots: build them, publish them, search them.

Everything is loaded on first use, so importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sf_pipelines import errors
    from sf_pipelines.api import build_snapshot
    from sf_pipelines.snapshot.config import IndexParams, KeyValueSpec, RecallGate, S3Options, VectorSpec, WriteConfig
    from sf_pipelines.snapshot.metric import DistanceMetric
    from sf_pipelines.snapshot.reader.async_reader import AsyncShardedVectorReader, AsyncUnifiedShardedReader
    from sf_pipelines.snapshot.reader.rate_limit import RateLimiter
    from sf_pipelines.snapshot.reader.reader import ShardedVectorReader, UnifiedShardedReader, open_reader
    from sf_pipelines.snapshot.reader.types import (
        Explanation,
        Health,
        RefreshOutcome,
        SearchResult,
        VectorSearchResponse,
    )
    from sf_pipelines.snapshot.sharding import (
        CelSharding,
        ClusterSharding,
        ExplicitSharding,
        HashSharding,
        LshSharding,
    )
    from sf_pipelines.snapshot.stages.pipeline import BuildResult

__version__ = "0.1.0"

_HOMES = {
    "AsyncShardedVectorReader": "sf_pipelines.snapshot.reader.async_reader",
    "AsyncUnifiedShardedReader": "sf_pipelines.snapshot.reader.async_reader",
    "BuildResult": "sf_pipelines.snapshot.stages.pipeline",
    "CelSharding": "sf_pipelines.snapshot.sharding",
    "ClusterSharding": "sf_pipelines.snapshot.sharding",
    "DistanceMetric": "sf_pipelines.snapshot.metric",
    "Explanation": "sf_pipelines.snapshot.reader.types",
    "ExplicitSharding": "sf_pipelines.snapshot.sharding",
    "HashSharding": "sf_pipelines.snapshot.sharding",
    "Health": "sf_pipelines.snapshot.reader.types",
    "IndexParams": "sf_pipelines.snapshot.config",
    "KeyValueSpec": "sf_pipelines.snapshot.config",
    "LshSharding": "sf_pipelines.snapshot.sharding",
    "RateLimiter": "sf_pipelines.snapshot.reader.rate_limit",
    "RecallGate": "sf_pipelines.snapshot.config",
    "RefreshOutcome": "sf_pipelines.snapshot.reader.types",
    "S3Options": "sf_pipelines.snapshot.config",
    "SearchResult": "sf_pipelines.snapshot.reader.types",
    "ShardedVectorReader": "sf_pipelines.snapshot.reader.reader",
    "UnifiedShardedReader": "sf_pipelines.snapshot.reader.reader",
    "VectorSearchResponse": "sf_pipelines.snapshot.reader.types",
    "VectorSpec": "sf_pipelines.snapshot.config",
    "WriteConfig": "sf_pipelines.snapshot.config",
    "build_snapshot": "sf_pipelines.api",
    "open_reader": "sf_pipelines.snapshot.reader.reader",
}

__all__ = [
    "AsyncShardedVectorReader",
    "AsyncUnifiedShardedReader",
    "BuildResult",
    "CelSharding",
    "ClusterSharding",
    "DistanceMetric",
    "Explanation",
    "ExplicitSharding",
    "HashSharding",
    "Health",
    "IndexParams",
    "KeyValueSpec",
    "LshSharding",
    "RateLimiter",
    "RecallGate",
    "RefreshOutcome",
    "S3Options",
    "SearchResult",
    "ShardedVectorReader",
    "UnifiedShardedReader",
    "VectorSearchResponse",
    "VectorSpec",
    "WriteConfig",
    "__version__",
    "build_snapshot",
    "errors",
    "open_reader",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("sf_pipelines.errors")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
