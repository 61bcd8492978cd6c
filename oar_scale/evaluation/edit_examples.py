"""Edits of held-out images, as the report shows them: completions, the same edits by each model, and what leaky ones know.

*Leaky*: the intact image is encoded, and the codes of all cells outside the hole are known. *Honest*: as all edits are
(``generation.seen_codes``). Codes around a hole tell what is in it, so likelihoods and pictures of leaky edits are too good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from oar_scale.data.hashing import derived_seed
from oar_scale.evaluation.eval_tasks import EvalTarget, EvalTask, Precision, Results, condition_of, here
from oar_scale.evaluation.likelihood import hidden_nll, honest_nll, nll_estimate, paired_difference
from oar_scale.generation.editing import EditOptions, box_mask, centre_mask, edit_pages
from oar_scale.generation.pages import make_page
from oar_scale.generation.seen_codes import pixels_of
from oar_scale.generation.settings import SampleSettings
from oar_scale.registry import ModelName
from oar_scale.results.estimates import LeakEffect
from oar_scale.results.examples import EditExample, EditGallery, GalleryRow, Picture
from oar_scale.tokenizers.vq import load_vq

EditKind = Literal["inpainting", "outpainting"]
Purpose = EditKind | Literal["gallery"]
COMPLETIONS = 4
GALLERY_IMAGES, LEAK_IMAGES = 8, 32


@dataclass(frozen=True)
class EditedImages:
    """Held-out images that are edited, the first ones of all, and with what."""

    models: Mapping[ModelName, str]
    """Local files; ``base`` does not edit."""
    pictures: Sequence[Picture]
    captions: Sequence[str]
    codes_SN: NDArray[np.int64]
    families_S: NDArray[np.int64]
    """The same number for images of one family."""
    cond_inputs_S: Tensor
    grid: int
    vq: str
    settings: SampleSettings
    seed: int
    precision: Precision

    def tasks(self) -> list[EvalTask]:
        """The longest ones first."""
        middle_N = centre_mask(self.grid, max(self.grid // 2, 1)).numpy()
        kinds: dict[EditKind, NDArray[np.bool_]] = {"inpainting": middle_N, "outpainting": ~middle_N}
        gallery = [self._edit(name, "gallery", range(len(self._gallery_holes())), self._gallery_holes()) for name in self.columns]
        examples = [self._edit("ordered", kind, [image], [hole_N], COMPLETIONS) for image, (kind, hole_N) in enumerate(kinds.items())]
        some = slice(min(LEAK_IMAGES, len(self.pictures)))
        target = EvalTarget("ordered", self.models["ordered"], self.cond_inputs_S[some].numpy())
        return [*gallery, LeakTask(target, kinds, tuple(self.pictures[some]), self.codes_SN[some], self.vq), *examples]

    def examples(self, results: Results) -> tuple[EditExample, ...]:
        """Several completions of single images."""
        return tuple(
            EditExample(
                edited.purpose,
                self.captions[edited.images[0]],
                edited.model,
                self.pictures[edited.images[0]],
                self._known(edited.holes[0]),
                edited.pictures,
            )
            for edited in results.of(Edited)
            if edited.purpose != "gallery"
        )

    def gallery(self, results: Results) -> EditGallery:
        """The same edits of some images by each model."""
        by_model = {edited.model: edited.pictures for edited in results.of(Edited) if edited.purpose == "gallery"}
        rows = (
            GalleryRow(
                self.captions[image], self.pictures[image], self._known(hole_N), tuple(by_model[name][image] for name in self.columns)
            )
            for image, hole_N in enumerate(self._gallery_holes())
        )
        return EditGallery(self.columns, tuple(rows))

    def leaks(self, results: Results) -> tuple[LeakEffect, ...]:
        """The likelihood of hidden codes, leaky and honest, for each kind of hole."""
        found = []
        for measured in results.of(Leaks):
            for kind, (leaky_S, honest_S) in measured.nll.items():
                families_S = self.families_S[: len(leaky_S)]
                leaky, honest = (nll_estimate(each_S, families_S) for each_S in (leaky_S, honest_S))
                difference = paired_difference(honest_S, leaky_S, families_S)
                found.append(LeakEffect(kind, measured.model, len(leaky_S), leaky, honest, difference))
        return tuple(found)

    @property
    def columns(self) -> tuple[ModelName, ...]:
        """The models that edit."""
        return tuple(name for name in self.models if name != "base")

    def _gallery_holes(self) -> list[NDArray[np.bool_]]:
        """A hole for each image of the gallery: its middle, all but that, its right half, its lower half, and so on."""
        grid, half = self.grid, self.grid // 2
        middle_N = centre_mask(grid, max(half, 1))
        holes = [middle_N, ~middle_N, box_mask(grid, 0, half, grid, grid - half), box_mask(grid, half, 0, grid - half, grid)]
        return [holes[image % len(holes)].numpy() for image in range(min(GALLERY_IMAGES, len(self.pictures)))]

    def _known(self, hole_N: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return ~hole_N.reshape(self.grid, -1)

    def _edit(
        self, name: ModelName, purpose: Purpose, images: Sequence[int], holes: Sequence[NDArray[np.bool_]], variations: int = 1
    ) -> EditTask:
        target = EvalTarget(name, self.models[name], self.cond_inputs_S[list(images)].numpy(), images[0])
        pictures = tuple(self.pictures[image] for image in images)
        return EditTask(target, purpose, pictures, tuple(holes), variations, self.vq, self.settings, self.seed, self.precision)


@dataclass(frozen=True)
class EditTask:
    """Completions of some pictures, one after the other from the first image of ``target`` on."""

    target: EvalTarget
    purpose: Purpose
    pictures: tuple[Picture, ...]
    holes: tuple[NDArray[np.bool_], ...]
    """The cells [N] of each whose pixels are hidden and drawn."""
    variations: int
    vq: str
    settings: SampleSettings
    seed: int
    precision: Precision = "bf16"

    def run(self) -> Edited:
        """Draw the hidden cells. The seed leaves the model out: all models draw with the same noise."""
        model, vq = self.target.open(self.precision), load_vq(self.vq).to(here())
        size, pages = vq.spec.image_size, []
        for row, (picture, hole_N) in enumerate(zip(self.pictures, self.holes, strict=True)):
            where = f"held-out image {self.target.first + row}"
            pages.append(
                make_page(Image.fromarray(picture), [pixels_of(torch.from_numpy(hole_N), size)], [row], size, where, windows=False)
            )
        seed, condition_BTD = derived_seed(self.purpose, self.seed, self.target.first), condition_of(model, self.target.cond_inputs)
        edits = edit_pages(model, vq, pages, condition_BTD, self.settings, EditOptions(self.variations), seed)
        images = tuple(self.target.images.tolist())
        return Edited(self.target.model, self.purpose, images, self.holes, tuple(np.asarray(each.picture) for each in edits))


@dataclass(frozen=True)
class Edited:
    """Completed pictures, all variations of the first image before those of the second."""

    model: ModelName
    purpose: Purpose
    images: tuple[int, ...]
    holes: tuple[NDArray[np.bool_], ...]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class LeakTask:
    """What leaky edits know of some images."""

    target: EvalTarget
    holes: Mapping[EditKind, NDArray[np.bool_]]
    pictures: tuple[Picture, ...]
    codes_SN: NDArray[np.int64]
    """Of the intact pictures."""
    vq: str

    def run(self) -> Leaks:
        """Likelihoods of the hidden codes, in float32."""
        model, vq = self.target.open(), load_vq(self.vq).to(here())
        codes_BN, pictures = torch.from_numpy(self.codes_SN).to(here()), np.stack(self.pictures)
        condition_BTD, nll = condition_of(model, self.target.cond_inputs), {}
        for kind, hole in self.holes.items():
            hole_N = torch.from_numpy(hole).to(here())
            leaky_B = hidden_nll(model, codes_BN, ~hole_N.expand_as(codes_BN), hole_N, condition_BTD)
            nll[kind] = leaky_B, honest_nll(model, vq, pictures, self.codes_SN, hole, condition_BTD)
        return Leaks(self.target.model, nll)


@dataclass(frozen=True)
class Leaks:
    """NLL of the hidden codes of each image, nats per code: leaky and honest, [S] each, for each kind of hole."""

    model: ModelName
    nll: dict[EditKind, tuple[Tensor, Tensor]]
