"""The type of a JSON object: what stage markers, manifests, notes and ``KEY.json`` members are once they have been parsed."""

from __future__ import annotations

from typing import Any

JsonObject = dict[str, Any]
"""A JSON object, parsed or about to be written. Its values may be anything JSON has; a reader checks what it uses."""
