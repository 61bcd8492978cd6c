"""From values of each image to the figures and differences of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from oar_scale.results.flexibility import ArmDifference, ArmFigure, Measure
from oar_scale.results.statistics import compare, figure, holm

Values = Mapping[str, Mapping[str, Sequence[NDArray[np.float64]]]]
"""By the name of the measure and the label of the arm: values [S] of each of its models."""


def arm_figures(measures: Sequence[Measure], values: Values, families_S: NDArray[np.int64]) -> tuple[ArmFigure, ...]:
    """The figures of all arms.

    Args:
        families_S: the family of each image; measures of fewer images are of the first ones.

    Raises:
        UserError: values that are no finite numbers.
    """
    return tuple(
        ArmFigure(label, measure.name, figure(np.stack(of_seeds), f"{measure.name} of {label}", families_S[: len(of_seeds[0])]))
        for measure in measures
        for label, of_seeds in values[measure.name].items()
    )


def arm_differences(measures: Sequence[Measure], values: Values, against: str, families_S: NDArray[np.int64]) -> tuple[ArmDifference, ...]:
    """All arms against one, measure by measure, corrected for the number of differences of a chapter. Raises as :func:`arm_figures`."""
    found: list[ArmDifference] = []
    for chapter in dict.fromkeys(measure.chapter for measure in measures):
        rows = [
            ArmDifference(
                label,
                against,
                measure.name,
                compare(np.stack(of_seeds), np.stack(values[measure.name][against]), measure.name, families_S[: len(of_seeds[0])]),
                1.0,
                None,
            )
            for measure in measures
            if measure.chapter == chapter and against in values[measure.name]
            for label, of_seeds in values[measure.name].items()
            if label != against
        ]
        found += _corrected(rows)
    return tuple(found)


def _corrected(rows: list[ArmDifference]) -> list[ArmDifference]:
    by_images = holm([row.comparison.p_images for row in rows])
    over_seeds = [p for row in rows if (p := row.comparison.p_seeds) is not None]
    by_seeds = iter(holm(over_seeds))
    return [
        replace(row, p_images_holm=p, p_seeds_holm=None if row.comparison.p_seeds is None else next(by_seeds))
        for row, p in zip(rows, by_images, strict=True)
    ]
