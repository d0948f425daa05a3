"""How times and JSON are written and read in manifests, pointers and run records."""

import json
import math
from datetime import UTC, datetime
from typing import Any

# Numbers above this are taken as milliseconds, as readers of the format do.
_SECONDS_LIMIT = 2e10


def timestamp(moment: datetime) -> str:
    """A moment as the format writes it: UTC, always six fractional digits, ``Z``."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_moment(value: Any) -> datetime:
    """A moment from ISO text, a number of seconds (or milliseconds) since 1970, or a datetime.

    Returns:
        Aware, in UTC; what names no zone is taken as UTC.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | datetime):
        raise ValueError(f"is no ISO datetime: {value!r}")  # noqa: TRY004 - pydantic turns only ValueError into its own
    try:
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value / 1000 if abs(value) > _SECONDS_LIMIT else value, UTC)
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (OverflowError, OSError, ValueError) as error:
        raise ValueError(f"is no ISO datetime: {value!r:.80}") from error


def dump_json(value: Any) -> str:
    """Compact JSON with sorted keys.

    Raises:
        ValueError: it holds NaN, infinity, or something that JSON cannot say.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def load_json(text: str | bytes) -> Any:
    """JSON from somebody else.

    Raises:
        ValueError: it is no JSON, or says NaN, infinity, a key twice, or nests too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError("nests too deeply") from error


def _refuse(name: str) -> Any:
    raise ValueError(f"holds {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds a number that is too large: {text:.40}")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"names the key {repeated!r:.80} twice")
    return result
