"""The gate: checks on a staged manifest, the recall they measure, and their verdicts."""
