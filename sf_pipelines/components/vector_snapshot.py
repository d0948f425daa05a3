"""A snapshot as YAML: ``VectorSnapshotComponent``."""

from pathlib import Path
from typing import Any, Literal, Self

import dagster as dg
from pydantic import BaseModel, create_model

from sf_pipelines.components.scaffolder import VectorSnapshotScaffolder
from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines.orchestration.shards import BackfillMode
from sf_pipelines.snapshot.config import WriteConfig


class VectorSnapshotAttributes(WriteConfig):
    """Fields of ``WriteConfig``, and how the snapshot sits in Dagster.

    Attributes:
        source_assets: keys of the assets that write the source, as in ``lake/products``.
        refresh_source: whether the job ``build_<name>`` materializes them too.
        backfill: whether a backfill of several shards is one run or one run a shard.
    """

    source_assets: tuple[str, ...] = ()
    refresh_source: bool = False
    backfill: Literal["single_run", "run_per_shard"] = "single_run"


class _OpenModel(dg.Model):
    """A YAML model whose schema is that of ``VectorSnapshotAttributes``, with a template allowed for every value."""

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What editors and ``dg`` show."""
        schema = VectorSnapshotAttributes.model_json_schema(*args, **kwargs)
        template = {"type": "string", "pattern": r"^\{\{.*\}\}$"}
        schema["properties"] = {
            name: field if field.get("type") == "string" else {"anyOf": [field, template]}
            for name, field in schema["properties"].items()
        }
        return schema


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
    """A recall-gated vector snapshot: assets, checks and the job that builds it, from the fields of ``WriteConfig``.

    Attributes:
        attributes: the fields.
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
            ConfigError: a field is unknown or its value wrong; names the field.
        """
        return cls(VectorSnapshotAttributes(**context.resolve_value(model.model_dump(exclude_unset=True))))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """The definitions; relative paths are taken from the project's root, wherever Dagster was started."""
        own: dict[str, Any] = {name: getattr(self.attributes, name) for name in _OWN_FIELDS}
        backfill: BackfillMode = own.pop("backfill")
        return build_snapshot_defs(self.config(context.project_root), backfill=backfill, **own)

    def config(self, project_root: Path) -> WriteConfig:
        """The snapshot's configuration with absolute paths."""
        fields = {name: getattr(self.attributes, name) for name in WriteConfig.model_fields}
        for name in ("source", "store"):
            if "://" not in fields[name]:
                fields[name] = str(project_root / Path(fields[name]).expanduser())
        return WriteConfig(**fields)


_OWN_FIELDS = tuple(name for name in VectorSnapshotAttributes.model_fields if name not in WriteConfig.model_fields)
