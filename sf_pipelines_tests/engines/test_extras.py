"""Without an engine's library the package works, and says which extra is missing."""

import subprocess
import sys

import pytest

# A process in which the libraries are not installed, as far as imports can tell.
_WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"dask", "distributed", "ray", "pyspark"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())

import sf_pipelines
from sf_pipelines import build_snapshot, WriteConfig
from sf_pipelines.engines import open_engine
from sf_pipelines.snapshot.errors import MissingExtraError

open_engine({"type": "local", "workers": 1}).close()
for kind in ("dask", "ray", "spark"):
    try:
        open_engine({"type": kind})
    except MissingExtraError as error:
        assert f"pip install 'sf-pipelines[{kind}]'" in str(error), error
    else:
        raise AssertionError(f"{kind} opens without its library")
"""
_LOADED = """
import sys
import sf_pipelines, sf_pipelines.engines, sf_pipelines.api
found = {"dask", "distributed", "ray", "pyspark"} & set(sys.modules)
assert not found, found
"""


@pytest.mark.parametrize("script", [_WITHOUT, _LOADED], ids=["not installed", "not loaded"])
def test_engines_are_optional(script: str) -> None:
    """Their libraries are looked for when they are asked for."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
