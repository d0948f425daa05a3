"""Tests for other people's parts, and for what this package publishes.

``check_format`` says whether a stock reader can read a snapshot. The conformance classes are inherited by the tests of
a new store, index, routing or engine. Everything is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sf_pipelines.snapshot.testing.engine import EngineConformance
    from sf_pipelines.snapshot.testing.format_checker import assert_format, check_format
    from sf_pipelines.snapshot.testing.format_report import FormatReport
    from sf_pipelines.snapshot.testing.index import IndexConformance
    from sf_pipelines.snapshot.testing.routing import RowRoutingConformance, VectorRoutingConformance
    from sf_pipelines.snapshot.testing.store import StoreConformance

_HOMES = {
    "EngineConformance": "engine",
    "FormatReport": "format_report",
    "IndexConformance": "index",
    "RowRoutingConformance": "routing",
    "StoreConformance": "store",
    "VectorRoutingConformance": "routing",
    "assert_format": "format_checker",
    "check_format": "format_checker",
}

__all__ = [
    "EngineConformance",
    "FormatReport",
    "IndexConformance",
    "RowRoutingConformance",
    "StoreConformance",
    "VectorRoutingConformance",
    "assert_format",
    "check_format",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
