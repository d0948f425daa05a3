"""Snapshots as Dagster assets, checks and jobs: names, metadata and events; the work itself is in ``snapshot``."""

import warnings

import dagster as dg

from sf_pipelines.orchestration.builder import build_snapshot_defs
from sf_pipelines.orchestration.options import SnapshotOptions

# Dagster itself uses this in beta, for the checks of any component, and would warn its users of it at each load.
warnings.filterwarnings(
    "ignore", "Parameter `execution_type` of function `AssetsDefinition.__init__`", category=dg.BetaWarning
)

__all__ = ["SnapshotOptions", "build_snapshot_defs"]
