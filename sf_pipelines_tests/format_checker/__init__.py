"""The checker of the stock format: says whether a stock reader can read a snapshot, with none of the package's code."""
