"""The open_clip text tower: its properties, without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Features = Literal["tokens", "pooled"]


class ClipTextSpec(BaseModel):
    """The tower and the features taken from it; stored with a model that was trained on its features."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    """Name of a model in open_clip, e.g. ``ViT-L-14``."""
    features: Features = "tokens"
