"""``oar edit``: parts of pictures in files are drawn anew, and the pictures written as PNG."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from oar_scale.config.loading import override_sample
from oar_scale.data.images import MAX_PIXELS, decode_upright
from oar_scale.errors import UserError
from oar_scale.generation.canvas import Box, Margins, expand, read_mask, scaled_size
from oar_scale.generation.editing import VARIATION_SHIFT, Edit, EditOptions
from oar_scale.generation.model_bundle import find_bundle
from oar_scale.generation.pages import plan_steps
from oar_scale.generation.picture_files import MAX_EDIT, DrawingRecord, encode_png
from oar_scale.generation.pretrained import Pretrained, load_bundle
from oar_scale.run.gpu_node import chosen_device
from oar_scale.storage import join, open_storage, read_named

PICTURES_AT_ONCE, VARIATIONS_AT_ONCE = 8, 16
MAX_REGIONS = MAX_EDIT - 3
"""The record of a picture has the prompt of each, beside strength, feather and windows."""


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """What the command line says: what is drawn by one of ``mask``, ``keep``, ``region``, ``box``, ``expand``, or by none all of it."""

    images: Sequence[str]
    """Paths, or object URIs."""
    prompt: str | None
    """None: each region has its own."""
    mask: Sequence[str] | None
    """Pictures in black and white, one for all images or one for each; ``keep`` likewise, the other way round."""
    keep: Sequence[str] | None
    region: Sequence[tuple[str, str]] | None
    """A mask and a prompt for each region, which all images have."""
    box: Box | None
    expand: Margins | None
    windows: bool | None
    """Whether pictures larger than the square are drawn at their own resolution; None: only those that grow."""
    model: str
    which: str | None
    overrides: Sequence[str]
    """``sample.FIELD=VALUE`` each, instead of the model's own recipe."""
    variations: int
    strength: float
    feather: float | None
    seed: int
    device: str | None
    out: str

    @property
    def mask_files(self) -> list[str]:
        """All masks that are named."""
        return [*(self.mask or self.keep or ()), *(mask for mask, _ in self.region or ())]


class Marked(NamedTuple):
    """A picture, and what is to be drawn of it from which prompts."""

    picture: Image.Image
    masks: list[NDArray[np.bool_]]
    prompts: list[str]


def edit_files(request: EditRequest, say: Callable[[str], None]) -> list[str]:
    """Draw what is marked in each picture, and write it as ``OUT/NAME.png``, or ``OUT/NAME-1.png`` and so on of several variations.

    A picture's noise depends on the seed and on its place in the list alone. Those written before an error stay.

    Returns:
        The files, in the order of the images.

    Raises:
        UserError: no such file, model or device; a mask of another size, that marks nothing or everything; a name that is taken.
    """
    EditOptions(variations=request.variations, strength=request.strength, feather=request.feather)  # refuses what cannot be
    if (regions := len(request.region or ())) > MAX_REGIONS:
        raise UserError(f"--region: {regions} regions, and a picture's record holds {MAX_REGIONS}. Draw the others in the edited picture.")
    targets = _targets(request)
    bundle = find_bundle(request.model, request.which)
    sample = override_sample(bundle.sample, request.overrides, request.model)
    drawer = load_bundle(replace(bundle, sample=sample)).to(chosen_device(request.device))
    if drawer.vq is None:
        raise UserError(f"{request.model}: a model without an image tokenizer cannot edit pictures. Name the folder of a run or an export.")
    for batch in _batches(request):
        for number, marked in batch.items():  # before anything is drawn, and with the picture's name
            where, windows = request.images[number], _by_windows(request)
            plan_steps(marked.masks, range(len(marked.masks)), drawer.vq.spec.image_size, windows=windows, where=where)
        for first in range(0, request.variations, VARIATIONS_AT_ONCE):
            edits = iter(_draw(drawer, request, batch, first))
            for number in batch:
                for target, edit in zip(targets[number][first : first + VARIATIONS_AT_ONCE], edits, strict=False):
                    record = _record(drawer, request, _noise_number(number, first + edit.variation), edit)
                    open_storage(target).write(target, encode_png(edit.picture, record))
                    say(f"{target}: {_about(edit, drawer.vq.spec.image_size)}")
    return [target for of_picture in targets for target in of_picture]


def _batches(request: EditRequest) -> Iterator[dict[int, Marked]]:
    """The pictures with their places in the list: some at once, and of large ones as many as fit in memory well."""
    batch: dict[int, Marked] = {}
    pixels = 0
    for number in range(len(request.images)):
        marked = _marked(request, number)
        more = marked.picture.width * marked.picture.height * min(request.variations, VARIATIONS_AT_ONCE)
        if batch and (len(batch) == PICTURES_AT_ONCE or pixels + more > MAX_PIXELS):
            yield batch
            batch, pixels = {}, 0
        batch[number] = marked
        pixels += more
    yield batch


