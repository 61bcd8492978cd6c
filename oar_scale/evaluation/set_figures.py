"""The figures of a set of samples against a reference, each with the numbers of images that it rests on.

    fd, sfd                       Frechet distance on pooled and on spatial features
    kid                           kernel distance
    precision, recall, density, coverage
    is                            Inception Score of the samples
    clip                          CLIP score of the samples for their captions

On the features of InceptionV3 with its published weights these are called by their published names: ``fid``, ``sfid``, ``kid``,
``precision`` ... On any other features their names end in those of the features: ``fd_efflite0``, ``kid_efflite0``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from oar_scale.errors import UserError
from oar_scale.evaluation.distances import Gaussian, Groups, Matrix, frechet_distance, kid, kid_error
from oar_scale.evaluation.extractors import Layer
from oar_scale.evaluation.feature_files import FeatureFiles
from oar_scale.evaluation.image_marks import Marks, Pairing, repeated, shared, shared_pixels
from oar_scale.evaluation.image_marks import groups as caption_groups
from oar_scale.evaluation.moments import Moments
from oar_scale.evaluation.neighbours import K_DENSITY, K_PRECISION, Neighbours, Share, neighbours
from oar_scale.evaluation.scores import clip_score, inception_score
from oar_scale.json_object import JsonObject
from oar_scale.results.estimates import Estimate
from oar_scale.results.statistics import LEVEL

PUBLISHED = {"fd": "fid", "sfd": "sfid", "is": "inception_score", "clip": "clip_score"}
NEEDS: dict[str, tuple[Layer, ...]] = {
    "fd": ("pooled",),
    "sfd": ("spatial",),
    "kid": ("pooled",),
    "precision": ("pooled",),
    "recall": ("pooled",),
    "density": ("pooled",),
    "coverage": ("pooled",),
    "is": ("logits",),
    "clip": ("pooled", "captions"),
}
"""The layers that each figure rests on."""
FEWEST: dict[str, tuple[int, int]] = {
    "fd": (2, 2),
    "sfd": (2, 2),
    "kid": (4, 4),
    "precision": (2, K_PRECISION + 1),
    "recall": (K_PRECISION + 1, 2),
    "density": (2, K_DENSITY + 1),
    "coverage": (2, K_DENSITY + 1),
    "is": (10, 0),
    "clip": (2, 0),
}
"""Samples and reference images that each figure needs at least."""
OF_SAMPLES_ALONE = ("is", "clip")
OF_STATISTICS = ("fd", "sfd")
"""Figures for which the statistics of the reference are enough."""

FEW = 2000
"""Images whose features are taken into memory at once."""


def figure_names(given: Sequence[str], label: str, standard: bool) -> list[str]:
    """Figures by their short or published names, each once, under their short ones.

    Raises:
        UserError: no such figure, or a published name on other features than those of InceptionV3.
    """
    short = {published: figure for figure, published in PUBLISHED.items()} | {figure: figure for figure in NEEDS}
    for name in given:
        if name not in short:
            raise UserError(f"--metrics {name}: there is no such figure. There are: {', '.join(NEEDS)}.")
        if name in ("fid", "sfid") and not standard:
            raise UserError(
                f"--metrics {name}: only distances on InceptionV3 with its published weights are called so, and these features are "
                f"{label}. Ask for {short[name]}, or for --features inception."
            )
    return [short[name] for name in dict.fromkeys(given)]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: features of images, or statistics alone, or both (an ADM reference batch)."""

    where: str
    files: FeatureFiles | None
    given: Mapping[str, tuple[Matrix, Matrix]] = field(default_factory=dict)
    """Mean and covariance of layers that came with the set; where there are any, they stand for it, not those of its own images."""
    given_count: int | None = None
    _gaussians: dict[Layer, Gaussian] = field(default_factory=dict, repr=False, compare=False)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Of which there are features."""
        return self.files.layers if self.files else ()

    def count(self, layer: str) -> int | None:
        """Images that a statistic rests on; None where a file does not say."""
        return self.given_count if layer in self.given or self.files is None else self.files.images

    def gaussian(self, layer: Layer) -> Gaussian:
        """Mean and covariance of a layer, computed once."""
        if layer not in self._gaussians:
            self._gaussians[layer] = Gaussian.of_covariance(*self.given[layer]) if layer in self.given else self._fitted(layer)
        return self._gaussians[layer]

    def _fitted(self, layer: Layer) -> Gaussian:
        if self.files and self.files.images <= FEW:
            return Gaussian.of_rows(self.files.rows(layer, np.arange(self.files.images)))
        return Gaussian.of_moments(self.moments(layer))

    def moments(self, layer: Layer) -> Moments:
        """Statistics of the features."""
        if self.files is None:
            raise UserError(f"{self.where}: holds statistics, and no images")
        return self.files.moments(layer)

    def has_statistics(self, layer: Layer) -> bool:
        """Whether a Frechet distance can be computed."""
        return layer in self.given or layer in self.layers


@dataclass(frozen=True)
class _Few:
    """A set that is too small for a figure."""

    where: str
    images: int
    needed: int

    def __str__(self) -> str:
        return f"{self.where} has {self.images} image{'' if self.images == 1 else 's'}"


@dataclass(frozen=True)
class Comparison:
    """Samples, a reference, and how they are compared."""

    samples: Side
    reference: Side
    label: str
    """Of the features."""
    standard: bool
    """Whether they are those of InceptionV3 with the published weights."""
    kept: int = 50_000
    """Images of a side, at most, of which KID, precision, recall, density and coverage look at the features: a random choice."""
    seed: int = 0
    paired: Pairing | None = None
    """Images of both sides with the same caption, or of the same name, are about one thing: KID leaves such pairs out."""

    def name(self, figure: str) -> str:
        """What a figure is called on these features."""
        return PUBLISHED.get(figure, figure) if self.standard else f"{figure}_{self.label}"

    def possible(self) -> list[str]:
        """All figures that both sides have what is needed for."""
        return [figure for figure in NEEDS if not self.why_not(figure)]

    def wanted(self, names: Sequence[str]) -> list[str]:
        """Figures by the names that :func:`figure_names` has checked; none means all that are possible.

        Raises:
            UserError: one that cannot be computed.
        """
        for name in names:
            if why := self.why_not(name):
                raise UserError(f"--metrics {name}: {why}")
        return list(names) or self.possible()

    def why_not(self, figure: str) -> str | None:
        """Why a figure cannot be computed; None where it can."""
        if missing := self._missing(figure):
            return missing
        few = self._few(figure)
        return f"{few}; {self.name(figure)} needs {few.needed}" if few else None

    def left_out(self, figures: Sequence[str]) -> list[str]:
        """Why figures that there are features for are not among these: the images that they would need."""
        few: dict[str, list[str]] = {}
        for figure in NEEDS:
            if figure not in figures and not self._missing(figure) and (found := self._few(figure)):
                few.setdefault(str(found), []).append(f"{self.name(figure)} needs {found.needed}")
        return [f"{images}; {', '.join(needs)}" for images, needs in few.items()]

    def figures(self, wanted: Sequence[str]) -> JsonObject:
        """Each figure by its name: ``value``, ``error`` with what it is, and the images that stood on each side.

        Raises:
            UserError: too few images, or features of other dimensions.
        """
        makers: dict[str, Callable[[str], JsonObject]] = {"fd": self._frechet, "sfd": self._frechet, "kid": self._kid}
        makers |= {"is": self._inception_score, "clip": self._clip_score}
        try:
            return {self.name(figure): makers.get(figure, self._neighbourhood)(figure) for figure in wanted}
        except ValueError as error:
            raise UserError(f"{self.samples.where} and {self.reference.where}: {error}") from error

    def notes(self, figures: Sequence[str]) -> list[str]:
        """What a reader of the figures must know."""
        notes, sides = [], (self.samples, self.reference)
        for figure in (each for each in OF_STATISTICS if each in figures):
            layer = NEEDS[figure][0]
            counts = [(count, side.where) for side in sides if (count := side.count(layer)) is not None]
            fewest, where = min(counts, default=(None, ""))
            features = len(self.reference.gaussian(layer).mean_D)
            if fewest is not None and fewest <= features:
                notes.append(
                    f"{self.name(figure)}: {where} has {fewest} images for {features} features, so its covariance is singular and most of "
                    "the distance is bias. Compare it only with distances of as many images to the same reference."
                )
        for side in sides:
            if side.files and side.files.images > self.kept and set(figures) - {*OF_STATISTICS, *OF_SAMPLES_ALONE}:
                chosen = f"{self.kept} of {side.files.images} images, a random choice"
                notes.append(f"{side.where}: {chosen}, in all but Frechet distances and scores of the samples (--kept)")
        return notes + self._same_images(figures)

    def _same_images(self, figures: Sequence[str]) -> list[str]:
        """What a reader must know where some images are the same, or about the same."""
        notes = []
        for where, marks in self._marks:
            if same := repeated(marks):
                notes.append(
                    f"{where}: {same} of {len(marks)} images are, pixel for pixel, the same as another one of the set. Errors and "
                    "intervals take all images for independent: they are too small by that."
                )
        if len(self._marks) == 2:
            (where, samples), (_, reference) = self._marks
            if copies := shared_pixels(samples, reference):
                notes.append(f"{where}: {copies} of {len(samples)} images are, pixel for pixel, images of the reference")
            if "kid" in figures and self.paired is None and (same := shared(samples, reference, "caption")):
                notes.append(
                    f"{self.name('kid')}: {same} of {len(samples)} samples have the caption of a reference image, and are more like it "
                    "than others, which makes KID too small. --paired caption leaves such pairs out, as the stage evaluate does"
                    + (", and so cannot see whether the samples of one caption are all alike." if repeated(samples, "caption") else ".")
                )
        return notes

    # -- one figure each -----------------------------------------------------------------------------------------------------

    def _missing(self, figure: str) -> str | None:
        """Why a figure cannot be computed; None where it can."""
        for layer in NEEDS[figure]:
            for side in (self.samples,) if figure in OF_SAMPLES_ALONE else (self.samples, self.reference):
                there = side.has_statistics(layer) if figure in OF_STATISTICS else layer in side.layers
                if not there and layer == "captions":
                    return f"{side.where}: not every image has a caption, or the features {self.label} read no text (openclip:MODEL does)"
                if not there:
                    return f"{side.where}: there are no {layer} features of its images"
        return None

    def _few(self, figure: str) -> _Few | None:
        """The side that has too few images for a figure; None where both have enough, or nobody knows their number."""
        for side, needed in zip((self.samples, self.reference), FEWEST[figure], strict=True):
            images = side.count(NEEDS[figure][0]) if figure in OF_STATISTICS or side.files is None else side.files.images
            if images is not None and images < needed:
                return _Few(side.where, images, needed)
        return None

    def _frechet(self, figure: str) -> JsonObject:
        layer = NEEDS[figure][0]
        samples, reference = self.samples.gaussian(layer), self.reference.gaussian(layer)
        if samples.mean_D.shape != reference.mean_D.shape:
            raise ValueError(f"{len(samples.mean_D)} features cannot be compared with {len(reference.mean_D)}: other networks made them")
        found: JsonObject = {"value": frechet_distance(samples, reference), **self._counts(layer)}
        equal = self._equal_sizes(layer)
        return found | ({} if equal is None else {"equal_sizes": equal})

    def _equal_sizes(self, layer: Layer) -> JsonObject | None:
        """What two random halves of the reference are apart, and as many samples are from one of them.

        All four sets have one number of images, and so the two distances the same bias: samples like the reference score as its other half.
        """
        samples, reference = self.samples.files, self.reference.files
        if samples is None or reference is None or layer not in samples.layers or layer not in reference.layers:
            return None
        half = min(samples.images, reference.images // 2, self.kept // 2)
        if half < 2:
            return None
        rows = reference.rows(layer, reference.chosen(2 * half, self.seed))
        order = np.random.default_rng(self.seed).permutation(2 * half)
        drawn = samples.rows(layer, samples.chosen(half, self.seed))
        first, second, of_samples = (Gaussian.of_rows(part) for part in (rows[order[:half]], rows[order[half:]], drawn))
        return {"images": half, "samples": frechet_distance(of_samples, second), "halves_of_reference": frechet_distance(first, second)}

    def _kid(self, figure: str) -> JsonObject:
        samples, reference = self._kept
        groups = self._groups(self.paired) if self.paired else None
        found = kid(samples, reference, groups=groups, seed=self.seed)
        # That of the mean over all subsets, to which the choice of the subsets adds what is between them.
        error = np.hypot(kid_error(samples, reference, groups=groups), found.std / np.sqrt(found.subsets))
        return {
            "value": found.mean,
            "error": float(error),
            "error_is": "standard error by the jackknife over images",
            "deviation_between_subsets": found.std,
            "paired": self.paired,
            "samples": len(samples),
            "reference": len(reference),
        }

    def _neighbourhood(self, figure: str) -> JsonObject:
        found: Share | Estimate | None = getattr(self._neighbours, figure)
        if found is None:
            raise ValueError(f"too few images for {figure}")
        counts = dict(zip(("samples", "reference"), map(len, self._kept), strict=True))
        if isinstance(found, Estimate):
            # All samples in as many balls do not tell how much others would differ: no error is known, and 0 is none.
            error_is = "standard error over images, the neighbourhoods taken as given"
            error = {"error": found.standard_error, "error_is": error_is} if found.standard_error else {}
            return {"value": found.mean, **error, **counts}
        interval_is = f"{LEVEL:.0%}, Wilson, over images, the neighbourhoods taken as given"
        return {"value": found.value, "low": found.low, "high": found.high, "interval_is": interval_is, **counts}

    def _inception_score(self, figure: str) -> JsonObject:
        files = self._sample_files
        value, error = inception_score(files.rows("logits", np.arange(files.images)))
        return {"value": value, "error": error, "error_is": "standard deviation between 10 parts", "samples": files.images}

    def _clip_score(self, figure: str) -> JsonObject:
        files = self._sample_files
        every = np.arange(files.images)
        score = clip_score(files.rows("pooled", every), files.rows("captions", every))
        return {"value": score.mean, "error": score.standard_error, "error_is": "standard error over images", "samples": files.images}

    @property
    def _sample_files(self) -> FeatureFiles:
        if self.samples.files is None:
            raise ValueError("the samples are statistics alone")
        return self.samples.files

    @cached_property
    def _kept(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Pooled features of both sides."""
        sides = []
        for files in (self.samples.files, self.reference.files):
            if files is None:
                raise ValueError("statistics alone have no features")
            sides.append(files.rows("pooled", files.chosen(self.kept, self.seed)))
        if sides[0].shape[1] != sides[1].shape[1]:
            raise ValueError(f"{sides[0].shape[1]} features cannot be compared with {sides[1].shape[1]}: other networks made them")
        return sides[0], sides[1]

    @cached_property
    def _marks(self) -> list[tuple[str, Marks]]:
        """Where the sides lie that have images, and the marks of these."""
        return [(side.where, side.files.marks()) for side in (self.samples, self.reference) if side.files is not None]

    def _groups(self, by: Pairing) -> Groups:
        """What the images of :attr:`_kept` belong to."""
        samples, reference = (
            (where, marks[side.files.chosen(self.kept, self.seed)])
            for (where, marks), side in zip(self._marks, (self.samples, self.reference), strict=True)
            if side.files is not None
        )
        return caption_groups(samples, reference, by)

    @cached_property
    def _neighbours(self) -> Neighbours:
        return neighbours(*self._kept)

    def _counts(self, layer: str) -> JsonObject:
        return {"samples": self.samples.count(layer), "reference": self.reference.count(layer)}
