"""The command line as a user meets it: real processes, exit codes, what stands on the screen."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from sf_pipelines.cli import app
from sf_pipelines_tests.tables import clustered, vector_table, write_source

RUNNER = CliRunner()


def run(*arguments: str, stdin: str | None = None) -> tuple[int, str]:
    """Exit code and everything printed."""
    result = RUNNER.invoke(app, list(arguments), input=stdin, env={"COLUMNS": "160"})
    return result.exit_code, result.output


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SF_PIPELINES_CACHE", str(tmp_path / "cache"))
    write_source(tmp_path / "source.parquet")
    fields = {
        "name": "small",
        "source": str(tmp_path / "source.parquet"),
        "store": str(tmp_path / "store"),
        "num_dbs": 3,
        "payload_cols": ["title"],
        "vector_spec": {"dim": 16},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_build_search_info_history_verify(config: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    code, text = run("build", str(config))
    assert code == 0, text
    assert "Published" in text
    assert "600 in 3 shards, 0 rejected" in text
    assert "recall@10" in text
    assert "Nothing is new" in run("build", str(config))[1]
    assert "seq 2" in run("build", str(config), "--force")[1]

    vector = json.dumps(pq.read_table(tmp_path / "source.parquet")["vector"][5].as_py())
    code, text = run("search", store, vector, "-k", "2", "--json")
    assert code == 0
    assert json.loads(text)[0] == {"id": 5, "score": 0.0, "payload": {"title": "row 5"}}
    assert "row 5" in run("search", store, "-", "-k", "1", stdin=vector)[1]
    (tmp_path / "query.json").write_text(vector)
    assert "row 5" in run("search", store, f"@{tmp_path}/query.json", "--num-probes", "3")[1]

    code, text = run("info", store, "--json")
    assert (code, json.loads(text)["total_vectors"]) == (0, "600")
    assert "cluster" in run("info", store)[1]
    entries = json.loads(run("history", store, "--json")[1])
    assert [entry["current"] for entry in entries] == [True, False]
    code, text = run("verify", store)
    assert code == 0
    assert "all is well" in text
    assert run("verify", store, "--manifest", entries[1]["manifest"])[0] == 0


def test_verify_exits_with_1_and_names_the_object(config: Path, tmp_path: Path) -> None:
    run("build", str(config))
    victim = next((tmp_path / "store" / "shards").rglob("data/*.lance"))
    victim.write_bytes(victim.read_bytes()[:-1])
    code, text = run("verify", str(tmp_path / "store"))
    assert code == 1
    assert victim.name in text
    assert "1 faults" in text


def test_a_gate_that_cannot_be_met_exits_with_1_on_one_line(config: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((600, 16)).astype(np.float32)
    pq.write_table(vector_table(noise, title=["x"] * 600), tmp_path / "source.parquet")
    fields = yaml.safe_load(config.read_text())
    fields["vector_spec"]["sharding"] = {"num_probes": 1}
    config.write_text(yaml.safe_dump(fields))
    done = subprocess.run(
        [sys.executable, "-m", "sf_pipelines.cli", "build", str(config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.startswith("error [gate.failed]: run ")
    assert "is below min_recall 0.95" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store" / "_CURRENT").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "nowhere.yaml"], "error [config]: nowhere.yaml cannot be read"),
        (["search", "{tmp}", "[1, 2]"], "nothing has been published under"),
        (["info", "{tmp}/nowhere"], "nothing has been published under"),
        (["search", "{tmp}", "what"], "the query is no JSON list of numbers"),
        (["search", "{tmp}", "@{tmp}/nowhere"], "cannot be read"),
        (["verify", "s3:///x"], "has no bucket"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, text = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert code == 1
    assert message in " ".join(text.split())
    assert "Traceback" not in text


def test_wrong_fields_are_named(config: Path) -> None:
    config.write_text(config.read_text().replace("num_dbs: 3", "num_dbs: 0\ncolour: red"))
    code, text = run("build", str(config))
    assert code == 1
    flat = " ".join(text.split())
    assert "WriteConfig.num_dbs: should be greater than 0 (got 0)" in flat
    assert "WriteConfig.colour: unknown field (got 'red')" in flat


def test_what_is_stored_is_shown_as_it_is(config: Path, tmp_path: Path) -> None:
    rows = vector_table(clustered(60, 16), title=["see [red]this[/red] [/b] [x"] * 60)
    pq.write_table(rows, tmp_path / "source.parquet")
    assert run("build", str(config))[0] == 0
    vector = json.dumps(rows["vector"][0].as_py())
    code, text = run("search", str(tmp_path / "store"), vector)
    assert code == 0
    assert "see [red]this[/red] [/b] [x" in text


def test_help_names_every_command() -> None:
    code, text = run("--help")
    assert code == 0
    for command in ("build", "search", "info", "history", "verify"):
        assert command in text
        assert run(command, "--help")[0] == 0
