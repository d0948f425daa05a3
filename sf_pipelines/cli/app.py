"""The commands that build and search."""

import json
import os
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sf_pipelines.cli.console import AsJson, Endpoint, Store, print_facts, progress, s3_options, safe, typed_errors
from sf_pipelines.cli.operations import operations
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError, QueryError

if TYPE_CHECKING:
    from sf_pipelines.snapshot.reader.sync import ShardedVectorReader, UnifiedShardedReader

app = typer.Typer(
    name="sf-pipelines",
    help="Build, publish, search and verify sharded vector-search snapshots.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(operations)

Context = Annotated[
    list[str] | None,
    typer.Option(
        "--context", help="name=value of the row, where an expression names the shard; once for each of its columns."
    ),
]


@app.command()
def build(
    config: Annotated[Path, typer.Argument(help="YAML file with the fields of WriteConfig.", show_default=False)],
    force: Annotated[
        bool, typer.Option("--force", help="Build and publish again although nothing is new, taking nothing over.")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="Where it is built: local, dask, ray or spark; default: this process."),
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="The engine's cluster; default: one is started.")
    ] = None,
) -> None:
    """Build a snapshot, prove its recall, and publish it; go on where an earlier try was killed."""
    from sf_pipelines.api import build_snapshot

    if address is not None and engine is None:
        raise typer.BadParameter("--address is that of an --engine; say which", param_hint="--address")
    with typed_errors():
        settings = _read_config(config)
        where = None if engine is None else {"type": engine, **({} if address is None else {"address": address})}
        with progress() as watch:
            result = build_snapshot(settings, engine=where, progress=watch, force=force)
        out = Console()
        if not result.published:
            text = f"Nothing is new: {result.run_id} stays current. (--force builds again.)"
            held = result.reason[:1].upper() + result.reason[1:]
            out.print(escape(held) if result.held else text, highlight=False, soft_wrap=True)
            return
        out.print(f"Published {result.run_id} (seq {result.seq}) at {escape(settings.store)}", highlight=False)
        seconds = sum(result.durations.values())
        facts = {
            "rows": f"{result.rows} in {len(result.shards)} shards, {result.rejected} rejected",
            f"recall@{settings.recall_gate.k}": f"{result.recall:.4f}, at least {result.recall_lower:.4f} "
            f"(95 % confidence), asking {result.num_probes} of {len(result.shards)} shards",
            "time": f"{seconds:.2f} s, {result.rows / seconds:,.0f} vectors/s",
            "manifest": result.manifest_ref,
        }
        print_facts(out, facts)
        for verdict in result.verdicts:
            if not verdict.passed:
                out.print(f"  [yellow]warning[/] {verdict.name}: {escape(verdict.message)}", highlight=False)


@app.command()
def search(
    store: Store,
    query: Annotated[
        str, typer.Argument(help="A JSON list of numbers, or @file with one; - reads it from standard input.")
    ],
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="Neighbours wanted.")] = 10,
    num_probes: Annotated[int | None, typer.Option(help="Shards to ask; default: as the snapshot was tuned.")] = None,
    shard: Annotated[list[int] | None, typer.Option(help="Ask this shard; may be said several times.")] = None,
    context: Context = None,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Find the nearest rows of a vector."""
    with typed_errors():
        vector = _read_query(query)
        with _reader(store, endpoint_url) as reader:
            given: dict[str, Any] = {"shard_ids": shard or None, "routing_context": _context(reader, context)}
            # A snapshot with keys is not sharded by vector: its reader has no such option.
            if num_probes is not None:
                _check_probes(reader)
                given["num_probes"] = num_probes
            answer = reader.search(vector, top_k, **given)
    if as_json:
        rows = [{"id": hit.id, "score": hit.score, "payload": hit.payload} for hit in answer.results]
        typer.echo(json.dumps(rows))
        return
    table = Table("rank", "id", "score", "payload")
    for rank, hit in enumerate(answer.results, start=1):
        payload = "" if hit.payload is None else json.dumps(hit.payload, ensure_ascii=False)
        table.add_row(str(rank), safe(str(hit.id)), f"{hit.score:.6f}", safe(payload))
    Console().print(table, f"{answer.num_shards_queried} shards, {answer.latency_ms:.1f} ms", highlight=False)


@app.command()
def get(
    store: Store,
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys to look up.", show_default=False)],
    context: Context = None,
    hexadecimal: Annotated[bool, typer.Option("--hex", help="The keys are hexadecimal digits of bytes.")] = False,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Look up the values of keys. Exit code 1 when one of them is not there.

    Values are shown as text; those that are none as 0x and their hexadecimal digits.
    """
    from sf_pipelines.snapshot.reader.sync import UnifiedShardedReader

    with typed_errors(), UnifiedShardedReader(store, s3=s3_options(endpoint_url)) as reader:
        whole = reader.snapshot_info().key_encoding in {"u64be", "u32be"}
        typed = [_key(text, whole=whole, hexadecimal=hexadecimal) for text in keys]
        found = reader.multi_get(typed, routing_context=_context(reader, context))
    shown = {text: _text_of(found[key]) for text, key in zip(keys, typed, strict=True)}
    if as_json:
        typer.echo(json.dumps(shown))
    else:
        table = Table("key", "value")
        for text, value in shown.items():
            table.add_row(safe(text), "[dim](not there)[/]" if value is None else safe(value))
        Console().print(table, highlight=False)
    if None in found.values():
        raise typer.Exit(1)


