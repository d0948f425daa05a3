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

# Module: the names that are loaded from it on first use.
_EXPORTS = {
    "sf_pipelines.api": ("build_snapshot",),
    "sf_pipelines.snapshot.config": (
        "IndexParams",
        "KeyValueSpec",
        "RecallGate",
        "S3Options",
        "VectorSpec",
        "WriteConfig",
    ),
    "sf_pipelines.snapshot.metric": ("DistanceMetric",),
    "sf_pipelines.snapshot.reader.async_reader": (
        "AsyncShardedVectorReader",
        "AsyncUnifiedShardedReader",
    ),
    "sf_pipelines.snapshot.reader.rate_limit": ("RateLimiter",),
    "sf_pipelines.snapshot.reader.reader": (
        "ShardedVectorReader",
        "UnifiedShardedReader",
        "open_reader",
    ),
    "sf_pipelines.snapshot.reader.types": (
        "Explanation",
        "Health",
        "RefreshOutcome",
        "SearchResult",
        "VectorSearchResponse",
    ),
    "sf_pipelines.snapshot.sharding": (
        "CelSharding",
        "ClusterSharding",
        "ExplicitSharding",
        "HashSharding",
        "LshSharding",
    ),
    "sf_pipelines.snapshot.stages.pipeline": ("BuildResult",),
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
    for module, names in _EXPORTS.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
