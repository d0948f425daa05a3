"""The snapshots that this deployment builds, one folder each."""
