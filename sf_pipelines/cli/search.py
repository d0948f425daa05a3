"""The commands that ask a snapshot: ``search``, ``get``, ``info``."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sf_pipelines.cli.console import (
    NOT_THERE,
    AsJson,
    Endpoint,
    Store,
    print_facts,
    print_json,
    recall_text,
    s3_options,
    safe,
    size,
    typed_errors,
)
from sf_pipelines.snapshot.errors import QueryError

if TYPE_CHECKING:
    from sf_pipelines.snapshot.reader.reader import ShardedVectorReader, UnifiedShardedReader
    from sf_pipelines.snapshot.reader.types import ShardDetail, SnapshotInfo

commands = typer.Typer()

Context = Annotated[
    list[str] | None,
    typer.Option(
        "--context", help="name=value of the row, where an expression names the shard; once for each of its columns."
    ),
]


@commands.command()
def search(
    store: Store,
    query: Annotated[
        str | None,
        typer.Argument(
            help="A JSON list of numbers, or @file with one; - reads it from standard input.", show_default=False
        ),
    ] = None,
    *,
    like: Annotated[
        str | None, typer.Option("--like", help="Id of a row, in place of a query: more like this, without the row.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="Neighbours wanted.")] = 10,
    num_probes: Annotated[int | None, typer.Option(help="Shards to ask; default: as the snapshot was tuned.")] = None,
    shard: Annotated[list[int] | None, typer.Option(help="Ask this shard; may be said several times.")] = None,
    context: Context = None,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Find the nearest rows of a vector, or with --like of a row. Exit code 3 when there is no such row."""
    if (query is None) == (like is None):
        raise typer.BadParameter("give either a query or --like", param_hint="QUERY")
    with typed_errors():
        vector = None if query is None else _read_query(query)
        with _reader(store, endpoint_url) as reader:
            given: dict[str, Any] = {"shard_ids": shard or None, "routing_context": _context(reader, context)}
            # A snapshot with keys is not sharded by vector: its reader has no such option.
            if num_probes is not None:
                _check_probes(reader)
                given["num_probes"] = num_probes
            if like is None:
                answer = reader.search(vector or [], top_k, **given)
                hits = answer.results
            else:
                row = _id_of(reader, like)
                stored = reader.get_vectors([row], shard_ids=shard or None)[row]
                if stored is None:
                    typer.secho(f"no row of {safe(reader.snapshot_info().run_id)} has id {like!r}", err=True)
                    raise typer.Exit(NOT_THERE)
                answer = reader.search(stored, top_k + 1, **given)
                hits = [hit for hit in answer.results if hit.id != row][:top_k]
    if as_json:
        rows = [{"id": hit.id, "score": hit.score, "payload": hit.payload} for hit in hits]
        typer.echo(json.dumps(rows))
        return
    table = Table("rank", "id", "score", "payload")
    for rank, hit in enumerate(hits, start=1):
        payload = "" if hit.payload is None else json.dumps(hit.payload, ensure_ascii=False)
        table.add_row(str(rank), safe(str(hit.id)), f"{hit.score:.6f}", safe(payload))
    Console().print(table, f"shards asked: {answer.num_shards_queried}, {answer.latency_ms:.1f} ms", highlight=False)


def _id_of(reader: "ShardedVectorReader | UnifiedShardedReader", text: str) -> int | str:
    """An id with the type that the snapshot's ids have; where it does not say, a number is taken for one."""
    kind = reader.snapshot_info().id_type
    if kind == "string":
        return text
    try:
        return int(text)
    except ValueError as error:
        if kind is None:
            return text
        raise QueryError(f"--like {text!r} is no whole number, which the ids of this snapshot are") from error


@commands.command()
def get(
    store: Store,
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys to look up.", show_default=False)],
    context: Context = None,
    hexadecimal: Annotated[bool, typer.Option("--hex", help="The keys are hexadecimal digits of bytes.")] = False,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Look up the values of keys. Exit code 3 when one of them is not there.

    Values are shown as text; those that are none as 0x and their hexadecimal digits.
    """
    from sf_pipelines.snapshot.reader.reader import UnifiedShardedReader

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
        raise typer.Exit(NOT_THERE)


@commands.command()
def info(store: Store, endpoint_url: Endpoint = None, as_json: AsJson = False) -> None:
    """Show the current snapshot and its shards."""
    with typed_errors(), _reader(store, endpoint_url) as reader:
        facts, shards = reader.snapshot_info(), reader.shard_details()
    if as_json:
        print_json(facts, shards=[dataclasses.asdict(shard) for shard in shards])
    else:
        _show_info(Console(), facts, shards)


def _show_info(out: Console, facts: "SnapshotInfo", shards: "list[ShardDetail]") -> None:
    filled = sum(shard.db_url is not None for shard in shards)
    stored = "" if facts.total_bytes is None else f", {size(facts.total_bytes)}"
    recall = recall_text(facts.recall, facts.recall_lower)
    if facts.recall is not None:
        recall += (
            f" (95 % confidence), judged before it was published, asking {facts.num_probes} of {facts.num_dbs} shards"
        )
    index = ", ".join(part for part in (facts.index_type, facts.quantization, facts.backend) if part)
    columns = {
        "id": facts.id_type or "type not recorded",
        "payload": "not recorded" if facts.payload_columns is None else ", ".join(facts.payload_columns) or "none",
        "filter": ", ".join(f"{name}: {kind}" for name, kind in facts.filter_columns.items()) or "none",
        "context": ", ".join(f"{name}: {kind}" for name, kind in facts.cel_columns.items()),
    }
    shown = {
        "run": facts.run_id,
        "built": f"{facts.created_at:%Y-%m-%d %H:%M:%S}Z",
        "published": "" if facts.published_at is None else f"{facts.published_at:%Y-%m-%d %H:%M:%S}Z",
        "kind": facts.kind + (f", keys as {facts.key_encoding}" if facts.key_encoding else ""),
        f"recall@{facts.recall_k}" if facts.recall_k else "recall": recall,
        "rows": f"{facts.total_vectors:,} in {filled} of {facts.num_dbs} shards{stored}",
        "vectors": f"{facts.dim} numbers, {facts.metric}",
        "index": index,
        "sharding": f"{facts.sharding}, asking {facts.num_probes} of {facts.num_dbs} shards",
        **{f"columns: {name}": text for name, text in columns.items() if text},
        "manifest": facts.manifest_ref,
    }
    print_facts(out, {name: text for name, text in shown.items() if text})
    table = Table("shard", "rows", "size", "address")
    for shard in shards:
        cells = (str(shard.db_id), f"{shard.vector_count:,}", "" if shard.bytes is None else size(shard.bytes))
        table.add_row(*cells, safe(shard.db_url or "(empty)"))
    out.print(table, highlight=False)


def _reader(store: str, endpoint_url: str | None) -> "ShardedVectorReader | UnifiedShardedReader":
    from sf_pipelines.snapshot.reader.reader import open_reader

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
