"""Payloads as stored: JSON text."""

import json
from typing import Any


def parse_payload(text: Any) -> dict[str, Any] | None:
    """The object that a stored payload says; what is no JSON object is no payload."""
    if not isinstance(text, str):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
