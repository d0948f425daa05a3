"""Commands on published snapshots: history, rollback, release, pins, cleanup, diff."""

import dataclasses
import json
import re
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from sf_pipelines.cli.console import (
    FAILED,
    AsJson,
    Endpoint,
    Store,
    print_facts,
    print_json,
    progress,
    recall_text,
    s3_options,
    safe,
    size,
    typed_errors,
)
from sf_pipelines.snapshot.errors import OperationError
from sf_pipelines.snapshot.manifest.pointer import Hold

if TYPE_CHECKING:
    from sf_pipelines.snapshot.gate.verdicts import RecallFigures
    from sf_pipelines.snapshot.operations.cleanup import CleanupReport
    from sf_pipelines.snapshot.operations.diff import SnapshotDiff
    from sf_pipelines.snapshot.operations.history import SnapshotStatus

commands = typer.Typer()

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run id, as history shows it.", show_default=False)]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@commands.command()
def history(
    store: Store,
    limit: Annotated[int, typer.Option(help="Most snapshots to list.", min=1)] = 10,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """List what was published, newest first: what is current, withdrawn by a rollback, held, pinned."""
    from sf_pipelines.snapshot.operations.history import snapshots

    with typed_errors():
        found = snapshots(store, limit=limit, s3=s3_options(endpoint_url), figures=True)
    if as_json:
        rows = [
            {
                "run_id": entry.run_id,
                "built_at": entry.published_at.isoformat(),
                "manifest": entry.manifest_key,
                "current": entry.is_current,
                "withdrawn": entry.is_withdrawn,
                "held": entry.is_held,
                "pinned": entry.pinned,
                **({} if entry.figures is None else dataclasses.asdict(entry.figures)),
            }
            for entry in found
        ]
        typer.echo(json.dumps(rows))
        return
    table = Table("", "built", Column("run", no_wrap=True), "recall", "rows", "size", "index", "pinned")
    for entry in found:
        figures, built = entry.figures, f"{entry.published_at:%Y-%m-%d %H:%M:%S}Z"
        cells = ("manifest cannot be read", "", "", "")
        if figures is not None:
            judged, stored = figures.recall, "" if figures.bytes is None else size(figures.bytes)
            recall = "not recorded" if judged is None else recall_text(judged.recall, judged.lower)
            cells = (recall, f"{figures.rows:,}", stored, safe(figures.index_type))
        table.add_row(_state_of(entry), built, safe(entry.run_id), *cells, safe(entry.pinned or ""))
    Console().print(table, highlight=False)


def _state_of(entry: "SnapshotStatus") -> str:
    words = [("current", entry.is_current), ("withdrawn", entry.is_withdrawn), ("held", entry.is_held)]
    return ", ".join(word for word, holds in words if holds)


@commands.command()
def rollback(
    store: Store,
    to: Annotated[str | None, typer.Option("--to", help="Run id to go to; default: --back.")] = None,
    back: Annotated[int, typer.Option("--back", help="How many snapshots back in what was served.", min=1)] = 1,
    deep: Annotated[bool, typer.Option("--deep", help="Read and hash every object of the target.")] = False,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Make an earlier snapshot current, after looking at all of its objects.

    The next build of the source and config that were withdrawn does not publish them again; release lifts that.
    """
    from sf_pipelines.snapshot.operations.rollback import rollback as roll_back

    with typed_errors(), progress() as watch:
        result = roll_back(store, to, back=back, s3=s3_options(endpoint_url), deep=deep, progress=watch)
    if as_json:
        print_json(result)
        return
    out = Console()
    out.print(f"{safe(result.run_id)} is current now (seq {result.seq})", highlight=False, soft_wrap=True)
    checked = result.checked
    facts = {
        "before": result.previous_run_id or "(no pointer)",
        "looked at": f"{checked.objects} objects, {checked.bytes:,} bytes, of which {checked.hashed} were hashed",
        "withdrawn": ", ".join(result.withdrawn) or "(none)",
        "held": _held(result.holds, "; until release, or until another build is published") or "(nothing)",
    }
    print_facts(out, facts)


def _held(holds: Sequence[Hold], until: str = "") -> str:
    """Build keys that are, or were, held."""
    shown = ", ".join(
        hold.build_key[:16] + ("" if hold.gate_key is None else f" under gate {hold.gate_key[:16]}") for hold in holds
    )
    return f"build key {shown}{until}" if shown else ""


@commands.command()
def release(store: Store, endpoint_url: Endpoint = None, as_json: AsJson = False) -> None:
    """Lift the hold of a rollback: the next build of that source and config may publish again."""
    from sf_pipelines.snapshot.operations.rollback import release as lift

    with typed_errors():
        result = lift(store, s3=s3_options(endpoint_url))
    if as_json:
        print_json(result)
        return
    said = f"released {_held(result.released)}" if result.released else "nothing was held"
    Console().print(f"{said}; {safe(result.run_id)} stays current", highlight=False, soft_wrap=True)


@commands.command()
def pin(
    store: Store,
    run: Run,
    reason: Annotated[str, typer.Option("--reason", help="Why it must be kept.", show_default=False)],
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Keep a published snapshot from being cleaned up."""
    from sf_pipelines.snapshot.operations.pins import pin as pin_run

    with typed_errors():
        made = pin_run(store, run, reason, s3=s3_options(endpoint_url))
    if as_json:
        typer.echo(json.dumps(made.model_dump(mode="json")))
        return
    Console().print(f"pinned {safe(made.run_id)}: {safe(made.reason)}", highlight=False, soft_wrap=True)


@commands.command()
def unpin(store: Store, run: Run, endpoint_url: Endpoint = None, as_json: AsJson = False) -> None:
    """Let cleanups remove a snapshot again."""
    from sf_pipelines.snapshot.operations.pins import unpin as unpin_run

    with typed_errors():
        result = unpin_run(store, run, s3=s3_options(endpoint_url))
    if as_json:
        typer.echo(json.dumps(result.model_dump(mode="json")))
        return
    Console().print(f"unpinned {safe(run)}; it was pinned for: {safe(result.reason)}", highlight=False)


@commands.command()
def pins(store: Store, endpoint_url: Endpoint = None, as_json: AsJson = False) -> None:
    """List the snapshots that no cleanup removes."""
    from sf_pipelines.snapshot.operations.pins import pins as list_pins

    with typed_errors():
        found = list_pins(store, s3=s3_options(endpoint_url))
    if as_json:
        typer.echo(json.dumps([one.model_dump(mode="json") for one in found]))
        return
    table = Table("run", "since", "reason")
    for one in found:
        table.add_row(safe(one.run_id), f"{one.pinned_at:%Y-%m-%d %H:%M:%S}Z", safe(one.reason))
    Console().print(table if found else "nothing is pinned", highlight=False)


@commands.command()
def cleanup(
    store: Store,
    keep: Annotated[int, typer.Option("--keep", help="Published snapshots to keep, the current one included.", min=1)],
    older_than: Annotated[
        str | None, typer.Option("--older-than", help="Keep what was built since: 90m, 12h, 30d, 4w.")
    ] = None,
    stale_after: Annotated[
        str, typer.Option("--stale-after", help="Age of failed builds, routed rows and left-over files to remove.")
    ] = "7d",
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without this it is only shown.")] = False,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Show what nobody needs any more; with --apply, remove it. Exit code 1 when some of it had to stay after all.

    Never touched: the current snapshot, pinned ones, running builds, and what no known writer made.
    """
    from sf_pipelines.snapshot.operations.cleanup import cleanup as clean_up

    with typed_errors():
        result = clean_up(
            store,
            keep=keep,
            older_than=None if older_than is None else _duration(older_than, "--older-than"),
            stale_after=_duration(stale_after, "--stale-after"),
            dry_run=not apply,
            s3=s3_options(endpoint_url),
        )
    if as_json:
        print_json(result, objects=result.objects, bytes=result.bytes)
    else:
        _show_cleanup(Console(), result)
    if any(group.refused for group in result.groups):
        raise typer.Exit(FAILED)


def _show_cleanup(out: Console, result: "CleanupReport") -> None:
    table = Table("rule", "run", "objects", "size", "why")
    for group in result.groups:
        why = safe(group.why) if group.refused is None else f"[yellow]stays[/] {safe(group.refused)}"
        table.add_row(group.rule, safe(group.run_id or ""), f"{group.objects:,}", size(group.bytes), why)
    out.print(table if result.groups else "nothing to remove", highlight=False)
    for verb, runs in (("keeps", result.kept), ("leaves alone", result.left_alone)):
        for what, why in runs.items():
            out.print(f"  {verb} {safe(what)}: {safe(why)}", highlight=False, soft_wrap=True)
    if not result.groups:
        return
    if result.applied:
        out.print(f"removed {size(result.bytes_freed)} of {size(result.bytes)}", highlight=False)
    else:
        said = f"would remove {result.objects:,} objects, {size(result.bytes)}; nothing was changed: --apply does it"
        out.print(said, highlight=False)


@commands.command()
def diff(
    store: Store,
    before: Annotated[str | None, typer.Option("--before", help="Run id; default: what was served before.")] = None,
    after: Annotated[str | None, typer.Option("--after", help="Run id; default: the current snapshot.")] = None,
    ids: Annotated[bool, typer.Option(help="Compare rows by id; reads every shard of both.")] = True,
    answers: Annotated[bool, typer.Option(help="Compare the answers to the newer one's query sample.")] = True,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Compare two snapshots: config, rows, shards, routing, recall, bytes, answers."""
    from sf_pipelines.snapshot.operations.diff import diff as compare

    with typed_errors(), progress() as watch:
        found = compare(store, before, after, s3=s3_options(endpoint_url), ids=ids, answers=answers, progress=watch)
    if as_json:
        print_json(found)
        return
    _show_diff(Console(), found)


def _show_diff(out: Console, found: "SnapshotDiff") -> None:
    table = Table("", "before", "after")
    sides = (found.before, found.after)
    table.add_row("run", *(safe(side.run_id) for side in sides))
    table.add_row("built", *(f"{side.created_at:%Y-%m-%d %H:%M:%S}Z" for side in sides))
    table.add_row("rows", *(f"{side.rows:,}" for side in sides))
    table.add_row("shards", *(str(side.shards) for side in sides))
    table.add_row("size", *(size(side.bytes) for side in sides))
    table.add_row("recall", *(_recall(side.recall) for side in sides))
    for change in found.config:
        table.add_row(change.name, safe(str(change.before)), safe(str(change.after)))
    out.print(table, highlight=False)
    facts: dict[str, str] = {}
    if found.ids is not None:
        by = ", numbers compared as text" if found.ids.as_text else ""
        changed = f" ({found.ids.changed:,} with another vector)" if found.ids.changed else ""
        counts = f"{found.ids.added:,} added, {found.ids.gone:,} gone, {found.ids.kept:,} kept{changed}"
        facts["rows by id"] = f"{counts}{by}"
    sizes = [(shard.rows_before, shard.rows_after) for shard in found.shards]
    facts["largest shard"] = f"{max(old for old, _ in sizes):,} rows before, {max(new for _, new in sizes):,} after"
    if found.routing is not None:
        shift = found.routing
        left = f", {shift.unmatched} without a match" if shift.unmatched else ""
        moved = f"moved by {shift.mean:.4f} on average, {shift.largest:.4f} at most ({shift.measure})"
        facts[shift.artifact] = moved + left
    if found.overlap is not None:
        overlap = found.overlap
        facts[f"overlap@{overlap.k}"] = (
            f"{overlap.mean:.4f} over {overlap.queries} queries, below {overlap.lowest_tenth:.4f} for a tenth of them, "
            f"the same rows for {overlap.same:.1%}"
        )
    for number, note in enumerate(found.notes, start=1):
        facts[f"note {number}"] = note
    print_facts(out, facts)


def _recall(figures: "RecallFigures | None") -> str:
    """The judged recall in a cell."""
    if figures is None:
        return "(not recorded)"
    asked = f"{figures.num_probes} probe{'' if figures.num_probes == 1 else 's'}"
    return f"{recall_text(figures.recall, figures.lower)} (@{figures.k}, {asked})"


def _duration(text: str, option: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,9})([smhdw])", text)
    if match is None:
        raise OperationError(f"{option} {text!r} is no duration; write a number and a unit: 90m, 12h, 30d, 4w")
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])
