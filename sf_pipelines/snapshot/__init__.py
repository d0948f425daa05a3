"""The core: how a snapshot is built, published and read. Knows nothing of Dagster or of the engines."""
