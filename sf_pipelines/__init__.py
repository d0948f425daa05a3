"""Recall-gated, sharded vector-search snapshots: build them, publish them, search them.

Everything is loaded on first use, so importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sf_pipelines.snapshot import errors
    from sf_pipelines.snapshot.config import IndexParams, KeyValueSpec, RecallGate, S3Options, VectorSpec, WriteConfig
    from sf_pipelines.snapshot.metric import DistanceMetric
    from sf_pipelines.snapshot.pipeline import BuildResult, build_snapshot
    from sf_pipelines.snapshot.reader.asynchronous import AsyncShardedVectorReader, AsyncUnifiedShardedReader
    from sf_pipelines.snapshot.reader.rate_limit import RateLimiter
    from sf_pipelines.snapshot.reader.sync import ShardedVectorReader, UnifiedShardedReader
    from sf_pipelines.snapshot.reader.types import SearchResult, VectorSearchResponse
    from sf_pipelines.snapshot.sharding import (
        CelSharding,
        ClusterSharding,
        ExplicitSharding,
        HashSharding,
        LshSharding,
    )

_HOMES = {
    "AsyncShardedVectorReader": "sf_pipelines.snapshot.reader.asynchronous",
    "AsyncUnifiedShardedReader": "sf_pipelines.snapshot.reader.asynchronous",
    "BuildResult": "sf_pipelines.snapshot.pipeline",
    "CelSharding": "sf_pipelines.snapshot.sharding",
    "ClusterSharding": "sf_pipelines.snapshot.sharding",
    "DistanceMetric": "sf_pipelines.snapshot.metric",
    "ExplicitSharding": "sf_pipelines.snapshot.sharding",
    "HashSharding": "sf_pipelines.snapshot.sharding",
    "IndexParams": "sf_pipelines.snapshot.config",
    "KeyValueSpec": "sf_pipelines.snapshot.config",
    "LshSharding": "sf_pipelines.snapshot.sharding",
    "RateLimiter": "sf_pipelines.snapshot.reader.rate_limit",
    "RecallGate": "sf_pipelines.snapshot.config",
    "S3Options": "sf_pipelines.snapshot.config",
    "SearchResult": "sf_pipelines.snapshot.reader.types",
    "ShardedVectorReader": "sf_pipelines.snapshot.reader.sync",
    "UnifiedShardedReader": "sf_pipelines.snapshot.reader.sync",
    "VectorSearchResponse": "sf_pipelines.snapshot.reader.types",
    "VectorSpec": "sf_pipelines.snapshot.config",
    "WriteConfig": "sf_pipelines.snapshot.config",
    "build_snapshot": "sf_pipelines.snapshot.pipeline",
}

__all__ = [
    "AsyncShardedVectorReader",
    "AsyncUnifiedShardedReader",
    "BuildResult",
    "CelSharding",
    "ClusterSharding",
    "DistanceMetric",
    "ExplicitSharding",
    "HashSharding",
    "IndexParams",
    "KeyValueSpec",
    "LshSharding",
    "RateLimiter",
    "RecallGate",
    "S3Options",
    "SearchResult",
    "ShardedVectorReader",
    "UnifiedShardedReader",
    "VectorSearchResponse",
    "VectorSpec",
    "WriteConfig",
    "build_snapshot",
    "errors",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("sf_pipelines.snapshot.errors")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
