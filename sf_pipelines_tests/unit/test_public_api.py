"""What a person sees of the package without reading its code: its version, help texts, and how results look."""

import inspect
import pydoc
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sf_pipelines
from sf_pipelines import ShardedVectorReader, VectorSpec, WriteConfig, build_snapshot
from sf_pipelines_tests.tables import clustered, write_source

_HERE = Path(__file__).parents[2]
_CLASSES = [value for name in sf_pipelines.__all__ if inspect.isclass(value := getattr(sf_pipelines, name))]


def test_version_types_and_licence() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", sf_pipelines.__version__)
    assert f"## {sf_pipelines.__version__} " in (_HERE / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (Path(sf_pipelines.__file__).parent / "py.typed").is_file()
    assert "Apache License" in (_HERE / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("shown", _CLASSES, ids=lambda shown: shown.__name__)
def test_help_is_for_people(shown: type) -> None:
    """An alias such as ArrayLike is shown by its name: its parts fill five lines and say nothing."""
    text = pydoc.plain(pydoc.render_doc(shown))
    assert "numpy._typing" not in text
    methods = [value for name, value in inspect.getmembers(shown, callable) if not name.startswith("_")]
    for method in methods:
        if str(getattr(method, "__module__", "")).startswith("sf_pipelines"):
            assert inspect.getdoc(method), f"{shown.__name__}.{method.__name__} has no docstring"


def test_results_are_short_to_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_PIPELINES_CACHE", str(tmp_path / "cache"))
    write_source(tmp_path / "source.parquet")
    config = WriteConfig(
        name="small",
        source=str(tmp_path / "source.parquet"),
        store=str(tmp_path / "store"),
        num_dbs=20,
        payload_cols=("title",),
        vector_spec=VectorSpec(dim=16),
    )
    built = build_snapshot(config)
    query = clustered(1, 16)[0]
    with ShardedVectorReader(config.store) as reader:
        answer = reader.search(query, top_k=100, num_probes=20, include_vectors=True)
        explained = reader.explain(query, num_probes=20)
        shown: list[Any] = [built, answer, answer.results[0], explained, reader.health(), reader.snapshot_info()]
        shown.append(reader.search_arrays(np.stack([query] * 50), 100))
    for result in shown:
        assert len(repr(result)) < 900, type(result).__name__
    first = answer.results[0]
    assert repr(first).startswith(f"SearchResult(id={first.id}, score={first.score:.6g}, vector=<float32 of 16>, payl")
    assert f"{{{first.id}: {first.score:.6g}, " in repr(answer)
    assert "97 more}" in repr(answer)
    assert "latency_ms=" in repr(answer)
    assert repr(explained).startswith(f"Explanation(asks [{explained.shards[0].db_id}, ")
    assert f"run_id='{built.run_id}'" in repr(built)


def test_every_public_name_is_in_the_docs() -> None:
    pages = [_HERE / "README.md", *(_HERE / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    readers = [shown for shown in _CLASSES if shown.__name__.endswith("Reader")]
    methods = {name for reader in readers for name in dir(reader) if not name.startswith("_")}
    functions = {name for name in sf_pipelines.__all__ if inspect.isfunction(getattr(sf_pipelines, name))}
    missing = [name for name in sorted(methods | functions) if not re.search(rf"\b{name}\b", text)]
    assert missing == []
