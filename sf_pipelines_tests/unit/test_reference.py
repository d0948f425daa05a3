"""docs/reference.md is what the models say, and the models say all of it."""

import subprocess
import sys
from pathlib import Path

import pytest
from reference import described, reference

from sf_pipelines.components.vector_snapshot import VectorSnapshotAttributes
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.model import ConfigModel

PAGE = Path(__file__).parents[2] / "docs/reference.md"


def test_the_page_is_what_the_models_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run make docs"


def test_make_docs_writes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error::RuntimeWarning", "docs/reference.py"]
    subprocess.run([*command, str(tmp_path / "page.md")], cwd=PAGE.parents[1], check=True)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_every_field_and_every_model_is_there() -> None:
    text = reference()
    for name in VectorSnapshotAttributes.model_fields:
        assert f"\n| `{name}` |" in text
    for model in _nested(VectorSnapshotAttributes):
        assert f"\n## {model}\n" in text
        assert text.count(f"\n## {model}\n") == 1
    assert "| `dim` | whole number, > 0, ≤ 65,536 | *required* | numbers in a vector. |" in text
    assert "0x" not in text


def _nested(model: type[ConfigModel]) -> set[str]:
    """Models below one, by its JSON schema."""
    return {name for name, one in model.model_json_schema()["$defs"].items() if one["type"] == "object"}


def test_no_docstring_describes_what_is_no_field() -> None:
    assert set(described(WriteConfig)) == set(WriteConfig.model_fields)


def test_a_field_that_nobody_described_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WriteConfig, "__doc__", (WriteConfig.__doc__ or "").replace("num_dbs: number", "dbs: number"))
    with pytest.raises(ConfigError, match=r"WriteConfig\.num_dbs is not described"):
        reference()
