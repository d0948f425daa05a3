"""A snapshot as YAML: ``VectorSnapshotComponent``."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import dagster as dg
from pydantic import BaseModel, ValidationInfo, create_model, field_validator

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

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What editors and ``dg`` show."""
        schema = VectorSnapshotAttributes.model_json_schema(*args, **kwargs)
        for model in (schema, *schema.get("$defs", {}).values()):
            if "properties" in model:
                model["properties"] = {name: _or_template(field) for name, field in model["properties"].items()}
        return schema


def _or_template(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field that may also be filled in from the environment; what describes it stays outside."""
    described = {name: field[name] for name in ("title", "description", "default") if name in field}
    bare = {name: value for name, value in field.items() if name not in described}
    return {**described, "anyOf": [bare, _TEMPLATE]}


def _yaml_model() -> type[BaseModel]:
    """The same fields with open types: a value may be a template, and is checked when that is filled in."""
    fields: dict[str, Any] = {
        name: (Any, ... if field.is_required() else None)
        for name, field in VectorSnapshotAttributes.model_fields.items()
    }
    return create_model("VectorSnapshotComponentModel", __base__=_OpenModel, **fields)


_MODEL = _yaml_model()


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
            ConfigError: a field is unknown or its value wrong; names file, line and field.
        """
        values = _filled_in(model.model_dump(exclude_unset=True), context)
        try:
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
        for name in ("source", "store"):
            if "://" not in fields[name]:
                fields[name] = str(project_root / Path(fields[name]).expanduser())
        return WriteConfig(**fields)

    @property
    def options(self) -> SnapshotOptions:
        """How the snapshot sits in Dagster."""
        return SnapshotOptions(**{name: getattr(self.attributes, name) for name in SnapshotOptions.model_fields})


def _filled_in(value: Any, context: dg.ResolutionContext) -> Any:
    """A value with its templates filled in; text that is none stays as it is, where Dagster makes ``"2"`` a number."""
    if isinstance(value, dict):
        return {name: _filled_in(part, context) for name, part in value.items()}
    if isinstance(value, list):
        return [_filled_in(part, context) for part in value]
    return context.resolve_value(value) if isinstance(value, str) and "{{" in value else value


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