@app.command()
def info(store: Store, endpoint_url: Endpoint = None, as_json: AsJson = False) -> None:
    """Show the current snapshot and its shards."""
    with typed_errors(), _reader(store, endpoint_url) as reader:
        facts, shards = reader.snapshot_info(), reader.shard_details()
    values = {name: getattr(facts, name) for name in facts.__dataclass_fields__}
    if as_json:
        dates = {name: value.isoformat() for name, value in values.items() if isinstance(value, datetime)}
        rows = [{name: getattr(shard, name) for name in shard.__dataclass_fields__} for shard in shards]
        typer.echo(json.dumps({**values, **dates, "shards": rows}))
        return
    out = Console()
    print_facts(out, {name: str(value) for name, value in values.items() if value is not None and value != {}})
    table = Table("shard", "vectors", "address")
    for shard in shards:
        table.add_row(str(shard.db_id), str(shard.vector_count), escape(shard.db_url or "(empty)"))
    out.print(table, highlight=False)


@app.command()
def verify(
    store: Store,
    manifest: Annotated[
        str | None, typer.Option(help="Key of a manifest, as history --json shows it; default: the current one.")
    ] = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Hash every object again, open every shard, count rows, measure recall. Exit code 1 when anything is off."""
    from sf_pipelines.snapshot.verification import verify_snapshot

    with typed_errors():
        with progress() as watch:
            found = verify_snapshot(store, s3=s3_options(endpoint_url), manifest_key=manifest, progress=watch)
        out = Console()
        recall = "not measured"
        if found.recall is not None and found.recall_lower is not None:
            promised = "" if found.min_recall is None else f"; published for {found.min_recall}"
            recall = (
                f"{found.recall:.4f}, at least {found.recall_lower:.4f} (95 % confidence), asking {found.num_probes} "
                f"shards{promised}"
            )
        facts = {
            "run": found.run_id,
            "hashed": f"{found.objects} objects, {found.bytes:,} bytes",
            "counted": f"{found.rows} rows in {found.shards} shards",
            f"recall@{found.k}": recall,
        }
        print_facts(out, facts)
        for fault in found.faults:
            out.print(f"[red]fault[/] {escape(fault)}", highlight=False, soft_wrap=True)
        out.print("[green]all is well[/]" if found.passed else f"[red]{len(found.faults)} faults[/]")
    if not found.passed:
        raise typer.Exit(1)


def _reader(store: str, endpoint_url: str | None) -> "ShardedVectorReader | UnifiedShardedReader":
    from sf_pipelines.snapshot.reader.opening import open_reader

    return open_reader(store, s3=s3_options(endpoint_url))


def _check_probes(reader: "ShardedVectorReader | UnifiedShardedReader") -> None:
    strategy = reader.snapshot_info().sharding
    if strategy not in {"cluster", "lsh"}:
        raise QueryError(f"--num-probes is for snapshots sharded by vector; this one is sharded by {strategy}")


def _context(reader: "ShardedVectorReader | UnifiedShardedReader", pairs: list[str] | None) -> dict[str, Any] | None:
    """The routing context, each value with the type that its column has."""
    if not pairs:
        return None
    kinds = reader.snapshot_info().cel_columns
    context: dict[str, Any] = {}
    for pair in pairs:
        name, found, text = pair.partition("=")
        if not found:
            raise QueryError(f"--context {pair!r} is not name=value")
        if name in context:
            raise QueryError(f"--context {name} is given more than once; a row has one value of it")
        context[name] = _typed(name, text, kinds.get(name, "string"))
    return context


def _typed(name: str, text: str, kind: str) -> Any:
    if kind == "bytes":
        return os.fsencode(text)
    if kind == "bool":
        if text not in {"true", "false"}:
            raise QueryError(f"--context {name} is a bool: true or false (got {text!r})")
        return text == "true"
    if kind in {"int", "uint", "double"}:
        try:
            return float(text) if kind == "double" else int(text)
        except ValueError as error:
            raise QueryError(f"--context {name} is a number of type {kind} (got {text!r})") from error
    return text


def _key(text: str, *, whole: bool, hexadecimal: bool) -> int | str | bytes:
    if not (whole or hexadecimal):
        return text
    try:
        return bytes.fromhex(text) if hexadecimal else int(text)
    except ValueError as error:
        kind = "hexadecimal digits" if hexadecimal else "a whole number, which keys of this snapshot are"
        raise QueryError(f"key {text!r} is not {kind}") from error


def _text_of(value: bytes | None) -> str | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return f"0x{value.hex()}"


def _read_config(path: Path) -> WriteConfig:
    try:
        fields: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: byte {error.start} is none of it") from None
    except yaml.YAMLError as error:
        # The library quotes the file, where the next value may be a secret: not even as the cause.
        raise ConfigError(f"{path} is no YAML{_place_of(error)}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds no fields; write WriteConfig's fields as YAML, such as name: products")
    return WriteConfig(**{str(name): value for name, value in fields.items()})


def _place_of(error: yaml.YAMLError) -> str:
    """Where in the file and why, without what the file says there."""
    mark = getattr(error, "problem_mark", None)
    place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
    problem = re.sub(r"'(?!<)[^']{2,}'", "'…'", getattr(error, "problem", None) or "")
    return f"{place}: {problem}" if problem else place


def _read_query(text: str) -> list[float]:
    if text == "-":
        text = sys.stdin.read()
    elif text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except OSError as error:
            raise QueryError(f"query file {text[1:]} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise QueryError(f"query file {text[1:]} is no text: {error}") from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QueryError(f"the query is no JSON list of numbers: {error}") from error
    if not isinstance(values, list):
        raise QueryError(f"the query is no list of numbers but {type(values).__name__}")
    return values
