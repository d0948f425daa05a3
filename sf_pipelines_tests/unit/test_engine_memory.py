"""What a worker says of its memory is its own."""

import subprocess
import sys

import numpy as np

from sf_pipelines.snapshot.run.tasks import peak_bytes

_LARGE = 700_000_000


def test_a_worker_is_not_as_large_as_the_process_that_started_it() -> None:
    held = np.ones(_LARGE, dtype=np.uint8)
    assert peak_bytes() > held.nbytes
    code = "from sf_pipelines.snapshot.run.tasks import peak_bytes; print(peak_bytes())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 10_000_000 < int(told) < _LARGE
