"""What README and docs say: their Python blocks run, and their tables hold what the code holds."""

import ast
import asyncio
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sf_pipelines import WriteConfig, build_snapshot, errors
from sf_pipelines.cli import app
from sf_pipelines.snapshot.index.lancedb import LanceDBShard
from sf_pipelines.snapshot.reader.options import ReaderOptions, ReaderSettings
from sf_pipelines_tests.tables import clustered, vector_table

_HERE = Path(__file__).parents[2]
_FIRST = "README.md"
_PAGES = (_FIRST, "docs/kinds.md", "docs/readers.md")
_ENGINES = "docs/engines.md"
_DIM, _ROWS = 384, 400
# A block that is not run is preceded by its reason.
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]*) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_KEYED = "UnifiedShardedReader"


class Block(NamedTuple):
    """A block of Python in a page.

    Attributes:
        page: its path.
        line: of its first line of code, from 1.
        code: as it stands there.
        reason: why it is not run; None where it is.
    """

    page: str
    line: int
    code: str
    reason: str | None


def blocks_of(page: str) -> list[Block]:
    text = (_HERE / page).read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start("code")) + 1, match["code"], match["reason"])
        for match in _BLOCK.finditer(text)
    ]
    assert len(found) == text.count("```python"), f"{page}: a block of Python is not closed, or indented"
    return found


class Roots(NamedTuple):
    """Where the blocks find things.

    Attributes:
        source: a Parquet file.
        vectors: root of a vector-only snapshot.
        unified: root of a unified one.
        fresh: root for what a page builds itself.
    """

    source: Path
    vectors: Path
    unified: Path
    fresh: Path


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Roots]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("docs")
        patch.setenv("SF_PIPELINES_CACHE", str(root / "cache"))
        skus = [f"sku-{n}" for n in range(_ROWS)]
        table = vector_table(clustered(_ROWS, _DIM), title=[f"row {n}" for n in range(_ROWS)], sku=skus)
        pq.write_table(table, root / "source.parquet")
        found = Roots(root / "source.parquet", root / "vectors", root / "unified", root / "fresh")
        shared: dict[str, Any] = {"name": "products", "source": str(found.source), "num_dbs": 4}
        spec: Any = {"dim": _DIM}
        build_snapshot(WriteConfig(**shared, store=str(found.vectors), payload_cols=("title",), vector_spec=spec))
        keyed = {
            "key_value": {"key_col": "sku", "value_cols": ("title",)},
            "vector_spec": spec | {"backend": "sqlite-vec"},
        }
        build_snapshot(WriteConfig(**shared, store=str(found.unified), **keyed))
        yield found


