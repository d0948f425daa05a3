"""Prints figures: ``python -m sf_pipelines_tests.benchmarks [build] [memory] [routing] [sqlite-vec]``."""

import sys

from sf_pipelines_tests.benchmarks import build, memory, routing, sqlite_vec

RUNS = {"build": build.main, "memory": memory.main, "routing": routing.main, "sqlite-vec": sqlite_vec.main}

for name in sys.argv[1:] or list(RUNS):
    RUNS[name]()
