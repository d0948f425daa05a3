"""How large the package is, folder by folder: ``python -m sf_pipelines_tests.size``.

Lines of code have a token that is no comment and no docstring.
"""

import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "sf_pipelines"
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


class Size(NamedTuple):
    """Of one module, or the sum of several."""

    lines: int = 0
    code: int = 0
    modules: int = 0
    classes: int = 0

    def plus(self, other: "Size") -> "Size":
        """The sum of both."""
        return Size(*(one + two for one, two in zip(self, other, strict=True)))


def main() -> None:
    """Says it."""
    sys.stdout.write("\n".join(report()) + "\n")


def report() -> Iterator[str]:
    """A table, then what a reader meets: modules, functions, files of the core."""
    folders: dict[str, Size] = defaultdict(Size)
    lengths: list[int] = []
    functions: list[tuple[int, str]] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        tree = ast.parse(text)
        classes = sum(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
        lengths.append(text.count("\n"))
        size = Size(lengths[-1], _code_lines(tree, text), 1, classes)
        folder = str(path.parent.relative_to(PACKAGE.parent))
        folders[folder] = folders[folder].plus(size)
        functions += _functions(tree, str(path.relative_to(PACKAGE)))
    yield f"{'':<36}{'lines':>8}{'code':>8}{'modules':>9}{'classes':>9}"
    total = Size()
    for folder, size in sorted(folders.items()):
        yield f"{folder:<36}{size.lines:>8,}{size.code:>8,}{size.modules:>9}{size.classes:>9}"
        total = total.plus(size)
    yield f"{'all':<36}{total.lines:>8,}{total.code:>8,}{total.modules:>9}{total.classes:>9}"
    functions.sort()
    ninth = functions[len(functions) * 9 // 10][0]
    yield f"modules: median {median(lengths):.0f} lines, longest {max(lengths)}, over 500: {_over(lengths, 500)}"
    yield f"functions: {len(functions)}, 90 % within {ninth} lines, longest {functions[-1][0]} ({functions[-1][1]})"
    yield f"files directly in snapshot/: {folders['sf_pipelines/snapshot'].modules}"


def _over(lengths: list[int], limit: int) -> int:
    return sum(length > limit for length in lengths)


def _code_lines(tree: ast.Module, text: str) -> int:
    strings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - strings)


def _functions(tree: ast.Module, file: str) -> list[tuple[int, str]]:
    """Length and name of each, without its docstring."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                length -= (first.end_lineno or first.lineno) - first.lineno + 1
            found.append((length, f"{file}: {node.name}"))
    return found


if __name__ == "__main__":
    main()
