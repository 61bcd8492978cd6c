"""Pictures and masks that clients send.

    bytes --header: how many pixels?--> decoded, once --> what the model sees of it, on its square --+--> kept, with the bytes
                                                                                                   |
    at the end: decoded again --> the drawing goes into it                                 the pixels are let go

So a job that waits holds little more than the files that it came with, whatever number of pixels they have. What is here takes time, and is
called in threads of its own (``worker.Worker.aside``), never where requests are served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from oar_scale.data.images import decode_upright
from oar_scale.errors import UserError
from oar_scale.generation.canvas import Canvas, Shown, read_mask
from oar_scale.serve.api_errors import ApiError, bad_request
from oar_scale.serve.limits import Limits

Marks = Literal["white", "transparent"]
"""What of a mask is drawn anew: white, as everywhere in oar_scale, or what is fully transparent, as at OpenAI."""


@dataclass(frozen=True)
class Upload:
    """A picture to be edited, in as little memory as it came in."""

    picture: bytes
    mask: bytes | None
    marks: Marks
    name: str
    """Of the picture, in errors."""
    everywhere: bool
    """Without a mask and without transparent pixels all of it is marked."""
    limits: Limits
    size: int
    """Of the model's square."""

    @property
    def bytes(self) -> int:
        """What it takes while it waits."""
        return len(self.picture) + len(self.mask or b"")

    def canvas(self) -> Canvas:
        """Decode it. Raises ApiError for what cannot be edited."""
        picture = _decoded(self.picture, self.name, self.limits)
        drawn_HW = self._drawn(picture)
        if not drawn_HW.any():
            raise bad_request(f"{'mask' if self.mask else self.name}: nothing is marked. {_HOW[self.marks]}", "mask")
        return Canvas(picture, drawn_HW, self.size)

    def _drawn(self, picture: Image.Image) -> NDArray[np.bool_]:
        if self.mask is not None:
            mask = _decoded(self.mask, "mask", self.limits)
            if self.marks == "white":
                return _white(mask, picture)
            if mask.size != picture.size:
                sizes = f"{mask.width} x {mask.height} pixels, {self.name} {picture.width} x {picture.height}"
                raise bad_request(f"mask has {sizes}: they must be the same", "mask")
            return _transparent(mask)
        drawn_HW = _transparent(picture)
        if drawn_HW.any():
            return drawn_HW
        if not self.everywhere:
            raise bad_request(
                f"mask is missing, and {self.name} has no fully transparent pixels: nothing says what is to be drawn. "
                "Send a mask, or a strength below 1 to draw that share of the whole picture.",
                "mask",
            )
        return ~drawn_HW


_HOW = {
    "white": "White is drawn, black is kept.",
    "transparent": "What is fully transparent is drawn, all else is kept.",
}


def prepare(upload: Upload, *, hide: bool) -> Shown:
    """What the model sees of it.

    Raises:
        ApiError: no picture, one that is too large, a mask that does not fit or marks nothing; one that marks everything, where ``hide``.
    """
    canvas = upload.canvas()
    if hide and canvas.drawn_HW.all():
        raise bad_request(
            "mask: the whole picture is marked, so nothing of it would be known. Draw from the prompt alone, or send a strength below 1.",
            "mask",
        )
    return canvas.shown(hide=hide)


def check_size(data: bytes, name: str, limits: Limits) -> None:
    """Raises ApiError for a file that is too large."""
    if len(data) > limits.upload_bytes:
        raise ApiError(413, f"{name} has {len(data)} bytes, the limit is {limits.upload_bytes}", param=name, code="image_too_large")


def _decoded(data: bytes, name: str, limits: Limits) -> Image.Image:
    try:
        return decode_upright(data, name, limits.pixels)
    except UserError as error:
        raise bad_request(str(error), name, "invalid_image") from error


def _transparent(picture: Image.Image) -> NDArray[np.bool_]:
    if picture.mode != "RGBA":
        return np.zeros((picture.height, picture.width), dtype=np.bool_)
    clear_HW: NDArray[np.bool_] = np.asarray(picture.getchannel("A")) == 0
    return clear_HW


def _white(mask: Image.Image, picture: Image.Image) -> NDArray[np.bool_]:
    try:
        return read_mask(mask, picture.size, "mask")
    except UserError as error:
        raise bad_request(str(error), "mask", "invalid_image") from error
