"""From pixels to the PNGs that clients get. Called in threads of their own: a large picture takes seconds."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from oar_scale.generation.canvas import to_picture
from oar_scale.generation.picture_files import encode_png
from oar_scale.generation.pretrained import Pretrained
from oar_scale.generation.seen_codes import pixels_of
from oar_scale.serve.jobs import Result
from oar_scale.serve.requests import data_url
from oar_scale.serve.tasks import Task

IMAGES = "/api/images/"
"""Where results are fetched."""


@dataclass(frozen=True)
class Drawn:
    """An image whose codes are all there, decoded."""

    image_3SS: Tensor
    row: int
    """Its place among the images of its job."""
    number: int
    order: list[int]
    scores: list[float]
    known: int
    """So many of the first cells of ``order`` were known, and not drawn."""


def finished(drawer: Pretrained, task: Task, drawn: Drawn) -> Result:
    """The PNG, with a record of how it was drawn. Of an edit: the drawing in its picture."""
    picture = to_picture(drawn.image_3SS)
    edit: dict[str, str | int | float | bool | None] | None = None
    if task.uploads:
        upload, shown = task.uploads[drawn.row // task.count], task.shown[drawn.row // task.count]
        redrawn_N = torch.ones(len(drawn.order), dtype=torch.bool)
        redrawn_N[drawn.order[: drawn.known]] = False
        redrawn_SS = pixels_of(redrawn_N, len(shown.marked_SS))
        picture = upload.canvas().finish(shown.pixels_3SS, drawn.image_3SS, redrawn_SS, task.options.feather or 0.0)
        edit = {"strength": task.options.strength, "feather": task.options.feather}
    record = drawer.record(
        task.prompt, drawn.number, task.settings, seed=task.seed, order=task.order, kind=task.kind, size=picture.size, edit=edit
    )
    name = secrets.token_urlsafe(16)
    about = {
        "url": f"{IMAGES}{name}.png",
        "seed": task.seed,
        "number": drawn.number,
        "order": drawn.order,
        "scores": drawn.scores,
        "drawn": drawn.order[drawn.known :],
    }
    return Result(name, encode_png(picture, record), f"{picture.width}x{picture.height}", about)


def preview(image_3SS: Tensor, placed_N: Tensor) -> str:
    """The square so far, transparent where it is empty, as a data URL."""
    picture = to_picture(image_3SS)
    picture.putalpha(Image.fromarray(pixels_of(placed_N, picture.width).numpy()).convert("L"))
    return data_url(encode_png(picture, None))
