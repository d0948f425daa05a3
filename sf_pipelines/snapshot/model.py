"""The base of every pydantic model in the package."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sf_pipelines.snapshot.errors import ConfigError


class Model(BaseModel):
    """Frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ConfigModel(Model):
    """A model that users fill in: a wrong value is a ``ConfigError`` that names the field and the value."""

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(describe_validation(type(self).__name__, error)) from error


def describe_validation(owner: str, error: ValidationError) -> str:
    """One line per wrong field: ``WriteConfig.num_dbs: should be greater than 0 (got 0)``."""
    lines: list[str] = []
    for item in error.errors(include_url=False):
        # A union's members add their own names to the location; a user knows only the field.
        fields = [str(part) for part in item["loc"] if isinstance(part, int) or str(part).isidentifier()]
        where = ".".join([owner, *fields])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            lines.extend(_inside(where, line) for line in str(cause).split("; "))
            continue
        message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if item["type"] == "extra_forbidden":
            message = "unknown field"
        silent = item["type"] == "missing" or not fields
        shown = repr(item["input"])
        lines.append(
            f"{where}: {message}" + ("" if silent else f" (got {shown if len(shown) <= 80 else shown[:77] + '...'})")
        )
    return "; ".join(lines)


def _inside(where: str, line: str) -> str:
    """A line about a nested model, told from the outer one: ``VectorSpec.dim: …`` becomes ``….vector_spec.dim: …``."""
    field, colon, message = line.partition(": ")
    if not colon or " " in field:
        # The rest of a message with a semicolon.
        return line
    _, dot, inner = field.partition(".")
    return f"{where}{dot}{inner}: {message}"
