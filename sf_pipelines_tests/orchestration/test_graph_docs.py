"""docs/graph.md: its picture is the graph that is loaded, its tables name what there is, its Python runs."""

import re
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest

from sf_pipelines.definitions import defs
from sf_pipelines.snapshot.gate.verdicts import CHECKS
from sf_pipelines_tests.orchestration.test_component import ROOT
from sf_pipelines_tests.tables import clustered, vector_table

TEXT = (ROOT / "docs/graph.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_no_block_is_left_out() -> None:
    assert [kind for kind, _ in BLOCKS] == ["mermaid", "python"]
    assert "```" not in (ROOT / "docs/decisions.md").read_text(encoding="utf-8")


def test_the_picture_is_the_graph() -> None:
    drawn = set(re.findall(r"^    (\S+) --> (\S+)$", BLOCKS[0][1], re.MULTILINE))
    graph = defs().resolve_asset_graph()
    own = [key for key in graph.get_all_asset_keys() if key.path[0] == "digits"]
    edges = {
        (parent.to_user_string(), key.to_user_string()) for key in own for parent in sorted(graph.get(key).parent_keys)
    }
    assert drawn == edges
    assert {name for edge in drawn for name in edge} == {key.to_user_string() for key in own}
    assert len(BLOCKS[0][1].splitlines()) == len(edges) + 1


def test_every_asset_and_every_check_is_told() -> None:
    graph = defs().resolve_asset_graph()
    table = TEXT.split("## What each asset does", 1)[1].split("\n\n", 2)[1]
    told = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines()[2:])))
    assets = {key.path[-1] for key in graph.get_all_asset_keys()} - {"table"} | {"hyperplanes"}
    assert told == assets
    assert all(f"`{name}`" in TEXT for name in CHECKS)


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SF_PIPELINES_CACHE", str(tmp_path / "cache"))
    pq.write_table(vector_table(clustered(400, 384)), tmp_path / "source.parquet")
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[1][1], "docs/graph.md", "exec"), names)  # noqa: S102 - our own documentation
    assert isinstance(names["result"], dg.ExecuteInProcessResult)
    assert names["result"].success
