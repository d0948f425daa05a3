"""The commands on published snapshots, as a user meets them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from sf_pipelines.snapshot.operations import cleanup as cleanup_module
from sf_pipelines.snapshot.operations.cleanup import CleanupRules
from sf_pipelines.snapshot.operations.pins import pin
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.integration.test_cli import run
from sf_pipelines_tests.tables import write_source


def three(folder: Path) -> Path:
    """A configuration, and three snapshots of three sources."""
    fields = {
        "name": "small",
        "source": str(folder / "source.parquet"),
        "store": str(folder / "store"),
        "num_dbs": 3,
        "payload_cols": ["title"],
        "vector_spec": {"dim": 16},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(fields))
    for seed in range(3):
        write_source(folder / "source.parquet", seed=seed)
        code, text = run("build", str(path))
        assert code == 0, text
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    three(folder)
    return folder / "store"


@pytest.fixture
def store(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy for one test alone."""
    monkeypatch.setenv("SF_PIPELINES_CACHE", str(tmp_path / "cache"))
    shutil.copytree(built, tmp_path / "store")
    return str(tmp_path / "store")


def said(text: str) -> Any:
    """The JSON, below what is drawn of the progress."""
    return json.loads(text.splitlines()[-1])


def flat(text: str) -> str:
    return " ".join(text.split())


def test_rollback_hold_release_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_PIPELINES_CACHE", str(tmp_path / "cache"))
    config, store = three(tmp_path), str(tmp_path / "store")
    third, second, first = (entry["run_id"] for entry in said(run("history", store, "--json")[1]))
    code, text = run("rollback", store)
    assert code == 0, text
    assert f"{second} is current now (seq 4)" in flat(text)
    assert f"withdrawn {third}" in flat(text)
    entries = said(run("history", store, "--json")[1])
    flags = [(entry["run_id"], entry["current"], entry["withdrawn"], entry["held"]) for entry in entries]
    assert flags == [(third, False, True, True), (second, True, False, False), (first, False, False, False)]
    text = run("history", store)[1]
    assert "withdrawn, held" in text
    code, text = run("build", str(config))
    assert code == 0
    assert "Nothing is published: a rollback withdrew" in flat(text)
    assert f"sf-pipelines release {store}" in flat(text)
    code, text = run("release", store)
    assert code == 0
    assert "released build key" in text
    assert "nothing was held" in run("release", store)[1]
    assert said(run("release", store, "--json")[1])["released"] == []

    result = said(run("rollback", store, "--to", first, "--deep", "--json")[1])
    assert (result["run_id"], result["previous_run_id"]) == (first, second)
    assert result["checked"]["hashed"] == result["checked"]["objects"] > 0
    for arguments, message in (
        (["--to", "nobody"], "error [operation.no_run]: no snapshot of run 'nobody'"),
        (["--to", first], "error [operation]:"),
        ([], "error [operation.no_run]: "),
        (["--back", "0"], "--back"),
    ):
        code, text = run("rollback", store, *arguments)
        assert code != 0
        assert message in flat(text)


def test_a_damaged_target_exits_with_1_and_is_named(store: str, tmp_path: Path) -> None:
    entries = said(run("history", store, "--json")[1])
    victim = next((tmp_path / "store" / "shards" / f"run_id={entries[1]['run_id']}").rglob("data/*.lance"))
    victim.unlink()
    code, text = run("rollback", store)
    assert code == 1
    assert "error [integrity.snapshot]" in text
    assert victim.name in text
    assert said(run("history", store, "--json")[1]) == entries


def test_pins_and_cleanup(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    third, second, first = (entry["run_id"] for entry in said(run("history", store, "--json")[1]))
    assert "nothing is pinned" in run("pins", store)[1]
    code, text = run("pin", store, first, "--reason", "audit [red]2026[/red]")
    assert code == 0
    assert "audit [red]2026[/red]" in text
    assert said(run("pins", store, "--json")[1])[0]["run_id"] == first
    assert "audit" in run("pins", store)[1]
    assert said(run("history", store, "--json")[1])[2]["pinned"] == "audit [red]2026[/red]"
    assert run("pin", store, first)[0] == 2

    before = {path for path in (tmp_path / "store").rglob("*") if path.is_file()}
    code, text = run("cleanup", store, "--keep", "1", "--stale-after", "0s")
    assert code == 0, text
    assert "nothing was changed: --apply does it" in flat(text)
    assert f"keeps {first}: it is pinned" in flat(text)
    assert {path for path in (tmp_path / "store").rglob("*") if path.is_file()} == before
    plan = said(run("cleanup", store, "--keep", "1", "--json")[1])
    assert plan["applied"] is False
    assert [(group["rule"], group["run_id"]) for group in plan["groups"]] == [("snapshot", second)]
    assert plan["objects"] == sum(len(step) for step in plan["groups"][0]["steps"])
    assert "nothing to remove" in run("cleanup", store, "--keep", "1", "--older-than", "4w", "--apply")[1]

    # Pinned after the plan was made: it stays, and the exit code says so.
    plan_cleanup = cleanup_module.plan_cleanup

    def pinned_meanwhile(root: Store, rules: CleanupRules) -> object:
        plan = plan_cleanup(root, rules)
        pin(root, second, "in time")
        return plan

    with monkeypatch.context() as patch:
        patch.setattr(cleanup_module, "plan_cleanup", pinned_meanwhile)
        code, text = run("cleanup", store, "--keep", "1", "--apply")
    assert code == 1
    assert "stays since the plan was made: it is pinned" in flat(text)

    assert run("unpin", store, second)[0] == 0
    assert said(run("unpin", store, first, "--json")[1])["run_id"] == first
    assert run("unpin", store, first)[0] == 3
    code, text = run("cleanup", store, "--keep", "2", "--apply")
    assert code == 0
    assert "removed" in text
    assert {entry["run_id"] for entry in said(run("history", store, "--json")[1])} == {third, second}
    assert run("verify", store)[0] == 0
    for arguments, message in (
        (["--keep", "0"], "--keep"),
        (["--keep", "1", "--older-than", "yesterday"], "--older-than 'yesterday' is no duration"),
        ([], "--keep"),
    ):
        code, text = run("cleanup", store, *arguments)
        assert code != 0
        assert message in flat(text)


def test_diff(store: str) -> None:
    third, second, first = (entry["run_id"] for entry in said(run("history", store, "--json")[1]))
    found = said(run("diff", store, "--json")[1])
    assert (found["before"]["run_id"], found["after"]["run_id"]) == (second, third)
    assert found["ids"] == {"added": 0, "gone": 0, "kept": 600, "changed": 600, "as_text": False}
    assert 0 <= found["overlap"]["mean"] <= 1
    code, text = run("diff", store, "--before", first, "--after", second)
    assert code == 0, text
    for fact in (first, second, "rows by id", "0 added, 0 gone, 600 kept", "overlap@10", "centroids", "largest shard"):
        assert fact in flat(text)
    text = run("diff", store, "--no-ids", "--no-answers")[1]
    assert "rows by id" not in text
    assert "overlap" not in text
    code, text = run("diff", store, "--before", "nobody")
    assert code == 3
    assert "no snapshot of run 'nobody'" in flat(text)
