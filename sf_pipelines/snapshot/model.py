"""The base of every pydantic model in the package."""

import hashlib
import json
from collections.abc import Collection
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from sf_pipelines.snapshot.errors import ConfigError, without_secrets

# Of pydantic's errors: a model was wanted and something else given, which may have anything in it.
_NO_MODEL = ("model", "dict", "union_tag")
_PLAIN = (str, bytes, int, float)


class Model(BaseModel):
    """Frozen, and an unknown field is an error."""

    # Pydantic's own error, which is the cause of ours, shows no value: one may be a secret.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ConfigModel(Model):
    """A model that users fill in: a wrong value is a ``ConfigError`` that names the field and the value.

    Attributes:
        secretive: whether a field holds a secret. Then no value of any field is shown: a secret that was put into the
            wrong field is one, too.
    """

    secretive: ClassVar[bool] = False

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            fields = type(self).model_fields.items()
            hidden = {name for name, field in fields if self.secretive or _may_hold_secrets(field.annotation)}
            raise ConfigError(describe_validation(type(self).__name__, error, hidden)) from error


def _may_hold_secrets(kind: Any) -> bool:
    """Whether values of a field of this type are, or have in them, a secretive model."""
    if isinstance(kind, type) and issubclass(kind, ConfigModel):
        return kind.secretive
    return any(map(_may_hold_secrets, get_args(kind)))


def describe_validation(owner: str, error: ValidationError, hidden: Collection[str] = ()) -> str:
    """One line per wrong field: ``WriteConfig.num_dbs: should be greater than 0 (got 0)``.

    Args:
        owner: what the fields are of.
        error: pydantic's.
        hidden: fields whose values are not shown. That of a field that nobody knows never is: it may be a secret, as
            any field's name is misspelt sometimes.
    """
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
        silent = item["type"] in {"missing", "extra_forbidden"} or not fields or fields[0] in hidden
        lines.append(f"{where}: {message}" + ("" if silent else f" (got {_shown(item['type'], item['input'])})"))
    return "; ".join(lines)


def _shown(kind: str, value: Any) -> str:
    parts = value if isinstance(value, list | tuple) else [value]
    if kind.startswith(_NO_MODEL) or not all(part is None or isinstance(part, _PLAIN) for part in parts):
        return f"a {type(value).__name__}"
    shown = without_secrets(repr(value))
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _inside(where: str, line: str) -> str:
    """A line about a nested model, told from the outer one: ``VectorSpec.dim: …`` becomes ``….vector_spec.dim: …``."""
    field, colon, message = line.partition(": ")
    if not colon or " " in field:
        # The rest of a message with a semicolon.
        return line
    _, dot, inner = field.partition(".")
    return f"{where}{dot}{inner}: {message}"


def digest_json(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
