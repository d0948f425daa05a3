"""A snapshot as YAML: ``VectorSnapshotComponent``."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import dagster as dg
from dagster.components.resolved.errors import ResolutionException
from dagster.components.resolved.scopes import EnvScope
from pydantic import BaseModel, ConfigDict, ValidationInfo, create_model, field_validator

from sf_pipelines.components.scaffolder import VectorSnapshotScaffolder
from sf_pipelines.orchestration import SnapshotOptions, build_snapshot_defs
from sf_pipelines.orchestration.graph import Done, StageContext, execute_stage
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError

_TEMPLATE = {"type": "string", "pattern": r"^\{\{.*\}\}$"}


class VectorSnapshotAttributes(SnapshotOptions, WriteConfig):
    """Fields of ``WriteConfig`` (what is built), and of ``SnapshotOptions`` (how it sits in Dagster)."""

    @field_validator("s3_resource")
    @classmethod
    def _credentials_are_given_once(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("s3") is not None:
            raise ValueError("s3 and s3_resource both give credentials; leave one of them out")
        return value


class _OpenModel(dg.Model):
    """A YAML model whose schema is that of ``VectorSnapshotAttributes``, with a template allowed for every value."""

    # ``VectorSnapshotAttributes`` checks fields: Dagster's own errors quote what was written, which may be a secret.
    model_config = ConfigDict(extra="allow")

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What editors and ``dg`` show."""
        schema = VectorSnapshotAttributes.model_json_schema(*args, **kwargs)
        models = schema.get("$defs", {})
        for model in (schema, *models.values()):
            if "properties" in model:
                fields = model["properties"].items()
                model["properties"] = {name: _or_template(field, models) for name, field in fields}
        return schema


