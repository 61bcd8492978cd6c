"""oar_scale: ordered autoregressive image generation, trained at scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oar_scale.generation.pretrained import Pretrained

__version__ = "0.1.0"


def load(path: str, model: str | None = None) -> Pretrained:
    """An exported folder, a run's folder or a model file, ready to draw (``oar_scale.generation.pretrained``).

    Args:
        path: local, ``s3://``, or of an exported folder ``hf://owner/name[@revision][/folder]``.
        model: of a run's folder: ``ordered`` by default, ``any_order``, ``control`` or ``base``.

    Raises:
        UserError: nothing to load, or parts that do not fit together.
    """
    from oar_scale.generation.pretrained import load_pretrained  # brings torch, which reading a recipe does without

    return load_pretrained(path, model)
