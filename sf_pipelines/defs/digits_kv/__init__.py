"""The second demo: keys, values and vectors."""
