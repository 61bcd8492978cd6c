"""Pictures side by side: a contact sheet as PNG, and an animation in which each appears cell by cell, in its order."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from oar_scale.data.images import MAX_PIXELS
from oar_scale.errors import UserError
from oar_scale.evaluation.animation import animated, appearing
from oar_scale.evaluation.pictures import contact_sheet, png, upscale
from oar_scale.generation.wanted_pictures import DrawnPicture
from oar_scale.results.examples import Picture

SHEET_PIXELS = 128
"""Side of a picture on a sheet, about: images are scaled by a whole factor."""
ANIMATED = 64
"""Pictures of an animation, at most."""
GAP = 8


def columns_of(drawn: Sequence[DrawnPicture]) -> int:
    """The drawings of a prompt are a row; where there is one of each, all pictures are a square, about."""
    count = 1 + max(each.wanted.variation for each in drawn)
    return count if count > 1 else math.ceil(math.sqrt(len(drawn)))


def check_sheet(pictures: int, side: int) -> None:
    """Raise UserError where a contact sheet of so many pictures of this side would be too large."""
    if pictures * (side * _factor(side) + GAP) ** 2 > MAX_PIXELS:
        raise UserError(f"a contact sheet of {pictures} pictures of {side} x {side} is too large: name a folder, --out FOLDER/")


def sheet_png(drawn: Sequence[DrawnPicture]) -> bytes:
    """The contact sheet of some pictures of one size."""
    pictures = [upscale(_pixels(each), _factor(each.picture.width)) for each in drawn]
    columns = columns_of(drawn)
    return png(contact_sheet([pictures[start : start + columns] for start in range(0, len(pictures), columns)], gap=GAP))


def frames_format(path: str, pictures: int) -> Literal["WEBP", "GIF"]:
    """The form of an animation. Raises UserError for another one, and for too many pictures."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".gif", ".webp"):
        raise UserError(f"--frames {path}: an animation is a .gif or a .webp")
    if pictures > ANIMATED:
        raise UserError(f"--frames {path}: {pictures} pictures are too many for one animation (at most {ANIMATED}): give fewer prompts")
    return "GIF" if ending == ".gif" else "WEBP"


def frames_file(drawn: Sequence[DrawnPicture], file_format: Literal["WEBP", "GIF"]) -> bytes:
    """The animation of some pictures."""
    order_SN = torch.stack([each.order_N for each in drawn]).numpy().astype(np.uint16)
    return animated(appearing([_pixels(each) for each in drawn], order_SN, columns_of(drawn), SHEET_PIXELS), file_format)


def _factor(side: int) -> int:
    return max(1, SHEET_PIXELS // side)


def _pixels(drawn: DrawnPicture) -> Picture:
    return np.asarray(drawn.picture)
