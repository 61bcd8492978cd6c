"""Pieces on edits: a part of held-out images is hidden and drawn anew, knowing the rest, and nothing of what is hidden.

    inpainting  redraw the middle, half the side           outpainting  all but that           right half

All of it by the leak-free path of ``generation.editing``: what is hidden is filled before the image tokenizer sees the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from oar_scale.data.hashing import derived_seed
from oar_scale.evaluation.eval_tasks import Ints, Precision, condition_of
from oar_scale.evaluation.flexibility.features import DistanceSource, FeatureNetwork, mean_pairwise
from oar_scale.evaluation.flexibility.pieces import Arrays, NetworkFile
from oar_scale.evaluation.flexibility.similarity import ssim
from oar_scale.evaluation.flexibility.subjects import Arm, ArmModel, MeasuredImages, Source
from oar_scale.evaluation.likelihood import honest_nll
from oar_scale.evaluation.pictures import UNKNOWN_GREY
from oar_scale.generation.editing import EditOptions, box_mask, centre_mask, edit_pages
from oar_scale.generation.pages import make_page
from oar_scale.generation.seen_codes import pixels_of
from oar_scale.generation.settings import SampleSettings
from oar_scale.results.flexibility import Better, Measure

HoleName = Literal["inpainting", "outpainting", "right half"]
COMPLETIONS = 4
SHOWN = 8
"""Images whose first completion is kept as a picture."""
EDIT_MEASURES: dict[str, tuple[str, str, Better]] = {
    "distance": ("distance of the redrawn region to the real one", "", "lower"),
    "ssim": ("SSIM of the redrawn region to the original, mean over completions", "", ""),
    "diversity": ("between completions of one image", "distance of features", ""),
    "consistency": ("SSIM of what was known, redrawn from the completion", "", "higher"),
    "nll": ("true codes of the hole, given the rest", "nats a code", "lower"),
}


def holes(grid: int) -> dict[HoleName, NDArray[np.bool_]]:
    """The cells [N] that are hidden."""
    middle_N, half = centre_mask(grid, max(grid // 2, 1)), grid // 2
    right_N = box_mask(grid, 0, half, grid, grid - half)
    return {"inpainting": middle_N.numpy(), "outpainting": (~middle_N).numpy(), "right half": right_N.numpy()}


@dataclass(frozen=True)
class RegionPiece:
    """What features see in a region of the real pictures."""

    network: FeatureNetwork
    pictures: NDArray[np.uint8]
    hole_N: NDArray[np.bool_]

    @property
    def what(self) -> str:
        return "features of a region"

    def run(self) -> Arrays:
        """``region_SF``."""
        return {"region_SF": self.network.features(only(self.pictures, self.hole_N))}


@dataclass(frozen=True)
class EditsPiece:
    """Completions of some pictures."""

    model: NetworkFile
    vq: NetworkFile
    network: FeatureNetwork
    pictures: NDArray[np.uint8]
    codes_SN: Ints
    """Of the intact pictures."""
    cond_inputs_S: NDArray[np.generic]
    first: int
    hole_N: NDArray[np.bool_]
    settings: SampleSettings
    seed: int
    precision: Precision
    shown: int
    """Of so many of the first pictures the first completion is kept."""

    @property
    def what(self) -> str:
        return f"{self.model.where}: edits"

    def run(self) -> Arrays:
        """``nll``, ``ssim``, ``diversity`` and ``consistency`` [S]; ``region_SF`` of the first completions; ``pictures``."""
        completions_SK = self._completed(self.pictures, self.hole_N, COMPLETIONS)
        first_S = completions_SK[:, 0]
        again_S = self._completed(first_S, ~self.hole_N, 1)[:, 0]
        regions = [self.network.features(only(completions_SK[:, k], self.hole_N)) for k in range(COMPLETIONS)]
        return {
            "nll": self._nll().numpy(),
            "ssim": np.mean([self._similar(completions_SK[:, k], self.hole_N) for k in range(COMPLETIONS)], axis=0),
            "diversity": mean_pairwise(np.stack(regions, axis=1)),
            "consistency": self._similar(again_S, ~self.hole_N),
            "region_SF": regions[0],
            "pictures": first_S[: self.shown],
        }

    def _completed(self, pictures: NDArray[np.uint8], hole_N: NDArray[np.bool_], variations: int) -> NDArray[np.uint8]:
        """Completions [S, variations, H, W, 3] of pictures in which a part is hidden."""
        model, vq = self.model.model(self.precision), self.vq.tokenizer()
        size, numbers = vq.spec.image_size, self.first + np.arange(len(pictures))
        hidden_SS = pixels_of(torch.from_numpy(hole_N), size)
        pages = [
            make_page(Image.fromarray(picture), [hidden_SS], [row], size, f"held-out image {numbers[row]}", windows=False)
            for row, picture in enumerate(pictures)
        ]
        condition = condition_of(model, torch.from_numpy(self.cond_inputs_S))
        seed = derived_seed("edits", self.seed)
        edits = edit_pages(model, vq, pages, condition, self.settings, EditOptions(variations), seed, images_B=numbers)
        drawn = np.stack([np.asarray(edit.picture) for edit in edits])
        return drawn.reshape(len(pictures), variations, *drawn.shape[1:])

    def _similar(self, pictures: NDArray[np.uint8], region_N: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Mean SSIM [S] to the original over a region, of which alone it is."""
        region_HW = pixels_of(torch.from_numpy(region_N), pictures.shape[1]).numpy()
        return np.array([ssim(*pair, region_HW).mean() for pair in zip(pictures, self.pictures, strict=True)])

    def _nll(self) -> Tensor:
        """NLL [S] of the true codes of the hole, given the codes around it, which have not seen them; float32."""
        model, vq = self.model.model(), self.vq.tokenizer()
        return honest_nll(model, vq, self.pictures, self.codes_SN, self.hole_N, condition_of(model, torch.from_numpy(self.cond_inputs_S)))


