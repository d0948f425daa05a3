"""The commands that make a snapshot and prove it: ``build``, ``verify``; and the YAML that a build is told by."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape

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
    unwinding,
)
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError

if TYPE_CHECKING:
    from sf_pipelines.snapshot.operations.verify import Verification
    from sf_pipelines.snapshot.stages.pipeline import BuildResult

commands = typer.Typer()

# What a component's file says of Dagster alone; SnapshotOptions, which this program does not import.
DAGSTER_FIELDS = frozenset(
    {
        "automation",
        "backfill",
        "cleanup",
        "engine",
        "executor",
        "freshness",
        "group",
        "key_prefix",
        "kinds",
        "operations",
        "owners",
        "pointer_sensor",
        "pool",
        "refresh_source",
        "s3_resource",
        "schedule",
        "source_assets",
        "source_sensor",
        "tags",
    }
)
_S3_FIELDS = {
    "endpoint_url": "endpoint_url",
    "region_name": "region",
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}
_TEMPLATE = re.compile(r"\{\{\s*(.*?)\s*\}\}")
_ENV = re.compile(r"""env\.(?P<dotted>\w+)|env\(\s*(['"])(?P<called>\w+)\2\s*(?:,\s*(['"])(?P<default>.*?)\4\s*)?\)""")


@commands.command("build")
def build(
    config: Annotated[
        Path,
        typer.Argument(help="YAML file: the fields of WriteConfig, or a component's defs.yaml.", show_default=False),
    ],
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
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Build a snapshot, prove its recall, and publish it; go on where an earlier try was killed.

    Relative paths are taken from the YAML's folder; of a component's file from the root of its Dagster project.
    """
    if address is not None and engine is None:
        raise typer.BadParameter("--address is that of an --engine; say which", param_hint="--address")
    with typed_errors():
        with unwinding(), progress() as watch:
            watch("load", 0, None, "")
            from sf_pipelines.api import build_snapshot

            settings = read_config(config, endpoint_url)
            where = None if engine is None else {"type": engine, **({} if address is None else {"address": address})}
            result = build_snapshot(settings, engine=where, progress=watch, force=force)
        if as_json:
            _print_build(result, settings)
        else:
            _show_build(Console(), result, settings)


def _print_build(result: "BuildResult", settings: WriteConfig) -> None:
    shards = [{"db_id": shard.db_id, "rows": shard.rows, "bytes": shard.bytes} for shard in result.shards]
    verdicts = [
        {"name": one.name, "passed": one.passed, "severity": one.severity, "message": one.message}
        for one in result.verdicts
    ]
    facts = {name: getattr(result, name) for name in result.__dataclass_fields__}
    print_json(
        {
            **facts,
            "store": settings.store,
            "k": settings.recall_gate.k,
            "min_recall": settings.recall_gate.min_recall,
            "bytes": sum(shard.bytes for shard in result.shards),
            "shards": shards,
            "curve": [point.model_dump() for point in result.curve],
            "verdicts": verdicts,
        }
    )


def _show_build(out: Console, result: "BuildResult", settings: WriteConfig) -> None:
    if not result.published:
        text = f"Up to date: {result.run_id} was built from this source and config. (--force builds again.)"
        held = result.reason[:1].upper() + result.reason[1:]
        out.print(escape(held) if result.held else text, highlight=False, soft_wrap=True)
        return
    out.print(f"Published {result.run_id} (seq {result.seq}) at {escape(settings.store)}", highlight=False)
    seconds, gate = sum(result.durations.values()), settings.recall_gate
    stored = sum(shard.bytes for shard in result.shards)
    facts = {
        "rows": f"{result.rows:,} in {len(result.shards)} shards, {result.rejected:,} rejected, {size(stored)}",
        f"recall@{gate.k}": f"{recall_text(result.recall, result.recall_lower)} (95 % confidence; gate "
        f"{gate.min_recall}), asking {result.num_probes} of {len(result.shards)} shards",
        **({"shards": result.sizing} if result.sizing else {}),
        "time": f"{seconds:.2f} s, {result.rows / seconds:,.0f} vectors/s",
        "manifest": result.manifest_ref,
    }
    print_facts(out, facts)
    for verdict in result.verdicts:
        if not verdict.passed:
            out.print(f"  [yellow]warning[/] {verdict.name}: {safe(verdict.message)}", highlight=False, soft_wrap=True)


@commands.command("verify")
def verify(
    store: Store,
    manifest: Annotated[
        str | None, typer.Option(help="Key of a manifest, as history --json shows it; default: the current one.")
    ] = None,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Hash every object again, open every shard, count rows, measure recall. Exit code 1 when anything is off."""
    from sf_pipelines.snapshot.operations.verify import verify_snapshot

    with typed_errors(), progress() as watch:
        found = verify_snapshot(store, s3=s3_options(endpoint_url), manifest_key=manifest, progress=watch)
    if as_json:
        print_json(found, passed=found.passed)
    else:
        _show_verification(Console(), found)
    if not found.passed:
        raise typer.Exit(FAILED)


def _show_verification(out: Console, found: "Verification") -> None:
    judged, now = found.judged, "not measured"
    if found.recall is not None:
        now = f"{recall_text(found.recall, found.recall_lower)}, of other queries, drawn from its rows for this look"
    asked = "" if judged is None else f"; gate {judged.min_recall}), asking {judged.num_probes} shards"
    facts = {
        "run": found.run_id,
        "hashed": f"{found.objects:,} objects, {size(found.bytes)}",
        "counted": f"{found.rows:,} rows in {found.shards} shards",
        f"recall@{found.k}": "not recorded"
        if judged is None
        else f"{recall_text(judged.recall, judged.lower)} (95 % confidence{asked}, judged before it was published",
        "measured now": now,
    }
    print_facts(out, facts)
    for fault in found.faults:
        out.print(f"[red]fault[/] {safe(fault)}", highlight=False, soft_wrap=True)
    count = len(found.faults)
    out.print("[green]all is well[/]" if found.passed else f"[red]{count} {'fault' if count == 1 else 'faults'}[/]")


# The YAML.


def read_config(path: Path, endpoint_url: str | None = None) -> WriteConfig:
    """The configuration that a file tells, with relative paths made absolute.

    Args:
        path: fields of ``WriteConfig``, or a component's file with ``type`` and ``attributes``.
        endpoint_url: in place of that of the file.

    Raises:
        ConfigError: the file, or a value in it, is wrong; names the field.
    """
    documents = [document for document in _documents(path) if document is not None]
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise ConfigError(f"{path} holds no fields; write WriteConfig's fields as YAML, such as name: products")
    components = [document for document in documents if "attributes" in document]
    if not components and len(documents) == 1:
        fields, root = _texts(documents[0]), path.parent
    else:
        fields, root = _of_component(path, components), _project_root(path)
    if endpoint_url is not None:
        given = fields.get("s3")
        fields["s3"] = {**(given if isinstance(given, dict) else {}), "endpoint_url": endpoint_url}
    return WriteConfig(**fields).below(root)


def _documents(path: Path) -> list[Any]:
    try:
        return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: byte {error.start} is none of it") from None
    except yaml.YAMLError as error:
        # The library quotes the file, where the next value may be a secret: not even as the cause.
        raise ConfigError(f"{path} is no YAML{_place_of(error)}") from None


def _place_of(error: yaml.YAMLError) -> str:
    """Where in the file and why, without what the file says there."""
    mark = getattr(error, "problem_mark", None)
    place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
    problem = re.sub(r"'(?!<)[^']{2,}'", "'…'", getattr(error, "problem", None) or "")
    return f"{place}: {problem}" if problem else place


def _texts(fields: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in fields.items()}


def _of_component(path: Path, components: list[dict[Any, Any]]) -> dict[str, Any]:
    """The fields of ``WriteConfig`` in a component's attributes; those of Dagster are named and left out."""
    if len(components) != 1 or not isinstance(components[0]["attributes"], dict):
        raise ConfigError(
            f"{path} holds {len(components)} components with attributes; build takes a file with one snapshot: move it "
            "into a file of its own"
        )
    fields = _filled_in(_texts(components[0]["attributes"]), "attributes")
    resource = fields.get("s3_resource")
    if isinstance(resource, dict) and fields.get("s3") is None:
        fields["s3"] = _credentials(resource)
    left = sorted(DAGSTER_FIELDS & set(fields))
    if left:
        said = f"only in Dagster: {', '.join(left)}"
        more = "; --engine says where it is built here" if "engine" in left else ""
        Console(stderr=True).print(f"  {said}{more}", highlight=False, soft_wrap=True)
    return {name: value for name, value in fields.items() if name not in DAGSTER_FIELDS}


def _filled_in(value: Any, where: str) -> Any:
    """A value with its templates filled in from the environment."""
    if isinstance(value, dict):
        return {name: _filled_in(part, f"{where}.{name}") for name, part in value.items()}
    if isinstance(value, list):
        return [_filled_in(part, f"{where}.{place}") for place, part in enumerate(value)]
    if not isinstance(value, str) or where.startswith(tuple(f"attributes.{name}" for name in DAGSTER_FIELDS)):
        return value

    def read(template: re.Match[str]) -> str:
        known = _ENV.fullmatch(template[1])
        if known is None:
            raise ConfigError(f"{where}: only Dagster can fill in {template[0]}; here {{{{ env.NAME }}}} is known")
        return _variable(known["dotted"] or known["called"], where, known["default"])

    return _TEMPLATE.sub(read, value)


def _variable(name: str, where: str, default: str | None = None) -> str:
    found = os.environ.get(name, default)
    if found is None:
        raise ConfigError(f"{where}: environment variable {name} is not set")
    return found


def _credentials(resource: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an ``S3Resource`` in the words of ``S3Options``."""
    return {_S3_FIELDS.get(name, name): value for name, value in _read_credentials(resource)}


def _read_credentials(resource: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in resource.items():
        where = f"attributes.s3_resource.{name}"
        if isinstance(value, dict) and set(value) == {"env"}:
            yield name, _variable(str(value["env"]), where)
        else:
            yield name, _filled_in(value, where.replace("s3_resource", "s3"))


def _project_root(path: Path) -> Path:
    """Root of the Dagster project that a component's file lies in, as ``dg`` finds it; else the file's folder."""
    for folder in path.resolve().parents:
        project = folder / "pyproject.toml"
        if (folder / "dg.toml").is_file() or (project.is_file() and "[tool.dg" in project.read_text(encoding="utf-8")):
            return folder
    return path.parent
