"""``oar edit``: parts of pictures in files are drawn anew, and the pictures written as PNG."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oar_scale.data.images import decode_upright
from oar_scale.errors import UserError
from oar_scale.generation.canvas import Canvas, Margins, Mask, expand, read_mask
from oar_scale.generation.editing import Edit, noise_numbers
from oar_scale.generation.picture_files import DrawingRecord, encode_png
from oar_scale.generation.pretrained import Pretrained, load_pretrained
from oar_scale.run.gpu_node import chosen_device
from oar_scale.storage import Missing, join, open_storage

PICTURES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """What the command line says."""

    images: Sequence[str]
    """Paths, or object URIs."""
    prompt: str
    mask: Sequence[str] | None
    """Pictures in black and white, one for all images or one for each. Of this, ``box`` and ``expand`` one says what is drawn."""
    box: tuple[int, int, int, int] | None
    expand: Margins | None
    model: str
    which: str | None
    variations: int
    strength: float
    feather: float
    seed: int
    device: str | None
    out: str


def edit_files(request: EditRequest, say: Callable[[str], None]) -> list[str]:
    """Draw what is marked in each picture, and write it as ``OUT/NAME.png``, or ``OUT/NAME-1.png`` and so on of several variations.

    A picture's noise depends on the seed and on its place in the list alone. Those written before an error stay.

    Returns:
        The files, in the order of the images.

    Raises:
        UserError: no such file, model or device; a mask of another size, that marks nothing or everything; a name that is taken.
    """
    targets = _targets(request)
    drawer = load_pretrained(request.model, request.which).to(chosen_device(request.device))
    if drawer.vq is None:
        raise UserError(f"{request.model}: a model without an image tokenizer cannot edit pictures. Name the folder of a run or an export.")
    written = []
    for start in range(0, len(request.images), PICTURES_AT_ONCE):
        at_once = range(start, min(start + PICTURES_AT_ONCE, len(request.images)))
        canvases = [_canvas(request, number, drawer.vq.spec.image_size) for number in at_once]
        edits = iter(_draw(drawer, request, canvases, at_once))
        for number, canvas in zip(at_once, canvases, strict=True):
            for target, edit in zip(targets[number], edits, strict=False):
                open_storage(target).write(target, encode_png(edit.picture, _record(drawer, request, number, edit)))
                written.append(target)
                say(f"{target}: {_about(canvas, edit)}")
    return written


def _draw(drawer: Pretrained, request: EditRequest, canvases: Sequence[Canvas], numbers: Sequence[int]) -> list[Edit]:
    return drawer.edit(
        [canvas.picture for canvas in canvases],
        [canvas.drawn_HW for canvas in canvases],
        [request.prompt] * len(canvases),
        variations=request.variations,
        strength=request.strength,
        feather=request.feather,
        seed=request.seed,
        numbers=numbers,
    )


def _canvas(request: EditRequest, number: int, size: int) -> Canvas:
    """A picture and what is marked in it. Raises UserError as :func:`edit_files`."""
    path = request.images[number]
    picture = decode_upright(_read(path), path)
    if request.expand:
        return Canvas(*expand(picture, request.expand, path), size)
    mask: Mask
    if request.mask:
        file = request.mask[number if len(request.mask) > 1 else 0]
        mask, where = decode_upright(_read(file), file), f"{file} (the mask of {path})"
    else:
        assert request.box is not None, "the command line asks for one of the two"
        mask, where = request.box, path
    drawn_HW: NDArray[np.bool_] = read_mask(mask, picture.size, where)
    if not drawn_HW.any():
        raise UserError(f"{where} marks nothing: white is drawn, black is kept")
    if drawn_HW.all():
        raise UserError(f"{where}: the whole picture is marked, so nothing of it would be known. To draw from the prompt alone: oar sample")
    return Canvas(picture, drawn_HW, size)


def _targets(request: EditRequest) -> list[list[str]]:
    """The files to write, for each picture."""
    masks = len(request.mask or "")
    if masks > 1 and masks != len(request.images):
        raise UserError(f"{masks} masks for {len(request.images)} pictures: give one for all of them, or one for each, in the same order")
    if request.out.lower().endswith(".png"):
        if len(request.images) > 1 or request.variations > 1:
            raise UserError(f"--out {request.out} is one file, and there will be more: name a folder")
        return [[request.out]]
    targets, taken = [], {os.path.realpath(path): path for path in [*request.images, *(request.mask or ())]}
    for path in request.images:
        stem = os.path.splitext(os.path.basename(path))[0]
        names = [f"{stem}.png"] if request.variations == 1 else [f"{stem}-{number}.png" for number in range(1, request.variations + 1)]
        targets.append([join(request.out, name) for name in names])
        for target in targets[-1]:
            if other := taken.get(os.path.realpath(target)):
                raise UserError(f"{target} would replace {other}, or its edit: take another --out for {path}")
            taken[os.path.realpath(target)] = path
    return targets


def _read(path: str) -> bytes:
    try:
        return open_storage(path).read(path)
    except Missing as error:
        raise UserError(f"{path}: no such file") from error


def _about(canvas: Canvas, edit: Edit) -> str:
    """How it came about, in one line."""
    (width, height), (left, top, right, bottom) = canvas.picture.size, canvas.inner
    drawn = f"{int(edit.squares[0].drawn_N.sum())} of {len(edit.squares[0].drawn_N)} cells drawn"
    if canvas.scale == 1:
        return drawn
    how = "enlarged" if canvas.scale > 1 else "scaled down"
    return f"{drawn}; at {right - left} x {bottom - top} pixels, {how} to the picture's {width} x {height}"


def _record(drawer: Pretrained, request: EditRequest, number: int, edit: Edit) -> DrawingRecord:
    """What the file says about how it came about."""
    return drawer.record(
        request.prompt,
        int(noise_numbers(np.array([number]), edit.variation + 1)[-1]),
        drawer.settings(),
        seed=request.seed,
        kind="expand" if request.expand else "edit",
        size=edit.picture.size,
        edit={"strength": request.strength, "feather": request.feather},
    )
