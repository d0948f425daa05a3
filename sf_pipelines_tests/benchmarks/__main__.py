"""Runs the benchmarks: ``python -m sf_pipelines_tests.benchmarks [build] [memory]``. Prints figures."""

import sys

from sf_pipelines_tests.benchmarks import build, memory

RUNS = {"build": build.main, "memory": memory.main}

for name in sys.argv[1:] or list(RUNS):
    RUNS[name]()
