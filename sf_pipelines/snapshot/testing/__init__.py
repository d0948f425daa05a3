"""Tools for those who test against snapshots."""
