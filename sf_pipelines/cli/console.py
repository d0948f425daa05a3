"""What all commands share: options, errors on one line, exit codes, progress, text that a terminal can take."""

import dataclasses
import json
import signal
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import RunNotFoundError, SfPipelinesError, SnapshotNotFoundError

Store = Annotated[str, typer.Argument(help="Root of the snapshot: s3://bucket/prefix or a folder.", show_default=False)]
Endpoint = Annotated[
    str | None, typer.Option("--endpoint-url", help="S3 server other than AWS. Credentials come from AWS_* variables.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

# Exit codes, as in docs/operations.md; 2 is what the command line's parser uses for wrong usage.
FAILED, NOT_THERE = 1, 3

_STAGES = {
    "load": "load libraries",
    "scan": "look at the source",
    "sample": "validate and sample",
    "train": "train routing",
    "route": "route rows to shards",
    "shards": "build shards",
    "assemble": "measure recall",
    "gate": "run checks",
    "promote": "publish",
    "verify": "verify shards",
    "diff": "compare rows",
    "answers": "compare answers",
}
_BINARY = 1024


def safe(text: str) -> str:
    """For a table: no markup, and control characters and lone surrogates as escapes; a terminal would obey those."""
    unsafe = {char for char in text if unicodedata.category(char) in {"Cc", "Cs"}} - {"\n", "\t"}
    return escape(text.translate({ord(char): char.encode("unicode_escape").decode() for char in unsafe}))


def print_facts(out: Console, facts: dict[str, str]) -> None:
    """Names and values in two columns."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        out.print(f"  {name:<{width}}  {safe(value)}", highlight=False, soft_wrap=True)


def print_json(result: Any, **more: Any) -> None:
    """A dataclass, or a mapping, on one line."""
    fields: dict[str, Any] = result if isinstance(result, dict) else dataclasses.asdict(result)
    typer.echo(json.dumps({**fields, **more}, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def size(count: int) -> str:
    """Bytes as a person reads them."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= _BINARY and len(units) > 1:
        value /= _BINARY
        units.pop(0)
    return f"{count} {units[0]}" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def recall_text(recall: float | None, lower: float | None) -> str:
    """A recall with its bound."""
    if recall is None or lower is None:
        return "not recorded"
    return f"{recall:.4f}, at least {lower:.4f}"


def s3_options(endpoint_url: str | None) -> S3Options | None:
    """What an endpoint leaves to be said; credentials come from the environment."""
    return None if endpoint_url is None else S3Options(endpoint_url=endpoint_url)


@contextmanager
def typed_errors() -> Iterator[None]:
    """Errors of this package on one line, exit code 1, or 3 where what was named is not there.

    Anything else is a bug and keeps its traceback.
    """
    try:
        yield
    except SfPipelinesError as error:
        line = " ".join(str(error).split())
        typer.secho(f"error [{error.kind}]: {line}", fg=typer.colors.RED, err=True)
        missing = isinstance(error, SnapshotNotFoundError | RunNotFoundError)
        raise typer.Exit(NOT_THERE if missing else FAILED) from error


@contextmanager
def unwinding() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: what a build holds is given back. Of the main thread."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def progress() -> Iterator[Any]:
    """Draws one bar for each stage on standard error; where that is no terminal, a line for each that has ended."""
    out = Console(stderr=True)
    if not out.is_terminal:
        lines = _Lines(out)
        yield lines
        lines.end()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=out) as drawn:
        bars = _Bars(drawn)
        yield bars
        bars.end()


class _Bars:
    """A bar for each stage; the one before ends where the next begins, whether it was counted to its end or not."""

    def __init__(self, drawn: Progress) -> None:
        self._drawn = drawn
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int | None, unit: str) -> None:
        if stage not in self._tasks:
            self.end()
            self._tasks[stage] = self._drawn.add_task(_STAGES.get(stage, stage), total=total, unit=unit)
        self._drawn.update(self._tasks[stage], completed=done, total=total, unit=unit)

    def end(self) -> None:
        """All that was begun is done."""
        for task in self._drawn.tasks:
            if not task.finished:
                whole = max(1, int(task.total or 0), int(task.completed))
                self._drawn.update(task.id, completed=whole, total=whole)


class _Lines:
    """A line for each stage that has ended, with its seconds."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._stage: str | None = None
        self._count = ""
        self._since = 0.0

    def __call__(self, stage: str, done: int, _total: int | None, unit: str) -> None:
        if stage != self._stage:
            self.end()
            self._stage, self._since = stage, time.perf_counter()
        self._count = f"{done:,} {unit}" if done and unit else ""

    def end(self) -> None:
        """The stage that is under way has ended."""
        if self._stage is not None:
            name, seconds = _STAGES.get(self._stage, self._stage), time.perf_counter() - self._since
            self._out.print(f"  {name:<22} {seconds:6.1f} s  {self._count}".rstrip(), highlight=False)
            self._stage = None
