"""What is done to published snapshots: roll back, release, pin, clean up, compare."""
