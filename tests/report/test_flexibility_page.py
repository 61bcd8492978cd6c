"""The page of a flexibility report says of which differences the two arms alone tell how much seeds differ."""

from __future__ import annotations

import re

import numpy as np
import pytest

from oar_scale.evaluation.flexibility.comparison import arm_differences, arm_figures
from oar_scale.report.flexibility_page import FlexibilityPictures, render_flexibility
from oar_scale.results.flexibility import FlexibilityResults, Measure, MeasuredModel

FAMILIES = np.arange(9)
MEASURES = (
    Measure("nll/raster", "raster", "nats a code", "lower", "likelihood"),
    Measure("nll/own", "its own", "nats a code", "lower", "likelihood", "primary"),
)


@pytest.mark.parametrize(
    ("unstable", "says"),
    [
        ("e", "own spread alone: 1 of these 5, because of e."),
        ("b", "own spread alone: 5 of these 5, because of b."),
        ("", "alone; of these none is."),
    ],
    ids=["an arm", "the control", "none"],
)
def test_differences_that_are_judged_by_their_own_spread_are_marked(unstable: str, says: str) -> None:
    seeds_R1 = np.array([[0.0], [1.0], [2.0]])
    values = {
        label: np.roll(seeds_R1, number, 0) * (30 if label == unstable else 1) + np.linspace(0, 0.1, 9)
        for number, label in enumerate("abcdef")
    }
    by_measure = {measure.name: {label: list(of_arm) for label, of_arm in values.items()} for measure in MEASURES}
    results = FlexibilityResults(
        run="runs/small",
        split="heldout",
        images=9,
        against="b",
        models=tuple(MeasuredModel(label, seed, None, "", "", "") for label in values for seed in range(3)),
        measures=MEASURES,
        figures=arm_figures(MEASURES, by_measure, FAMILIES),
        differences=arm_differences(MEASURES, by_measure, "b", FAMILIES),
        sampling="guidance 1",
        features="efflite0",
    )
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", render_flexibility(results, FlexibilityPictures([], [], [], {}, {}))))
    assert "its own (primary) raster " in text, "the primary question first"
    assert says in text and "is told by all arms together" in text
    assert ("degrees of freedom), as far as they vary alike" in text) == (unstable != "b"), "no difference rests on all arms"
    marked = {"e": 1, "b": 5, "": 0}[unstable]
    assert text.count("(own spread)") == 2 * marked, "of the primary table: over both, and over seeds"
    assert text.count("; own spread ") == 2 * marked, "of the cells of both measures"
