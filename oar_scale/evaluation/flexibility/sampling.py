"""Pieces on samples: drawn in any order, with any settings, and what features see in them.

For each caption of a held-out image one sample; the same noise for all models, orders and settings (``sampling``: a hash of seed, image,
cell and code).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.data.hashing import derived_seed
from oar_scale.evaluation.eval_tasks import Ints, Precision, condition_of, here
from oar_scale.evaluation.flexibility.features import DistanceSource, FeatureNetwork, mean_pairwise
from oar_scale.evaluation.flexibility.likelihood import Orders
from oar_scale.evaluation.flexibility.pieces import Arrays, NetworkFile, in_parts
from oar_scale.evaluation.flexibility.subjects import Arm, ArmModel, MeasuredImages, Source
from oar_scale.evaluation.pictures import decode_pictures
from oar_scale.generation.editing import noise_numbers
from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.results.flexibility import Measure, Role

DIVERSE_IMAGES, DIVERSE_SAMPLES = 64, 4
"""Captions at most that are drawn several times, and how often."""


@dataclass(frozen=True)
class ReferencePiece:
    """Held-out images, and the best that codes can do for them: their reconstructions."""

    vq: NetworkFile
    network: FeatureNetwork
    codes_SN: Ints
    pictures: NDArray[np.uint8]

    @property
    def what(self) -> str:
        return f"{self.vq.where}: features"

    def run(self) -> Arrays:
        """``heldout_SF`` and ``decoded_SF``."""
        decoded = np.stack(decode_pictures(self.vq.tokenizer(), torch.from_numpy(self.codes_SN)))
        return {"heldout_SF": self.network.features(self.pictures), "decoded_SF": self.network.features(decoded)}


@dataclass(frozen=True)
class SamplesPiece:
    """A sample for each caption."""

    model: NetworkFile
    vq: NetworkFile
    network: FeatureNetwork
    cond_inputs_S: NDArray[np.generic]
    numbers_S: Ints
    """On which, beside the seed, an image's noise depends."""
    settings: SampleSettings
    seed: int
    precision: Precision
    order_SN: Orders | None = None
    """None: the model chooses, by ``settings``."""

    @property
    def what(self) -> str:
        return f"{self.model.where}: samples"

    def run(self) -> Arrays:
        """``codes_SN`` and ``order_SN``, uint16, and ``features_SF``."""
        model = self.model.model(self.precision)
        order = None if self.order_SN is None else torch.from_numpy(self.order_SN.astype(np.int64)).to(here())
        condition_BTD = condition_of(model, torch.from_numpy(self.cond_inputs_S))
        drawn = generate(model, condition_BTD, self.settings, derived_seed("drawing", self.seed), order, images_B=self.numbers_S)
        features_SF = self.network.features(np.stack(decode_pictures(self.vq.tokenizer(), drawn.codes_BN)))
        codes_SN, order_SN = (each_BN.cpu().numpy().astype(np.uint16) for each_BN in (drawn.codes_BN, drawn.order_BN))
        return {"codes_SN": codes_SN, "order_SN": order_SN, "features_SF": features_SF}


@dataclass(frozen=True)
class DiversitySource(Source):
    """How far apart the samples of one caption are; the pieces are the first samples of all captions, the second ones, and so on."""

    def values(self, results: Mapping[str, Arrays]) -> NDArray[np.float64]:
        of_variation = len(self.pieces) // DIVERSE_SAMPLES
        starts = range(0, len(self.pieces), of_variation)
        features = [in_parts(results, self.pieces[start : start + of_variation])["features_SF"] for start in starts]
        return mean_pairwise(np.stack(features, axis=1))


@dataclass(frozen=True)
class SampleWork:
    """What samples are drawn with and compared with."""

    arms: Sequence[Arm]
    images: MeasuredImages
    network: FeatureNetwork
    settings: SampleSettings
    seed: int
    precision: Precision

    def pieces(
        self, model: ArmModel, settings: SampleSettings, order_SN: Orders | None = None, captions: int | None = None, variation: int = 0
    ) -> tuple[SamplesPiece, ...]:
        """A model's samples of the first captions, or of all."""
        count = len(self.images.codes_SN) if captions is None else captions
        numbers_S = noise_numbers(np.arange(count), variation + 1).reshape(count, -1)[:, variation]
        return tuple(
            SamplesPiece(
                model.file,
                self.images.vq,
                self.network,
                model.cond_inputs_S[part],
                numbers_S[part],
                settings,
                self.seed,
                self.precision,
                None if order_SN is None else order_SN[part],
            )
            for part in self.images.parts
            for part in [slice(part.start, min(part.stop, count))]
            if part.start < part.stop
        )

    def reference(self) -> tuple[ReferencePiece, ...]:
        """The held-out images."""
        images = self.images
        return tuple(ReferencePiece(images.vq, self.network, images.codes_SN[part], images.pictures[part]) for part in images.parts)

    def distances(self, column: str, model: ArmModel, pieces: tuple[SamplesPiece, ...]) -> list[Source]:
        """Both distances of samples."""
        reference = self.reference()
        return [
            DistanceSource(
                f"samples/{column}/{to}", model.label, model.seed, pieces, "features_SF", reference, f"{to}_SF", self.images.families_S
            )
            for to in ("heldout", "decoded")
        ]

    def matrix(self, fixed: Mapping[str, Orders], chosen: Mapping[str, SampleSettings]) -> list[Source]:
        """All arms, drawn in fixed orders and in those that they choose by some settings."""
        sources: list[Source] = []
        for model in (model for arm in self.arms for model in arm.models):
            columns = {name: self.pieces(model, self.settings, order_SN) for name, order_SN in fixed.items()}
            columns |= {name: self.pieces(model, settings) for name, settings in chosen.items()}
            for name, pieces in columns.items():
                sources += self.distances(name, model, pieces)
        return sources

    def diversity(self) -> list[Source]:
        """How different a model's samples of one caption are, in the order that it chooses."""
        captions = min(DIVERSE_IMAGES, len(self.images.codes_SN))
        return [
            DiversitySource(
                "diversity/samples",
                model.label,
                model.seed,
                tuple(
                    piece
                    for variation in range(DIVERSE_SAMPLES)
                    for piece in self.pieces(model, self.settings, captions=captions, variation=variation)
                ),
                "features_SF",
            )
            for arm in self.arms
            for model in arm.models
        ]


def sample_measures(columns: Mapping[str, str], network: FeatureNetwork, primary: str) -> tuple[Measure, ...]:
    """The measures of the matrix, by the titles of its columns, and of the diversity.

    Args:
        primary: the column whose distance to held-out images is the primary question.
    """
    to = {"heldout": "held-out images", "decoded": "reconstructed held-out images"}

    def role(name: str, what: str) -> Role:
        return "primary" if (name, what) == (primary, "heldout") else "exploratory"

    return (
        *(
            Measure(f"samples/{name}/{what}", f"{title}; to {images}", network.kid, "lower", "samples", role(name, what))
            for what, images in to.items()
            for name, title in columns.items()
        ),
        Measure("diversity/samples", "between samples of one caption", "distance of features", "", "diversity"),
    )
