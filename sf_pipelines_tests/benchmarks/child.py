"""Work in a process of its own, so that its peak memory is its own and the data's maker does not count."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def peak_megabytes() -> float:
    """Highest resident size of this process so far (not inherited over exec, as ru_maxrss is)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run(module: str, **arguments: Any) -> dict[str, Any]:
    """Calls ``module.work(**arguments)`` in a fresh Python; its result, which must be JSON."""
    code = (
        "import importlib, json, sys; "
        f"work = importlib.import_module({module!r}).work; "
        "print('RESULT' + json.dumps(work(**json.loads(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.rsplit("RESULT", 1)[1])


@contextmanager
def folder() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="sf_pipelines-bench-") as name:
        yield Path(name)
