"""A report with every section filled, from made-up numbers and small pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

import numpy as np

from oar_scale.report import report_data as d
from oar_scale.results.estimates import (
    Calibration,
    CaptionDependence,
    DistanceDifference,
    DistanceRow,
    Estimate,
    ImageGroup,
    LeakEffect,
    ModelName,
    NllDifference,
    NllEntry,
    NllTable,
    OrderName,
    PretrainEffect,
)
from oar_scale.results.examples import (
    DrawingExample,
    EditExample,
    EditGallery,
    GalleryRow,
    OrderExample,
    OrderSummary,
    Picture,
    SampleGrid,
    SampleRow,
    TokenizerMetadata,
)

GRID = 8


def picture(seed: int, size: int = 32) -> Picture:
    """Smooth colours, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3))
    return np.kron(coarse, np.ones((size // 4, size // 4, 1))).astype(np.uint8)


def curve(title: str, steps: int, start: float, end: float, heldout: bool = True) -> d.TrainingCurve:
    rng = np.random.default_rng(len(title))
    at = tuple(range(5, steps + 1, 5))
    losses = tuple(end + (start - end) * math.exp(-4 * step / steps) + rng.normal(0, 0.03) for step in at)
    points = tuple(range(0, steps + 1, steps // 4))
    evaluated = d.Series(points, tuple(end + 0.1 + (start - end) * math.exp(-4 * step / steps) for step in points))
    return d.TrainingCurve(title, d.Series(at, losses), heldout=evaluated if heldout else None)


def nll_table(ordered_minus_control: float = -0.042) -> NllTable:
    by_order: dict[OrderName, tuple[float, float, float, float]] = {  # base, any-order, control, ordered
        "random": (3.912, 3.544, 3.532, 3.581),
        "raster": (3.871, 3.521, 3.509, 3.557),
        "own max_prob": (3.702, 3.361, 3.352, 3.352 + ordered_minus_control),
        "own gt_logprob": (2.902, 2.561, 2.552, 2.306),
    }
    models: tuple[ModelName, ...] = ("base", "any_order", "control", "ordered")
    means = {(model, order): mean for order, row in by_order.items() for model, mean in zip(models, row, strict=True)}
    return NllTable(
        images=192,
        entries=tuple(NllEntry(model, order, Estimate(mean, 0.031)) for (model, order), mean in means.items()),
        differences=(
            NllDifference("ordered", "control", "own max_prob", Estimate(ordered_minus_control, 0.006)),
            NllDifference("ordered", "any_order", "own max_prob", Estimate(-0.051, 0.007)),
            NllDifference("ordered", "control", "own gt_logprob", Estimate(-0.246, 0.011)),
            NllDifference("ordered", "control", "random", Estimate(0.049, 0.005)),
            NllDifference("ordered", "control", "raster", Estimate(0.008, 0.006)),
        ),
    )


def calibration() -> tuple[Calibration, ...]:
    return (
        Calibration("control", 192, Estimate(0.26, 0.02), Estimate(0.39, 0.005), Estimate(0.37, 0.007)),
        Calibration("ordered", 192, Estimate(0.55, 0.03), Estimate(0.40, 0.004), Estimate(0.35, 0.006)),
    )


def orders(captions: Sequence[str], pictures: Sequence[Picture]) -> OrderSummary:
    rows, columns = np.mgrid[:GRID, :GRID]
    rng = np.random.default_rng(3)

    def steps(centre: float) -> np.ndarray:
        distance = np.hypot(rows - centre, columns - centre) + rng.normal(0, 0.8, (GRID, GRID))
        return np.argsort(np.argsort(-distance.ravel())).reshape(GRID, GRID)

    examples = tuple(OrderExample(c, p, steps(3.5 + rng.normal(0, 1))) for c, p in zip(captions, pictures, strict=True))
    mean = np.mean([steps(3.5 + rng.normal(0, 1)) for _ in range(50)], axis=0)
    brute_force = "On 4 images the extracted orders equal those of brute force."
    return OrderSummary("gt_logprob", 3557, 3549, mean, 0.463, 0.218, 148.2, examples, brute_force)


def report(
    captions: Sequence[str] = ("a grinning cat", "pizza, emoji", "an emoji of <umbrella> & rain"),
    pictures: Sequence[Picture] | None = None,
    nll: NllTable | None = None,
) -> d.ReportData:
    pictures = pictures or [picture(seed) for seed in range(len(captions))]
    blurred = [(p.astype(np.float64) * 0.8 + np.roll(p, 2, axis=0) * 0.2).astype(np.uint8) for p in pictures]
    known = np.zeros((GRID, GRID), dtype=bool)
    known[:, : GRID // 2] = True
    return d.ReportData(
        run=d.RunMetadata(
            recipe_name="quickstart",
            seed=17,
            started=datetime(2026, 11, 22, 8, 30),
            duration_s=731.0,
            machine="2 CPU cores, 8 GB memory, no GPU",
            software="oar_scale 0.1.0, torch 2.15.0, Python 3.11.7",
            command="oar run recipes/quickstart.yaml",
        ),
        recipe_yaml="name: quickstart\nseed: 17\ndata:\n  image_size: 32\n",
        stages=(
            d.StageRow("data", "rendered and split the pictures", 61.3, "14 shards"),
            d.StageRow("tokenizer", "took over the trained tokenizer", 0.4),
            d.StageRow("pretrain", "continued the any-order model for 60 steps", 91.7, "2 attempts, resumed from step 30"),
            d.StageRow("extract", "found one order for each training image", 148.2),
            d.StageRow("finetune", "trained on the extracted orders", 118.0),
            d.StageRow("control", "trained on random orders", 117.1),
            d.StageRow("evaluate", "measured and sampled", 194.3),
        ),
        data=d.DataMetadata(
            source="OpenMoji 17.0.0, named by the package emoji",
            train_images=3557,
            heldout_images=396,
            image_size=32,
            split="10 % of the names, by a hash of the name; a name is on one side only",
            attribution="OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0",
            bad_samples=2,
            bad_examples=("1f9ff: no caption", "2b1b: blank picture"),
        ),
        tokenizer=TokenizerMetadata(
            "weights shipped with the recipe",
            GRID,
            512,
            0.973,
            21.37,
            "captions, 1000 SentencePiece tokens, at most 16 a caption",
            tuple(pictures[:24]),
            tuple(blurred[:24]),
            reconstruction_fd_efflite0=187.65,
        ),
        model=d.ModelMetadata(3_412_480, 6, 192, 6, "the checkpoint shipped with the recipe (60 min on 2 cores)"),
        curves=(
            d.TrainingCurve("tokenizer", curve("tokenizer", 2000, 0.4, 0.05).loss, "reconstruction loss"),
            curve("pretrain", 60, 3.9, 3.5),
            curve("finetune (ordered)", 80, 3.6, 3.3),
            curve("control (random orders)", 80, 3.6, 3.5),
        ),
        pretrain=PretrainEffect(192, Estimate(3.912, 0.033), Estimate(3.544, 0.031), Estimate(-0.368, 0.012)),
        nll=nll or nll_table(),
        captions=(
            CaptionDependence("any_order", 192, Estimate(3.544, 0.031), Estimate(3.721, 0.035), Estimate(0.177, 0.013)),
            CaptionDependence("ordered", 192, Estimate(3.581, 0.032), Estimate(3.742, 0.036), Estimate(0.161, 0.014)),
        ),
        distances=(
            DistanceRow("reconstructions", 256, 0.0312, 0.0021, 88.4),
            DistanceRow("any-order", 256, 0.1211, 0.0043, 191.8),
            DistanceRow("control", 256, 0.1184, 0.0041, 189.5),
            DistanceRow("ordered", 256, 0.1032, 0.0039, 180.6),
        ),
        distance_differences=(
            DistanceDifference("ordered", "control", 256, Estimate(0.0012, 0.0101)),
            DistanceDifference("ordered", "any_order", 256, Estimate(-0.0251, 0.0087)),
        ),
        calibration=calibration(),
        groups=(
            ImageGroup(
                "novel",
                nll_table(0.143),
                calibration=calibration(),
                distance_differences=(DistanceDifference("ordered", "control", 81, Estimate(0.0013, 0.0144)),),
            ),
            ImageGroup("near-duplicate", nll_table(-0.066)),
        ),
        samples=SampleGrid(
            ("any_order", "control", "ordered"),
            "Guidance 2, temperature 1, each in its own confidence order",
            tuple(
                SampleRow(c, p, (b, b, b), novel=bool(place % 2))
                for place, (c, p, b) in enumerate(zip(captions, pictures, blurred, strict=True))
            ),
        ),
        edits=(
            EditExample("inpainting", captions[0], "ordered", pictures[0], known, (blurred[0], blurred[0])),
            EditExample("outpainting", captions[1], "ordered", pictures[1], ~known, (blurred[1], blurred[1])),
        ),
        drawing=DrawingExample(captions[0], "ordered", blurred[0], np.random.default_rng(4).permutation(GRID**2)),
        gallery=EditGallery(
            ("any_order", "control", "ordered"),
            tuple(GalleryRow(c, p, known, (b, p, b)) for c, p, b in zip(captions, pictures, blurred, strict=True)),
        ),
        leaks=(
            LeakEffect("inpainting", "ordered", 32, Estimate(3.585, 0.175), Estimate(4.073, 0.179), Estimate(0.489, 0.042)),
            LeakEffect("outpainting", "ordered", 32, Estimate(2.707, 0.128), Estimate(2.878, 0.130), Estimate(0.171, 0.018)),
        ),
        orders=orders(captions, pictures),
        notes=("A model of this size on 3,557 pictures learns shapes and colours, not fine detail.", "One seed."),
    )
