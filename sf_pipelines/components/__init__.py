"""Dagster components of this package; ``dg`` finds them here."""

from sf_pipelines.components.vector_snapshot import VectorSnapshotComponent

__all__ = ["VectorSnapshotComponent"]
