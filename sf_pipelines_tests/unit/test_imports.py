"""What an import loads: libraries that are only needed later must not be paid for at the start."""

import json
import subprocess
import sys

import pytest

# What each of these may not load, and why it is often loaded by mistake.
BUILDS = {"lancedb", "sklearn", "scipy", "polars", "pandera", "pandas", "matplotlib", "apsw", "cel_expr_python"}
ENGINES = {"dask", "distributed", "ray", "pyspark"}
# dagster_aws imports Dagster's database and boto3, whatever is asked of it.
DATABASE = {"dagster_aws", "boto3", "botocore", "sqlalchemy", "alembic", "requests"}

# Dagster imports every library of components that is installed; dagster_aws is an extra of ours.
DEFINITIONS = """
from dagster.components.core import package_entry
found = package_entry.get_plugin_entry_points
package_entry.get_plugin_entry_points = lambda: [e for e in found() if not e.value.startswith("dagster_")]
from sf_pipelines.definitions import defs
defs()
"""


def loaded(code: str) -> set[str]:
    """Modules that are there after a piece of code, in a Python of its own."""
    program = f"import json, sys\n{code}\nprint('LOADED' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rsplit("LOADED", 1)[1]))


READERS = "from sf_pipelines import AsyncUnifiedShardedReader, UnifiedShardedReader, open_reader"
HELP = """
from typer.testing import CliRunner
from sf_pipelines.cli import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
"""


@pytest.mark.parametrize(
    ("code", "banned", "most"),
    [
        # As many modules as are needed now (1,200, 496 and 642), and a few for newer versions of the libraries.
        pytest.param(DEFINITIONS, BUILDS | ENGINES | DATABASE, 1300, id="definitions"),
        pytest.param(READERS, BUILDS | ENGINES | DATABASE | {"dagster"}, 540, id="readers"),
        pytest.param(HELP, BUILDS | ENGINES | DATABASE | {"dagster", "pyarrow"}, 700, id="help"),
    ],
)
def test_an_import_loads_nothing_that_is_needed_later(code: str, banned: set[str], most: int) -> None:
    found = loaded(code)
    assert found & banned == set()
    assert len(found) <= most


def test_every_module_imports_alone() -> None:
    """In whatever order: none of them waits for another one to have been imported before."""
    code = """
import importlib, pkgutil, sys
import sf_pipelines.snapshot as core
names = [module.name for module in pkgutil.walk_packages(core.__path__, "sf_pipelines.snapshot.")]
names = [name for name in names if not name.startswith("sf_pipelines.snapshot.testing")]
assert len(names) > 50
for name in names:
    for known in [module for module in sys.modules if module.startswith("sf_pipelines")]:
        del sys.modules[known]
    importlib.import_module(name)
"""
    loaded(code)
