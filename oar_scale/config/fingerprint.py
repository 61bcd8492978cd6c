"""One short name for a value: the hash of its canonical JSON."""

from __future__ import annotations

import hashlib
import json

from pydantic import BaseModel

from oar_scale.json_object import JsonObject


def fingerprint(value: BaseModel | JsonObject) -> str:
    """The first 16 hex digits of the SHA-256 of ``value`` as JSON with sorted keys."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
