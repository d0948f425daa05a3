"""Whether a stock reader can read a snapshot, told without the package's manifest, routing or index code."""
