"""Ways to shard vectors."""