def _draw(drawer: Pretrained, request: EditRequest, batch: dict[int, Marked], first: int) -> list[Edit]:
    """The next variations of each picture; they are those of any other number at once."""
    try:
        return drawer.edit(
            [marked.picture for marked in batch.values()],
            [list(marked.masks) for marked in batch.values()],
            [list(marked.prompts) for marked in batch.values()],
            variations=min(VARIATIONS_AT_ONCE, request.variations - first),
            strength=request.strength,
            windows=_by_windows(request),
            feather=request.feather,
            seed=request.seed,
            numbers=[_noise_number(number, first) for number in batch],
        )
    except (ArithmeticError, ValueError) as error:  # of settings that the layout cannot follow
        raise UserError(f"{drawer.where}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU has no memory for so many drawings at once, or others use it: fewer --variations, or --device cpu"
        ) from error


def _marked(request: EditRequest, number: int) -> Marked:
    """A picture and what is marked in it. Raises UserError as :func:`edit_files`."""
    path = request.images[number]
    picture = decode_upright(read_named(path), path)
    if request.region:
        masks = [_read_mask(mask, picture, path) for mask, _ in request.region]
        prompts, where = [prompt for _, prompt in request.region], path
    else:
        assert request.prompt is not None, "the command line asks for one"
        prompts, where = [request.prompt], path
        if request.expand:
            picture, new_HW = expand(picture, request.expand, path)
            masks = [new_HW]
        elif files := request.mask or request.keep:
            file = files[number if len(files) > 1 else 0]
            white_HW, where = _read_mask(file, picture, path), f"{file} (the mask of {path})"
            masks = [~white_HW if request.keep else white_HW]
        else:
            masks = [read_mask(request.box or (0, 0, *picture.size), picture.size, path)]
    _check_marks(request, masks, where)
    return Marked(picture, masks, prompts)


def _check_marks(request: EditRequest, masks: Sequence[NDArray[np.bool_]], where: str) -> None:
    if not all(mask_HW.any() for mask_HW in masks):
        drawn, kept = ("black", "white") if request.keep else ("white", "black")
        raise UserError(f"{where} marks nothing: {drawn} is drawn, {kept} is kept")
    if request.strength == 1 and np.logical_or.reduce(masks).all():
        raise UserError(
            f"{where}: the whole picture is marked, so nothing of it would be known. To draw from the prompt alone: oar sample; "
            "to vary it: --strength below 1"
        )


def _read_mask(file: str, picture: Image.Image, path: str) -> NDArray[np.bool_]:
    """The white pixels of a mask."""
    return read_mask(decode_upright(read_named(file), file), picture.size, f"{file} (the mask of {path})")


def _targets(request: EditRequest) -> list[list[str]]:
    """The files to write, for each picture."""
    masks = len(request.mask or request.keep or "")
    if masks > 1 and masks != len(request.images):
        raise UserError(f"{masks} masks for {len(request.images)} pictures: give one for all of them, or one for each, in the same order")
    if request.out.lower().endswith((".jpg", ".jpeg", ".webp", ".gif")):
        raise UserError(f"--out {request.out}: pictures are written as PNG. Name a file .png, or a folder for a file each.")
    one_file = request.out.lower().endswith(".png")
    if one_file and (len(request.images) > 1 or request.variations > 1):
        raise UserError(f"--out {request.out} is one file, and there will be more: name a folder")
    targets, taken = [], {os.path.realpath(path): path for path in [*request.images, *request.mask_files]}
    for path in request.images:
        stem = os.path.splitext(os.path.basename(path))[0]
        names = [f"{stem}.png"] if request.variations == 1 else [f"{stem}-{number}.png" for number in range(1, request.variations + 1)]
        targets.append([request.out] if one_file else [join(request.out, name) for name in names])
        for target in targets[-1]:
            if other := taken.get(os.path.realpath(target)):
                raise UserError(f"{target} would replace {other}, or its edit: take another --out for {path}")
            taken[os.path.realpath(target)] = path
    return targets


def _about(edit: Edit, size: int) -> str:
    """How it came about, in one line."""
    drawn, cells = (sum(counts) for counts in zip(*((int(each.drawn_N.sum()), len(each.drawn_N)) for each in edit.squares), strict=True))
    (width, height), steps = edit.picture.size, len(edit.squares)
    text = f"{drawn} of {cells} cells drawn" + (f" in {steps} steps" if steps > 1 else "")
    if any(square.box != (0, 0, width, height) for square in edit.squares):
        return f"{text}, by windows of {size} x {size} pixels; at the picture's own resolution"
    across, down = scaled_size(edit.picture.size, size)
    if max(across, down) == max(width, height):
        return text
    how = "enlarged" if max(width, height) > size else "scaled down"
    return f"{text}; at {across} x {down} pixels, {how} to the picture's {width} x {height}"


def _record(drawer: Pretrained, request: EditRequest, number: int, edit: Edit) -> DrawingRecord:
    """What the file says about how it came about."""
    regions = {f"region {place}": prompt for place, (_, prompt) in enumerate(request.region or (), 1)}
    whole = not (request.mask_files or request.box or request.expand)
    return drawer.record(
        "" if request.prompt is None else request.prompt,
        number,
        drawer.settings(),
        seed=request.seed,
        kind="expand" if request.expand else "variation" if whole else "edit",
        size=edit.picture.size,
        edit={"strength": request.strength, "feather": request.feather, "windows": _by_windows(request), **regions},
    )


def _noise_number(number: int, variation: int) -> int:
    return number + (variation << VARIATION_SHIFT)


def _by_windows(request: EditRequest) -> bool:
    return request.expand is not None if request.windows is None else request.windows
