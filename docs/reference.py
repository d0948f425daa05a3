"""Writes the YAML reference from the models: ``python docs/reference.py docs/reference.md``.

Types, limits and defaults are those that pydantic checks; the meaning of a field is in its model's docstring.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import dagster as dg
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from sf_pipelines.orchestration.options import SnapshotOptions
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError

_HEAD = """\
# YAML reference

<!-- Written by `make docs` from the models; change their docstrings, not this page. -->

The attributes of `sf_pipelines.components.VectorSnapshotComponent` are the fields of [WriteConfig](#writeconfig) (what
is built; the command line's file and Python have the same) and of [SnapshotOptions](#snapshotoptions) (how it sits in
Dagster). The other tables are the fields of these. *required* has no default. Every value may be a template,
`"{{ env('NAME') }}"`, filled in when the definitions are loaded.
"""

_NAMES: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    SecretStr: "text (secret)",
    bytes: "bytes",
    dg.ExecutorDefinition: "in Python an `ExecutorDefinition`",
}
_LIMITS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def reference() -> str:
    """The page as Markdown."""
    models = models_of(WriteConfig, SnapshotOptions)
    return "\n".join([_HEAD, *(line for model in models for line in _section(model))])


def models_of(*roots: type[BaseModel]) -> list[type[BaseModel]]:
    """Models, each followed by those that its fields are made of; none twice."""
    return list(dict.fromkeys(model for root in roots for model in _with_parts(root)))


def _with_parts(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model, then those that its fields are made of."""
    yield model
    for field in model.model_fields.values():
        for part in _models_in(field.annotation):
            yield from _with_parts(part)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def described(model: type[BaseModel]) -> dict[str, str]:
    """What the docstring says of each field, on one line."""
    attributes = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _section(model: type[BaseModel]) -> Iterator[str]:
    told = described(model)
    about = inspect.cleandoc(model.__doc__ or "").partition("\n\nAttributes:")[0]
    yield f"## {model.__name__}\n"
    yield f"{_markdown(about)}\n"
    yield "| Field | Type | Default | Meaning |\n|---|---|---|---|"
    for name, field in model.model_fields.items():
        meaning = told.get(name)
        fixed = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        if meaning is None and len(fixed) == 1:
            # What tells the members of a union apart needs no words.
            meaning = "names the kind."
        if meaning is None:
            raise ConfigError(f"{model.__name__}.{name} is not described: say what it means under Attributes")
        cells = (f"`{name}`", _type(field.annotation, field.metadata), _default(field), _markdown(meaning))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _markdown(text: str) -> str:
    # YAML's word for Python's.
    return re.sub(r"\bNone\b", "null", text.replace("``", "`"))


def _type(annotation: Any, metadata: Any = ()) -> str:
    """A type in words, with its limits."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(args[0], (*args[1:], *metadata))
    limits = _limits(metadata)
    if origin in {Union, UnionType}:
        # That it may be left out is told by the default.
        named = " or ".join(dict.fromkeys(_type(arg) for arg in args if arg is not NoneType))
    elif origin is Literal:
        named = ", ".join(f"`{value}`" for value in args)
    elif origin in {tuple, list}:
        named = f"list of {_type(args[0])}"
    elif origin is dict:
        named = f"map of {_type(args[0])} to {_type(args[1])}"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        named = f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    elif isinstance(annotation, type) and issubclass(annotation, Enum):
        named = ", ".join(f"`{member.value}`" for member in annotation)
    else:
        named = _word(annotation)
    return f"{named}{limits}"


def _word(annotation: Any) -> str:
    if annotation not in _NAMES:
        raise ConfigError(f"the reference has no word for the type {annotation!r}: add one to _NAMES")
    return _NAMES[annotation]


def _limits(metadata: Any) -> str:
    parts = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    found = [
        f"{sign} {getattr(part, name):,}" for part in parts for name, sign in _LIMITS.items() if hasattr(part, name)
    ]
    return f", {', '.join(found)}" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "its own"
    if isinstance(value, Enum):
        value = value.value
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f"`{value}`"


def main() -> None:
    """Writes the page to the path that is given."""
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