def only(pictures: NDArray[np.uint8], region_N: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Pictures [S, H, W, 3] of which all but a region is grey."""
    region_HW = pixels_of(torch.from_numpy(region_N), pictures.shape[1]).numpy()
    return np.where(region_HW[:, :, None], pictures, np.uint8(UNKNOWN_GREY))


def edit_sources(
    arms: Sequence[Arm], images: MeasuredImages, network: FeatureNetwork, settings: SampleSettings, seed: int, precision: Precision
) -> list[Source]:
    """All that is measured of edits."""
    sources: list[Source] = []
    for name, hole_N in holes(images.grid).items():
        reference = tuple(RegionPiece(network, images.pictures[part], hole_N) for part in images.parts)
        for model in (model for arm in arms for model in arm.models):
            pieces = edit_pieces(model, images, network, hole_N, settings, seed, precision)
            key = f"edits/{name}"
            region = (pieces, "region_SF", reference, "region_SF", images.families_S)
            sources.append(DistanceSource(f"{key}/distance", model.label, model.seed, *region))
            sources += [Source(f"{key}/{what}", model.label, model.seed, pieces, what) for what in EDIT_MEASURES if what != "distance"]
    return sources


def edit_pieces(
    model: ArmModel,
    images: MeasuredImages,
    network: FeatureNetwork,
    hole_N: NDArray[np.bool_],
    settings: SampleSettings,
    seed: int,
    precision: Precision,
) -> tuple[EditsPiece, ...]:
    """The completions of all images by one model."""
    return tuple(
        EditsPiece(
            model.file,
            images.vq,
            network,
            images.pictures[part],
            images.codes_SN[part],
            model.cond_inputs_S[part],
            part.start,
            hole_N,
            settings,
            seed,
            precision,
            SHOWN if part.start == 0 else 0,
        )
        for part in images.parts
    )


def edit_measures(network: FeatureNetwork) -> tuple[Measure, ...]:
    """The measures of all holes."""
    return tuple(
        Measure(f"edits/{hole}/{name}", f"{hole}: {title}", unit or (network.kid if name == "distance" else ""), better, "edits")
        for hole in ("inpainting", "outpainting", "right half")
        for name, (title, unit, better) in EDIT_MEASURES.items()
    )
