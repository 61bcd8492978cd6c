"""What precomputed text features are, as a manifest notes it. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class TextFeatures(BaseModel):
    """The kind of the ``KEY.features.npy`` of a folder: float16 [at most rows, width], made by a frozen text tower."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tower_id: str
    """Content hash of the tower's weights."""
    rows: int
    width: int
