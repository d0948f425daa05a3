"""Where a build runs: processes of this machine, Dask, Ray or Spark. Their libraries are loaded when one is opened."""

from sf_pipelines.engines.config import (
    DaskEngineSpec,
    EngineSpec,
    LocalEngineSpec,
    RayEngineSpec,
    SparkEngineSpec,
    engine_spec,
    open_engine,
)

__all__ = [
    "DaskEngineSpec",
    "EngineSpec",
    "LocalEngineSpec",
    "RayEngineSpec",
    "SparkEngineSpec",
    "engine_spec",
    "open_engine",
]
