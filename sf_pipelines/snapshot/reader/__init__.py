"""Reading published snapshots."""
