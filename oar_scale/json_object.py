"""The type of a JSON object: what stage markers, manifests, notes and ``KEY.json`` members are once they have been parsed."""

from __future__ import annotations

import json
from typing import Any

JsonObject = dict[str, Any]
"""A JSON object, parsed or about to be written. Its values may be anything JSON has; a reader checks what it uses."""


def parse_object(data: str | bytes) -> JsonObject:
    """Parse a JSON object. Raises ValueError for anything else: a file that was cut, or is empty, or holds another value."""
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, not {type(value).__name__}")
    return value
