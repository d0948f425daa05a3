"""Tests for other people's parts: the tests of a new store, index, routing or engine inherit one of these classes."""

from sf_pipelines.snapshot.testing.engine import EngineConformance
from sf_pipelines.snapshot.testing.index import IndexConformance
from sf_pipelines.snapshot.testing.routing import RowRoutingConformance, VectorRoutingConformance
from sf_pipelines.snapshot.testing.store import StoreConformance

__all__ = [
    "EngineConformance",
    "IndexConformance",
    "RowRoutingConformance",
    "StoreConformance",
    "VectorRoutingConformance",
]
