"""From all that was measured to the files of a flexibility report."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.evaluation.flexibility.comparison import arm_differences, arm_figures
from oar_scale.evaluation.flexibility.edits import EditsPiece
from oar_scale.evaluation.flexibility.pieces import KeptResults, piece_id
from oar_scale.evaluation.flexibility.sampling import SamplesPiece
from oar_scale.evaluation.flexibility.subjects import Arm, Source, by_measure, values_of
from oar_scale.evaluation.pictures import decode_pictures
from oar_scale.json_object import without_nan
from oar_scale.report.flexibility_page import EditPictures, FlexibilityPictures, render_flexibility
from oar_scale.results.examples import Picture
from oar_scale.results.flexibility import FORMAT, FlexibilityResults, Measure, MeasuredModel, SweepRow, unpaired_arms
from oar_scale.storage import Missing, join, open_storage, read_json, write_json
from oar_scale.studies.flexibility_models import HeldoutImages
from oar_scale.tokenizers.vq import load_vq

REPORT = "flexibility.json"
SHOWN = 8
"""Images in the page."""


@dataclass(frozen=True)
class Measured:
    """All that was measured, of whom, and how."""

    arms: Sequence[Arm]
    images: HeldoutImages
    against: str
    measures: tuple[Measure, ...]
    sources: Sequence[Source]
    kept: KeptResults
    sampling: str
    features: str
    sweep: tuple[SweepRow, ...]
    sweep_images: str
    notes: tuple[str, ...]
    call: str
    """What was asked for, as a hash (:func:`remove_other_report`)."""

    def results(self, values_of_sources: Sequence[NDArray[np.float64]]) -> FlexibilityResults:
        """Figures and differences. Raises UserError for values that are no finite numbers."""
        values = by_measure(self.sources, values_of_sources)
        models = tuple(
            MeasuredModel(
                model.label, model.seed, model.drawn_from, model.file.where, model.file.id, f"arrays/{model.label}-{model.seed}.npz"
            )
            for arm in self.arms
            for model in arm.models
        )
        families_S, unpaired = self.images.measured.families_S, unpaired_arms(models, self.against)
        return FlexibilityResults(
            run=self.images.run.at(),
            split=self.images.split,
            images=len(self.images.tokens.keys),
            against=self.against,
            models=models,
            measures=self.measures,
            figures=arm_figures(self.measures, values, families_S),
            differences=arm_differences(self.measures, values, self.against, families_S, unpaired),
            sampling=self.sampling,
            features=self.features,
            sweep=self.sweep,
            sweep_images=self.sweep_images,
            notes=(
                *self.notes,
                *(f"Seeds of {label} are others than those of {self.against}: they were not paired." for label in unpaired),
            ),
        )

    def pictures(self) -> FlexibilityPictures:
        """The first images, and what the first model of each arm makes of them."""
        originals = list(self.images.measured.pictures[:SHOWN])
        vq = load_vq(self.images.measured.vq.uri)
        samples: dict[str, dict[str, list[Picture]]] = {}
        edits: dict[str, EditPictures] = {}
        for source in (each for each in self.sources if each.seed == 0):
            first, parts = source.pieces[0], source.measure.split("/")
            if isinstance(first, SamplesPiece) and parts[0] == "samples" and parts[2] == "heldout":
                codes_SN = self.kept[piece_id(first)]["codes_SN"][:SHOWN].astype(np.int64)
                samples.setdefault(parts[1], {})[source.label] = decode_pictures(vq, torch.from_numpy(codes_SN))
            elif isinstance(first, EditsPiece) and parts[2] == "nll":
                known = ~first.hole_N.reshape(self.images.measured.grid, -1)
                hole = edits.setdefault(parts[1], EditPictures(known, {}))
                hole.completions[source.label] = list(self.kept[piece_id(first)]["pictures"].astype(np.uint8))
        decoded = decode_pictures(vq, torch.from_numpy(self.images.measured.codes_SN[:SHOWN]))
        return FlexibilityPictures(self.images.tokens.captions[:SHOWN], originals, decoded, samples, edits)


def write_report(out: str, measured: Measured) -> None:
    """Write the values of each image and the page, then ``flexibility.json``, which makes them count."""
    values = values_of(measured.sources, measured.kept)
    results = measured.results(values)
    page = render_flexibility(results, measured.pictures())
    storage, named = open_storage(out), {join(out, model.arrays) for model in results.models}
    for uri in storage.list(join(out, "arrays/")):
        if uri.endswith(".npz") and uri not in named:
            storage.delete(uri)
    for model in results.models:
        buffer = io.BytesIO()
        arrays = {
            each.measure: values_S
            for each, values_S in zip(measured.sources, values, strict=True)
            if (each.label, each.seed) == (model.label, model.seed)
        }
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # the names are never one of its options
        uri = join(out, model.arrays)
        open_storage(uri).write(uri, buffer.getvalue())
    images = measured.images
    write_json(join(out, "arrays", "images.json"), {"split": results.split, "keys": images.tokens.keys, "families": list(images.families)})
    uri = join(out, "index.html")
    open_storage(uri).write(uri, page.encode())
    write_json(join(out, REPORT), without_nan({"format": FORMAT, "call": measured.call, **asdict(results)}))


def remove_other_report(out: str, call: str) -> None:
    """Remove what says that another call is done: other models, images or settings. While this one is under way it would pass for its.

    So does a report of another format, whose figures are others.
    """
    try:
        report = read_json(join(out, REPORT))
    except Missing:
        return
    if (report.get("format"), report.get("call")) != (FORMAT, call):
        for name in (REPORT, "index.html"):
            open_storage(out).delete(join(out, name))
