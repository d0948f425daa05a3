"""Build of 20,000 x 96, 8 shards: what it costs as a whole process on the command line, and in Dagster.

Every case has its own store and its own Dagster instance; imports of the definitions, and the process itself, count.
"""

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sf_pipelines_tests.benchmarks import child

ROWS, DIM, SHARDS = 20_000, 96, 8
CONFIG = """\
name: bench
source: {source}
store: {store}
num_dbs: {shards}
payload_cols: [title]
vector_spec: {{dim: {dim}}}
recall_gate: {{min_recall: 0.9}}
"""
DEFINITIONS = """\
from pathlib import Path

import yaml

from sf_pipelines import WriteConfig
from sf_pipelines.orchestration import build_snapshot_defs

fields = yaml.safe_load(Path(__file__).with_name("build.yaml").read_text())
defs = build_snapshot_defs(WriteConfig(**fields), executor="{executor}")
"""


@dataclass(frozen=True)
class Case:
    """A way to build.

    Attributes:
        title: in the table.
        job: None is the command line.
        executor: of the job's steps.
    """

    title: str
    job: str | None = None
    executor: str = "in_process"


CASES = [
    Case("command line"),
    Case("build_now_<name>", "build_now_bench"),
    Case("build_<name>, in process", "build_bench"),
    Case("build_<name>, multiprocess", "build_bench", "multiprocess"),
]


def main() -> None:
    """Prints the figures."""
    out = Console(width=130)
    load = os.getloadavg()[0]
    with child.folder() as folder:
        source = folder / "source.parquet"
        child.run("sf_pipelines_tests.benchmarks.data", path=str(source), rows=ROWS, dim=DIM)
        # The first process of all reads the libraries from disk.
        _launch(folder / "first", source, CASES[0])
        table = Table("", "build, s", "CPU s", "over", "unchanged source, s", "CPU s", "over")
        base: list[float] = []
        for number, case in enumerate(CASES):
            figures = [_launch(folder / str(number), source, case) for _ in ("build", "unchanged")]
            base = base or [seconds for seconds, _ in figures]
            cells = [
                [f"{seconds:.1f}", f"{busy:.1f}" if case.executor == "in_process" else "?", f"{seconds - plain:+.1f}"]
                for (seconds, busy), plain in zip(figures, base, strict=True)
            ]
            table.add_row(case.title, *cells[0], *cells[1])
    out.rule(f"dagster: {ROWS:,} x {DIM}, cosine, CLUSTER, {SHARDS} shards, local disk, whole processes")
    out.print(table)
    out.print(
        "over: seconds more than the command line. CPU seconds of steps that a fork server has started are not known.\n"
        f"Load of the machine before the first: {load:.1f}."
    )


def _launch(folder: Path, source: Path, case: Case) -> tuple[float, float]:
    """Seconds of a process, and CPU seconds of it and of the children that it waits for."""
    folder.mkdir(exist_ok=True)
    config, definitions = folder / "build.yaml", folder / "definitions.py"
    config.write_text(CONFIG.format(source=source, store=folder / "store", shards=SHARDS, dim=DIM))
    definitions.write_text(DEFINITIONS.format(executor=case.executor))
    # So that runs lie beside the store, and not in the instance of whoever measures.
    (folder / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    command = ["sf_pipelines.cli", "build", str(config)]
    if case.job is not None:
        command = ["dagster", "job", "execute", "-f", str(definitions), "-j", case.job]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"DAGSTER_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{case.title}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
