"""The program ``sf-pipelines``: its commands under one name."""

from typing import Annotated

import typer

from sf_pipelines import __version__
from sf_pipelines.cli import build, operations, search

app = typer.Typer(
    name="sf-pipelines",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sf-pipelines {__version__}")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Build, publish, search and verify sharded vector-search snapshots.

    Exit codes: 0 done, 1 failed or something is wrong, 2 wrong usage, 3 what was named is not there.
    """
    del version


app.add_typer(build.commands)
app.add_typer(search.commands)
app.add_typer(operations.commands)
