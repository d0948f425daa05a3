"""Prints figures: ``python -m sf_pipelines_tests.benchmarks`` with some of the names of ``RUNS``, or all."""

import sys

from sf_pipelines_tests.benchmarks import (
    build,
    engines,
    incremental,
    launches,
    memory,
    quantization,
    readers,
    routing,
    sqlite_vec,
)

RUNS = {
    "build": build.main,
    "dagster": launches.main,
    "engines": engines.main,
    "incremental": incremental.main,
    "memory": memory.main,
    "quantization": quantization.main,
    "readers": readers.main,
    "routing": routing.main,
    "sqlite-vec": sqlite_vec.main,
}

for name in sys.argv[1:] or list(RUNS):
    RUNS[name]()
