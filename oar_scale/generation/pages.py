"""Pictures that take more than one drawing: regions with prompts of their own, and windows of large pictures.

    picture, regions  --steps-->  (box, pixels to be drawn, prompt), one after the other
                                          canvas: what is in the box, with all that is not known by now hidden
                                          take:   what was drawn is part of the picture, and known to the next step

A picture on the model's square with one region is one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from oar_scale.errors import UserError
from oar_scale.generation.arguments import check_list
from oar_scale.generation.canvas import Box, Canvas, Mask, read_mask, upright_picture
from oar_scale.generation.windows import MAX_WINDOWS, plan_windows, too_many_windows
from oar_scale.tokenizers.prompts import Prompt


class Step(NamedTuple):
    """One drawing on the model's square."""

    box: Box
    """The part of the picture that the model sees."""
    drawn_HW: NDArray[np.bool_]
    """The pixels of it that are to be drawn."""
    prompt: int
    """Number of the prompt."""


@dataclass
class Page:
    """A picture while it is edited."""

    picture: Image.Image
    """Upright, with what was drawn so far."""
    unknown_HW: NDArray[np.bool_]
    """Its pixels that are still to be drawn."""
    steps: Sequence[Step]
    taken: int = 0
    """Steps that are done."""

    @classmethod
    def of(cls, picture: Image.Image, steps: Sequence[Step]) -> Page:
        """A picture before its first step."""
        unknown_HW = np.zeros((picture.height, picture.width), dtype=np.bool_)
        for (left, top, right, bottom), drawn_HW, _ in steps:
            unknown_HW[top:bottom, left:right] |= drawn_HW
        return cls(picture, unknown_HW, steps)

    def canvas(self, size: int) -> Canvas:
        """What the model is shown at the next step."""
        left, top, right, bottom = box = self.steps[self.taken].box
        picture = self.picture if self._whole(box) else self.picture.crop(box)
        return Canvas(picture, self.steps[self.taken].drawn_HW, size, self.unknown_HW[top:bottom, left:right].copy(), (left, top))

    def take(self, picture: Image.Image) -> None:
        """Put the drawing of the next step, the picture of its canvas, in its place."""
        left, top, right, bottom = box = self.steps[self.taken].box
        if self._whole(box):
            self.picture = picture
        else:
            if not self.taken:  # the picture may be that of other pages, too
                self.picture = self.picture.copy()
            self.picture.paste(picture, (left, top))
        self.unknown_HW[top:bottom, left:right] &= ~self.steps[self.taken].drawn_HW
        self.taken += 1

    def _whole(self, box: Box) -> bool:
        return box == (0, 0, *self.picture.size)


def make_pages(
    images: Sequence[Image.Image],
    masks: Sequence[Mask | list[Mask]],
    prompts: Sequence[Prompt | list[Prompt]],
    size: int,
    *,
    windows: bool,
) -> tuple[list[Page], list[Prompt]]:
    """Pictures with a mask and a prompt each, or with a list of both, and the prompts that their steps name by number.

    Raises:
        UserError: no lists of the same length, or as :func:`make_page`.
    """
    for name, given in (("images", images), ("masks", masks), ("prompts", prompts)):
        check_list(given, name)
    if not len(images) == len(masks) == len(prompts):
        raise UserError("images, masks and prompts are lists of the same length: one of each for every picture")
    pages, texts = list[Page](), list[Prompt]()
    for number, (image, mask, prompt) in enumerate(zip(images, masks, prompts, strict=True), 1):
        regions: list[Mask] = mask if isinstance(mask, list) else [mask]
        of_regions: list[Prompt] = prompt if isinstance(prompt, list) else [prompt]
        if len(regions) != len(of_regions):
            raise UserError(f"picture {number} has {len(regions)} masks and {len(of_regions)} prompts: one prompt for each region")
        rows = range(len(texts), len(texts) + len(of_regions))
        pages.append(make_page(image, regions, rows, size, f"picture {number}", windows=windows))
        texts += of_regions
    return pages, texts


def make_page(image: Image.Image, masks: Sequence[Mask], prompts: Sequence[int], size: int, where: str, *, windows: bool) -> Page:
    """A picture of any mode and size, and its regions. Arguments and errors as of ``canvas.make_canvas`` and :func:`plan_steps`."""
    picture, of = upright_picture(image, where), "the mask" if len(masks) == 1 else "mask {}"
    regions = [read_mask(mask, picture.size, f"{of.format(number)} of {where}") for number, mask in enumerate(masks, 1)]
    return Page.of(picture, plan_steps(regions, prompts, size, windows=windows, where=where))


def plan_steps(regions: Sequence[NDArray[np.bool_]], prompts: Sequence[int], size: int, *, windows: bool, where: str) -> list[Step]:
    """The steps of a picture: its regions in the order given, each as a whole or by windows.

    Args:
        regions: the pixels [H, W] of each, all of the same picture.
        prompts: the number of each region's prompt.
        size: side of the model's square. A picture that is no larger has no windows.
        where: names the picture in errors.

    Raises:
        UserError: two regions mark the same pixel, or there are too many windows.
    """
    _check_apart(regions, where)
    steps: list[Step] = []
    for region_HW, prompt in zip(regions, prompts, strict=True):
        height, width = region_HW.shape
        if windows and max(height, width) > size:
            steps.extend(Step(box, drawn_HW, prompt) for box, drawn_HW in plan_windows(region_HW, size, where))
        elif region_HW.any():
            steps.append(Step((0, 0, width, height), region_HW, prompt))
    if len(steps) > MAX_WINDOWS:  # of all regions
        raise too_many_windows(len(steps), size, where)
    return steps


def _check_apart(regions: Sequence[NDArray[np.bool_]], where: str) -> None:
    for second in range(1, len(regions)):
        for first in range(second):
            if both := int((regions[first] & regions[second]).sum()):
                raise UserError(f"{where}: regions {first + 1} and {second + 1} both mark {both} pixels. Mark each pixel in one of them.")
