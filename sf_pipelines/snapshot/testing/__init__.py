"""Tests for other people's parts: the tests of a new store, index, routing or engine inherit one of these classes.

Everything is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sf_pipelines.snapshot.testing.engine import EngineConformance
    from sf_pipelines.snapshot.testing.index import IndexConformance
    from sf_pipelines.snapshot.testing.routing import RowRoutingConformance, VectorRoutingConformance
    from sf_pipelines.snapshot.testing.store import StoreConformance

_HOMES = {
    "EngineConformance": "engine",
    "IndexConformance": "index",
    "RowRoutingConformance": "routing",
    "StoreConformance": "store",
    "VectorRoutingConformance": "routing",
}

__all__ = [
    "EngineConformance",
    "IndexConformance",
    "RowRoutingConformance",
    "StoreConformance",
    "VectorRoutingConformance",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
