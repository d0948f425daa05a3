"""docs/tutorial.md: its blocks run one after the other, in an environment that they make themselves."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from sf_pipelines_tests.conftest import free_port

_ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(
    r"^```(?P<language>\w+)(?: (?P<name>file|background)=(?P<value>\S+))?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_CLONE = "export SF=~/sf_pipelines\n"
_PATIENCE = 1200
_START = """\
set -euo pipefail
wait_for() { for _ in $(seq 240); do curl --silent --fail --output /dev/null "$1" && return; sleep 0.5; done
  echo "no answer from $1"; return 1; }
"""


def script_of(page: str) -> str:
    """The page's blocks as one bash script; a line ``### N`` before the output of the block at line N."""
    parts = [_START]
    for block in _BLOCK.finditer(page):
        text, value = block["text"], block["value"]
        parts.append(f"echo '### {page.count(chr(10), 0, block.start()) + 1}'\n")
        if block["name"] == "file":
            parts.append(f"mkdir -p {shlex.quote(str(Path(value).parent))}\nprintf %s {shlex.quote(text)} > {value}\n")
        elif block["name"] == "background":
            parts.append(f"{text.rstrip()} &\nwait_for {value}\n")
        else:
            assert block["language"] == "bash", f"nothing runs this block: {block[0]}"
            parts.append(text)
    return "".join(parts)


@pytest.mark.slow
@pytest.mark.timeout(_PATIENCE + 60)
def test_every_block_of_the_tutorial_runs(tmp_path: Path) -> None:
    page = (_ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    assert page.count("```") == 2 * len(_BLOCK.findall(page)), "a block is not closed, or indented"
    assert _CLONE in page
    for shown in ("3000", "8000"):
        free = free_port()
        page = page.replace(f"127.0.0.1:{shown}", f"127.0.0.1:{free}").replace(f"--port {shown}", f"--port {free}")
    script = script_of(page.replace(_CLONE, f"export SF={shlex.quote(str(_ROOT))}\n"))

    # What a person's shell has not: the environment of this test run.
    own = {"DAGSTER_HOME", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"}
    environment = {key: value for key, value in os.environ.items() if key not in own and not key.startswith("COV_")}
    environment["SF_PIPELINES_CACHE"] = str(tmp_path / "cache")
    output = tmp_path / "output.txt"
    with output.open("w") as sink:
        shell = subprocess.Popen(
            ["bash", "-c", script], cwd=tmp_path, env=environment, stdout=sink, stderr=sink, start_new_session=True
        )
        try:
            status = shell.wait(_PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):  # it had not come to its servers
                os.killpg(shell.pid, signal.SIGKILL)  # Dagster outlives a SIGTERM
    said = output.read_text()
    assert status == 0, (
        f"the block at line {re.findall('^### ([0-9]+)', said, re.MULTILINE)[-1]} failed:\n{said[-5000:]}"
    )

    assert "Product" in said  # a search has shown payloads
    project = tmp_path / "first-steps/shop"
    assert (project / "data/related/related.parquet").is_file()
    assert (project / "data/snapshots/products/_CURRENT").is_file()
