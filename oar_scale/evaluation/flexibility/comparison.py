"""From values of each image to the figures and differences of the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from oar_scale.results.flexibility import ArmDifference, ArmFigure, Measure
from oar_scale.results.seed_spread import pooled_spread
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


def arm_differences(
    measures: Sequence[Measure], values: Values, against: str, families_S: NDArray[np.int64], unpaired: Collection[str] = ()
) -> tuple[ArmDifference, ...]:
    """All arms against one, measure by measure; corrected for the number of primary differences, or of exploratory ones of a chapter.

    How much seeds differ is told by all arms together that have as many as ``against`` and vary alike.

    Args:
        unpaired: arms whose seeds are others than those of ``against``.

    Raises:
        UserError: as :func:`arm_figures`.
    """
    tested: dict[str, list[ArmDifference]] = {}
    for measure in measures:
        if against in values[measure.name]:
            group = measure.chapter if measure.role == "exploratory" else measure.role
            tested.setdefault(group, []).extend(_of_measure(measure, values[measure.name], against, families_S, unpaired))
    found = {
        (row.measure, row.first): row for group, rows in tested.items() for row in (rows if group == "descriptive" else _corrected(rows))
    }
    return tuple(found[measure.name, label] for measure in measures for label in values[measure.name] if (measure.name, label) in found)


def _of_measure(
    measure: Measure,
    of_arms: Mapping[str, Sequence[NDArray[np.float64]]],
    against: str,
    families_S: NDArray[np.int64],
    unpaired: Collection[str],
) -> list[ArmDifference]:
    stacked = {label: np.stack(of_seeds) for label, of_seeds in of_arms.items()}
    second_RS = stacked[against]
    alike = {label: first_RS for label, first_RS in stacked.items() if len(first_RS) == len(second_RS) and label not in unpaired}
    spread = pooled_spread(alike)
    families, rows = families_S[: second_RS.shape[1]], []
    for label, first_RS in stacked.items():
        if label != against:
            unstable = tuple(name for name in (label, against) if spread and label in alike and name in spread.unstable)
            found = compare(first_RS, second_RS, measure.name, families, None if unstable else spread, label not in unpaired)
            rows.append(ArmDifference(label, against, measure.name, found, unstable=unstable))
    return rows


def _corrected(rows: list[ArmDifference]) -> list[ArmDifference]:
    found = [row.comparison for row in rows]
    by_images, by_seeds, by_both = (
        _holm_of_some(p_values)
        for p_values in (
            [each.p_images for each in found],
            [each.p_seeds for each in found],
            [each.p_images if each.p_both is None else each.p_both for each in found],
        )
    )
    return [
        replace(row, p_images_holm=images, p_seeds_holm=seeds, p_holm=both)
        for row, images, seeds, both in zip(rows, by_images, by_seeds, by_both, strict=True)
    ]


def _holm_of_some(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction of those that are there."""
    corrected = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(corrected) for p in p_values]
