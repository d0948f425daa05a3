"""Snapshots as Dagster assets, checks and jobs: names, metadata and events; the work itself is in ``snapshot``."""

from sf_pipelines.orchestration.builder import build_snapshot_defs
from sf_pipelines.orchestration.options import SnapshotOptions

__all__ = ["SnapshotOptions", "build_snapshot_defs"]
