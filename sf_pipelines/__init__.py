"""Recall-gated, sharded vector-search snapshots: build them, publish them, search them.

Everything is loaded on first use, so importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sf_pipelines.snapshot import errors
    from sf_pipelines.snapshot.config import (
        ClusterSharding,
        IndexParams,
        RecallGate,
        S3Options,
        VectorSpec,
        WriteConfig,
    )
    from sf_pipelines.snapshot.metric import DistanceMetric
    from sf_pipelines.snapshot.pipeline import BuildResult, build_snapshot
    from sf_pipelines.snapshot.reader.sync import ShardedVectorReader
    from sf_pipelines.snapshot.reader.types import SearchResult, VectorSearchResponse

_HOMES = {
    "BuildResult": "sf_pipelines.snapshot.pipeline",
    "ClusterSharding": "sf_pipelines.snapshot.config",
    "DistanceMetric": "sf_pipelines.snapshot.metric",
    "IndexParams": "sf_pipelines.snapshot.config",
    "RecallGate": "sf_pipelines.snapshot.config",
    "S3Options": "sf_pipelines.snapshot.config",
    "SearchResult": "sf_pipelines.snapshot.reader.types",
    "ShardedVectorReader": "sf_pipelines.snapshot.reader.sync",
    "VectorSearchResponse": "sf_pipelines.snapshot.reader.types",
    "VectorSpec": "sf_pipelines.snapshot.config",
    "WriteConfig": "sf_pipelines.snapshot.config",
    "build_snapshot": "sf_pipelines.snapshot.pipeline",
}

__all__ = [
    "BuildResult",
    "ClusterSharding",
    "DistanceMetric",
    "IndexParams",
    "RecallGate",
    "S3Options",
    "SearchResult",
    "ShardedVectorReader",
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
