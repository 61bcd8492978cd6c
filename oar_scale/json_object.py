"""The type of a JSON object: what stage markers, manifests, notes and ``KEY.json`` members are once they have been parsed."""

from __future__ import annotations

import json
import math
from typing import Any

JsonObject = dict[str, Any]
"""A JSON object, parsed or about to be written. Its values may be anything JSON has; a reader checks what it uses."""


class NoObject(ValueError):
    """JSON, but no object."""


def parse_json(data: str | bytes) -> Any:
    """Parse any JSON value. Raises ValueError for what is none, or is nested without end."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_object(data: str | bytes) -> JsonObject:
    """Parse a JSON object: UTF-8, or UTF-16 or UTF-32, with a byte order mark or without.

    Raises:
        NoObject: another value.
        ValueError: no JSON: a file that was cut, or is empty, or nested without end.
    """
    value = parse_json(data)
    if not isinstance(value, dict):
        raise NoObject(f"a JSON object was expected, not {type(value).__name__}")
    return value


def without_nan(value: object) -> object:
    """A JSON value in which null stands for what is no finite number: Python reads and writes ``NaN``, JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    return [without_nan(each) for each in value] if isinstance(value, list | tuple) else value
