"""The page of a flexibility report: one HTML file that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oar_scale.report import page_environment
from oar_scale.report.summary import number, signed
from oar_scale.results.examples import Picture
from oar_scale.results.flexibility import ArmDifference, Better, Chapter, FlexibilityResults, Measure
from oar_scale.results.statistics import Interval

ALPHA = 0.05
"""Corrected p below which a difference is taken for real."""


@dataclass(frozen=True)
class EditPictures:
    """Completions of the first images."""

    known: NDArray[np.bool_]
    """[G, G], True where the pixels were given."""
    completions: dict[str, list[Picture]]
    """By arm."""


@dataclass(frozen=True)
class FlexibilityPictures:
    """The first images, and what the first model of each arm makes of their captions and of parts of them."""

    captions: Sequence[str]
    originals: Sequence[Picture]
    reconstructions: Sequence[Picture]
    samples: Mapping[str, Mapping[str, Sequence[Picture]]]
    """By order and arm."""
    edits: Mapping[str, EditPictures]
    """By hole."""


class Cell(NamedTuple):
    """A figure of a table."""

    mean: str
    intervals: tuple[str, ...]
    difference: str
    """To the arm that the others are compared with; empty where there is none."""
    verdict: str
    """``better`` or ``worse`` where the difference holds after correction, for the page's colours."""


class Table(NamedTuple):
    """A row for each arm, a column for each measure."""

    title: str
    unit: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def render_flexibility(results: FlexibilityResults, pictures: FlexibilityPictures) -> str:
    """The page as HTML text."""
    environment = page_environment()
    return environment.get_template("flexibility.html.j2").render(
        results=results,
        pictures=pictures,
        samples=_by_arm(pictures.samples),
        sentences=_sentences(results),
        tables=_tables(results),
        seeds=max(each.figure.seeds for each in results.figures),
    )


def _by_arm(samples: Mapping[str, Mapping[str, Sequence[Picture]]]) -> dict[str, dict[str, Sequence[Picture]]]:
    """Samples by arm and order."""
    arms = dict.fromkeys(label for of_order in samples.values() for label in of_order)
    return {label: {order: of_order[label] for order, of_order in samples.items()} for label in arms}


def _tables(results: FlexibilityResults) -> dict[str, list[Table]]:
    """The tables of each section of the page."""

    def chapter(name: Chapter) -> list[Measure]:
        return [measure for measure in results.measures if measure.chapter == name]

    samples = chapter("samples")
    by_hole = dict.fromkeys(measure.name.split("/")[1] for measure in chapter("edits"))
    return {
        "likelihood": [_table(results, "Likelihood along these orders", chapter("likelihood"))],
        "calibration": [_table(results, "Along own orders", chapter("calibration"))],
        "samples": [
            _table(results, f"Distance to {of}", [each for each in samples if each.name.endswith(f"/{to}")], drop=f"; to {of}")
            for to, of in (("heldout", "held-out images"), ("decoded", "reconstructed held-out images"))
        ],
        "diversity": [_table(results, "Diversity", chapter("diversity"))],
        "edits": [
            _table(results, hole, [each for each in chapter("edits") if each.name.split("/")[1] == hole], drop=f"{hole}: ")
            for hole in by_hole
        ],
    }


def _table(results: FlexibilityResults, title: str, measures: Sequence[Measure], drop: str = "") -> Table:
    figures = {(each.label, each.measure): each.figure for each in results.figures}
    differences = {(each.first, each.measure): each for each in results.differences}
    units = {measure.unit for measure in measures}
    rows = []
    for label in dict.fromkeys(model.label for model in results.models):
        cells: list[Cell | None] = []
        for measure in measures:
            figure = figures.get((label, measure.name))
            difference = differences.get((label, measure.name))
            if figure is None:
                cells.append(None)
                continue
            intervals = (_interval(figure.over_images, "images"), _interval(figure.over_seeds, "seeds"))
            text, verdict = _difference(difference, measure.better) if difference else ("", "")
            cells.append(Cell(number(figure.mean), tuple(each for each in intervals if each), text, verdict))
        rows.append((label, tuple(cells)))
    one = units.pop() if len(units) == 1 else ""
    columns = tuple(measure.title.replace(drop, "") + ("" if one or not measure.unit else f", {measure.unit}") for measure in measures)
    return Table(title, one, columns, tuple(rows))


def _interval(interval: Interval | None, over: str) -> str:
    return "" if interval is None else f"{over} {number(interval.low)} to {number(interval.high)}"


def _difference(row: ArmDifference, better: Better) -> tuple[str, str]:
    mean = row.comparison.difference.mean
    text = f"{signed(mean)} (p {_p(row.p_images_holm)}" + (f"; seeds {_p(row.p_seeds_holm)})" if row.p_seeds_holm is not None else ")")
    holds = row.p_images_holm < ALPHA and (row.p_seeds_holm is None or row.p_seeds_holm < ALPHA)
    if not holds or better not in ("lower", "higher"):
        return text, ""
    return text, "better" if (mean < 0) == (better == "lower") else "worse"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else number(value)


def _sentences(results: FlexibilityResults) -> list[str]:
    """How many differences hold in each chapter, in either direction."""
    chapter_of = {measure.name: measure for measure in results.measures}
    lines = []
    for chapter in dict.fromkeys(measure.chapter for measure in results.measures):
        rows = [each for each in results.differences if chapter_of[each.measure].chapter == chapter]
        if not rows:
            continue
        verdicts = [_difference(row, chapter_of[row.measure].better)[1] for row in rows]
        real = sum(row.p_images_holm < ALPHA for row in rows)
        over_seeds = [row.p_seeds_holm for row in rows if row.p_seeds_holm is not None]
        seeds = f", {sum(p < ALPHA for p in over_seeds)} of {len(over_seeds)} over seeds" if over_seeds else ", of one seed each"
        lines.append(
            f"{chapter.capitalize()}: of {len(rows)} differences to {results.against}, {real} hold over images after correction{seeds}; "
            f"{verdicts.count('better')} are better and {verdicts.count('worse')} worse."
        )
    return lines