def _or_template(field: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field that may also be filled in from the environment; what describes it stays outside.

    ``anyOf`` is what tools show and refuses nothing: its error would be "not valid under any of the given schemas".
    ``else`` judges, and its errors name the field inside that is wrong.
    """
    described = {name: field[name] for name in ("title", "description", "default") if name in field}
    bare = {name: value for name, value in field.items() if name not in described}
    return {**described, "anyOf": [*_alternatives(bare), {}], "if": _TEMPLATE, "else": _by_type(bare, models)}


def _by_type(field: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """The same schema with its alternatives chosen by the type of the value."""
    by_type: dict[str, list[dict[str, Any]]] = {}
    for one in _alternatives(field):
        kind = _model_of(one, models).get("type")
        if kind is None:
            return field
        by_type.setdefault(kind, []).append(one)
    if len(by_type) == 1 and len(_alternatives(field)) == 1:
        return field
    chosen = [
        {"if": {"type": kind}, "then": several[0] if len(several) == 1 else _by_tag(several, models)}
        for kind, several in by_type.items()
    ]
    return {"type": list(by_type), "allOf": chosen}


def _by_tag(alternatives: list[dict[str, Any]], models: dict[str, Any]) -> dict[str, Any]:
    """Models that a field with a fixed value tells apart, such as ``strategy``; the first is that without it."""
    tagged = [_constants(_model_of(one, models)) for one in alternatives]
    tag = next(iter(tagged[0]), None)
    if tag is None:
        return {"anyOf": alternatives}
    named = [
        {"if": {"required": [tag], "properties": {tag: {"const": values[tag]}}}, "then": one}
        for values, one in zip(tagged, alternatives, strict=True)
    ]
    known = {"properties": {tag: {"if": _TEMPLATE, "else": {"enum": [values[tag] for values in tagged]}}}}
    unnamed = {"if": {"not": {"required": [tag]}}, "then": alternatives[0]}
    return {"allOf": [known, unnamed, *named]}


def _constants(model: dict[str, Any]) -> dict[str, Any]:
    """Fields of a model that have one value only, and that value; with or without a template allowed."""
    bare = {name: field.get("anyOf", [field])[0] for name, field in model.get("properties", {}).items()}
    return {name: field["const"] for name, field in bare.items() if "const" in field}


def _alternatives(field: dict[str, Any]) -> list[dict[str, Any]]:
    several = field.get("anyOf", field.get("oneOf"))
    return [field] if several is None else [part for one in several for part in _alternatives(one)]


def _model_of(field: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    return models[field["$ref"].removeprefix("#/$defs/")] if "$ref" in field else field


# The same fields with open types: a value may be a template, and is checked when that is filled in.
_FIELDS: dict[str, Any] = dict.fromkeys(VectorSnapshotAttributes.model_fields, (Any, None))
_MODEL = create_model("VectorSnapshotComponentModel", __base__=_OpenModel, **_FIELDS)


@dg.scaffold_with(VectorSnapshotScaffolder)
class VectorSnapshotComponent(dg.Component, dg.Resolvable):
    """A recall-gated vector snapshot: assets, checks, the job that builds it, its schedule and sensors.

    To add something to what a stage does, override ``execute``.

    Attributes:
        attributes: the fields of the YAML.
    """

    def __init__(self, attributes: VectorSnapshotAttributes) -> None:
        self.attributes = attributes

    @classmethod
    def model(cls) -> type[BaseModel]:
        """What the YAML may say."""
        return _MODEL

    @classmethod
    def resolve_from_model(cls, context: dg.ResolutionContext, model: BaseModel) -> Self:
        """Fills in templates and checks every value.

        Raises:
            ConfigError: a field is unknown, its value wrong or its template cannot be filled in; names file, line and
                field.
        """
        if isinstance(context.scope.get("env"), EnvScope):
            context = context.with_scope(env=_Environment())
        try:
            values = _filled_in(model.model_dump(exclude_unset=True), context, VectorSnapshotAttributes.__name__)
            return cls(VectorSnapshotAttributes(**values))
        except ConfigError as error:
            # The causes say the same again, without the line.
            raise ConfigError(_located(str(error), context)) from None

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """The definitions; relative paths are taken from the project's root, wherever Dagster was started."""
        return build_snapshot_defs(self.config(context.project_root), self.options, execute=self.execute)

    def execute(self, context: StageContext, stage: str, work: Callable[[], Done]) -> Done:
        """Does the work of one stage, in the step's process; override it to add something before or after.

        Args:
            context: of the step.
            stage: ``scan``, ``sample``, ``train``, ``route``, ``build_shard``, ``assemble``, ``check`` or ``promote``.
            work: does it and returns the receipt (of ``build_shard`` those of its shards: one, or on an engine all of
                the run; of ``check`` the verdict), which must be returned.
        """
        return execute_stage(context, stage, work)

    def config(self, project_root: Path) -> WriteConfig:
        """The snapshot's configuration with absolute paths."""
        fields = {name: getattr(self.attributes, name) for name in WriteConfig.model_fields}
        return WriteConfig(**fields).below(project_root)

    @property
    def options(self) -> SnapshotOptions:
        """How the snapshot sits in Dagster."""
        return SnapshotOptions(**{name: getattr(self.attributes, name) for name in SnapshotOptions.model_fields})


class _Environment:
    """``env`` of templates. Dagster's own fills in "None" for a variable that is not set, as in ``s3://None/rows``."""

    def __call__(self, name: str, default: Any = ...) -> Any:
        return os.environ.get(name, self._missing(name) if default is ... else default)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("jinja"):
            # It asks this way whether a function wants to know more.
            raise AttributeError(name)
        return self(name)

    def _missing(self, name: str) -> Any:
        """An error where the value is used, unless the template has something to use in its place."""
        from jinja2 import Undefined

        class Missing(Undefined):
            __str__ = Undefined._fail_with_undefined_error  # noqa: SLF001

        return Missing(f"environment variable {name} is not set; where it may be missing: env('{name}', 'default')")


def _filled_in(value: Any, context: dg.ResolutionContext, field: str) -> Any:
    """A value with its templates filled in; text that is none stays as it is, where Dagster makes ``"2"`` a number."""
    if isinstance(value, dict):
        return {name: _filled_in(part, context, f"{field}.{name}") for name, part in value.items()}
    if isinstance(value, list):
        return [_filled_in(part, context, f"{field}.{number}") for number, part in enumerate(value)]
    if not isinstance(value, str) or "{{" not in value:
        return value
    try:
        return context.resolve_value(value)
    except ResolutionException as error:
        # Before its last line are the loader's own frames, and the wrong place.
        reason = str(error).strip().splitlines()[-1].removeprefix("UndefinedError: ")
    raise ConfigError(f"{field}: its template cannot be filled in: {reason}")


def _located(message: str, context: dg.ResolutionContext) -> str:
    """The message with file and line before each field that it names."""
    tree = context.source_position_tree
    owner = re.escape(VectorSnapshotAttributes.__name__)

    def place(match: re.Match[str]) -> str:
        field = f"attributes{match[1]}"
        if tree is None:
            return f"{field}: "
        path: list[str | int] = [int(part) if part.isdigit() else part for part in field.split(".")]
        position, _ = tree.lookup_closest_and_path(path, trace=None)
        return f"{position}: {field}: "

    return re.sub(rf"\b{owner}((?:\.\w+)*): ", place, message)