def code_of(block: Block, roots: Roots) -> CodeType:
    """Compiled so that errors name the page's line; addresses of the examples become those of the test."""
    served = roots.unified if _KEYED in block.code else roots.vectors
    if block.page == _FIRST:
        # It builds what it serves.
        served = roots.fresh
    text = block.code.replace("s3://lake/products/*.parquet", str(roots.source))
    text = text.replace("s3://serving/products", str(served))
    return compile("\n" * (block.line - 1) + text, block.page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", [*_PAGES, _ENGINES])
def test_python_blocks_run(page: str, roots: Roots) -> None:
    """In their order and in one namespace, as somebody who reads the page would type them."""
    names: dict[str, Any] = {
        "root": str(roots.vectors),
        "unified_root": str(roots.unified),
        "query": clustered(1, _DIM, seed=7)[0],
        "queries": clustered(5, _DIM, seed=8),
    }
    with asyncio.Runner() as runner:
        for block in blocks_of(page):
            if block.reason is not None:
                assert len(block.reason) > 10, f"{page}:{block.line} is not run: say why"
                continue
            code = code_of(block, roots)
            if code.co_flags & inspect.CO_COROUTINE:
                runner.run(eval(code, names))  # noqa: S307 - our own page
            else:
                exec(code, names)  # noqa: S102 - our own page
        if "lifespan" in names:
            assert runner.run(a_request(names["lifespan"], names["similar"]))


async def a_request(lifespan: Any, similar: Any) -> list[dict[str, Any]]:
    """A request to a service, without a framework."""
    app = SimpleNamespace(state=SimpleNamespace())
    async with lifespan(app):
        return await similar(SimpleNamespace(app=app))


def test_the_lines_for_your_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers to Parquet, a YAML, a build and a search: as the README has them, in a folder with a matrix in it."""
    section = (_HERE / _FIRST).read_text(encoding="utf-8").split("\n## Your data\n")[1].split("\n## ")[0]
    blocks = dict(re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SF_PIPELINES_CACHE", str(tmp_path / "cache"))
    np.save("vectors.npy", clustered(2000, _DIM))
    exec(blocks["python"], {})  # noqa: S102 - our own page
    Path("products.yaml").write_text(blocks["yaml"], encoding="utf-8")
    said = ""
    for line in blocks[""].splitlines():
        command, *arguments = shlex.split(line, comments=True)
        assert command == "sf-pipelines"
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        said += result.output
    assert "recall@10" in said


def table_under(page: str, heading: str, header: str) -> list[list[str]]:
    """Cells of the rows of a table, by the heading above it and the first cell of its header."""
    text = (_HERE / page).read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    start = next(at for at, row in enumerate(rows) if row[0] == header)
    ends = [at for at, row in enumerate(rows) if at > start + 1 and set("".join(row)) <= set("-")]
    # The next table's header stands before its dashes.
    return rows[start + 2 : ends[0] - 1 if ends else None]


def test_every_option_is_in_the_table_and_no_other() -> None:
    rows = {row[0].strip("`"): row[1] for row in table_under("docs/readers.md", "Options", "Option")}
    assert list(rows) == list(ReaderSettings.model_fields)
    assert set(rows) == set(ReaderOptions.__annotations__)
    shown = {"cache_bytes": "20 GiB", "memory_budget": "2 GiB"}
    for name, field in ReaderSettings.model_fields.items():
        assert rows[name] == shown.get(name, f"`{field.default}`"), name
    settings = ReaderSettings()
    assert settings.cache_bytes == 20 * 1024**3
    assert settings.memory_budget == 2 * 1024**3


def test_the_size_up_to_which_shards_are_scanned_is_right() -> None:
    for page in ("docs/kinds.md", "docs/readers.md"):
        told = re.findall(r"(\d+) MiB of vectors", (_HERE / page).read_text(encoding="utf-8"))
        assert told, page
        assert {int(size) * 1024**2 for size in told} == {LanceDBShard.scan_bytes}, page


def test_every_option_is_explained_in_the_docstring() -> None:
    attributes = (ReaderSettings.__doc__ or "").split("Attributes:")[1].split("Raises:")[0]
    explained = re.findall(r"^ {8}(\w+): ", attributes, re.MULTILINE)
    assert explained == list(ReaderSettings.model_fields)


def test_the_table_of_errors_is_right_and_whole() -> None:
    rows = table_under("docs/readers.md", "Errors", "Class")
    named = {row[0].strip("`"): (row[1].strip("`"), row[2]) for row in rows}
    for name, said in named.items():
        error = getattr(errors, name)
        assert said == (error.kind, "yes" if error.retryable else "no"), name
    readers = {error.__name__ for error in _below(errors.ReaderError)}
    assert readers <= set(named)


def _below(error: type) -> list[type]:
    return [found for child in error.__subclasses__() for found in (child, *_below(child))]


def test_every_page_is_linked_from_the_readme() -> None:
    text = (_HERE / _FIRST).read_text(encoding="utf-8")
    for page in (_HERE / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in text, page.name


def test_links_between_pages_lead_somewhere() -> None:
    for page in (_FIRST, *(f"docs/{path.name}" for path in (_HERE / "docs").glob("*.md"))):
        text = (_HERE / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            found = (_HERE / page).parent / path if path else _HERE / page
            assert found.is_file(), f"{page} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {_anchor(heading) for heading in headings}, f"{page} links to {target}"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
