"""What all commands share: options, errors on one line, bars, text that a terminal can take."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import SfPipelinesError

Store = Annotated[str, typer.Argument(help="Root of the snapshot: s3://bucket/prefix or a folder.", show_default=False)]
Endpoint = Annotated[
    str | None, typer.Option("--endpoint-url", help="S3 server other than AWS. Credentials come from AWS_* variables.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

_STAGES = {
    "sample": "validate and sample",
    "route": "route rows to shards",
    "shards": "build shards",
    "gate": "run checks",
    "verify": "verify shards",
    "diff": "read shards",
}


def safe(text: str) -> str:
    """For a table: no markup, and control characters and lone surrogates as escapes; a terminal would obey those."""
    unsafe = {char for char in text if unicodedata.category(char) in {"Cc", "Cs"}} - {"\n", "\t"}
    return escape(text.translate({ord(char): char.encode("unicode_escape").decode() for char in unsafe}))


def print_facts(out: Console, facts: dict[str, str]) -> None:
    """Names and values in two columns."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        out.print(f"  {name:<{width}}  {safe(value)}", highlight=False, soft_wrap=True)


def s3_options(endpoint_url: str | None) -> S3Options | None:
    """What an endpoint leaves to be said; credentials come from the environment."""
    return None if endpoint_url is None else S3Options(endpoint_url=endpoint_url)


@contextmanager
def typed_errors() -> Iterator[None]:
    """Errors of this package on one line, exit code 1; anything else is a bug and keeps its traceback."""
    try:
        yield
    except SfPipelinesError as error:
        line = " ".join(str(error).split())
        typer.secho(f"error [{error.kind}]: {line}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error


@contextmanager
def progress() -> Iterator[Any]:
    """Draws one bar for each stage on standard error; nothing where that is no terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as drawn:

        def watch(stage: str, done: int, total: int | None, unit: str) -> None:
            if stage not in bars:
                bars[stage] = drawn.add_task(_STAGES.get(stage, stage), total=total, unit=unit)
            drawn.update(bars[stage], completed=done, total=total)

        yield watch
