"""The page of a flexibility report: one HTML file that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oar_scale.report import page_environment
from oar_scale.report.summary import number, signed
from oar_scale.results.examples import Picture
from oar_scale.results.flexibility import ArmDifference, Better, Chapter, FlexibilityResults, Measure, Role
from oar_scale.results.seed_spread import DOUBTFUL
from oar_scale.results.statistics import Comparison, Interval

ALPHA = 0.05
"""Corrected p below which a difference is taken for real."""
ROLES: dict[Role, str] = {"primary": " (primary)", "exploratory": "", "descriptive": " (not tested)"}
"""What a column's title says of its role."""


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
    difference: str
    """To the arm that the others are compared with, with half its interval; empty where there is none."""
    details: tuple[str, ...]
    """The intervals of both, and p: shown on request."""
    verdict: str
    """``better`` or ``worse`` where the difference holds after correction, for the page's colours."""


class PrimaryRow(NamedTuple):
    """An arm's answer to one of the primary questions."""

    label: str
    question: str
    difference: str
    intervals: tuple[str, str, str]
    """Of the difference: over images and seeds together, over images, over seeds."""
    p: str
    verdict: str


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
        primary=_primary(results),
        shared_spread=_shared_spread(results),
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


def _primary(results: FlexibilityResults) -> list[PrimaryRow]:
    rows = []
    for measure in (each for each in results.measures if each.role == "primary"):
        for row in (each for each in results.differences if each.measure == measure.name):
            found = row.comparison.difference
            question = f"{measure.chapter}: {measure.title}, {measure.unit}"
            alone = " (own spread)" if row.unstable else ""
            intervals = (_low_high(found.over_both) + alone, _low_high(found.over_images), _low_high(found.over_seeds) + alone)
            rows.append(PrimaryRow(row.first, question, signed(found.mean), intervals, _p(row.p_holm), _verdict(row, measure.better)))
    return rows


def _shared_spread(results: FlexibilityResults) -> str:
    """How much seeds differ, as several arms tell together, and for which primary differences they do not; empty where none can."""
    found = [each.comparison for each in results.differences]
    freedom = max((int(each.seed_freedom or 0) for each in found if _pooled(each)), default=0)
    primary = {measure.name for measure in results.measures if measure.role == "primary"}
    rows = [each for each in results.differences if each.measure in primary]
    apart = [row for row in rows if row.unstable]
    if not freedom and not apart:
        return ""
    of = f" ({freedom} degrees of freedom)" if freedom else ""
    names = ", ".join(dict.fromkeys(name for row in apart for name in row.unstable))
    return (
        f"How much seeds differ is told by all arms together{of}, as far as they vary alike from seed to seed: "
        f"where one looks to vary more than the others (F test, p at most {DOUBTFUL:g}, so by chance one arm in {1 / DOUBTFUL:.0f}), its "
        "differences are judged by their own spread alone"
        + (f": {len(apart)} of these {len(rows)}, because of {names}." if apart else "; of these none is.")
    )


def _pooled(found: Comparison) -> bool:
    return found.difference.over_seeds != found.over_seeds_alone


def _table(results: FlexibilityResults, title: str, measures: Sequence[Measure], drop: str = "") -> Table:
    figures = {(each.label, each.measure): each.figure for each in results.figures}
    differences = {(each.first, each.measure): each for each in results.differences}
    units, measures = {measure.unit for measure in measures}, sorted(measures, key=lambda measure: measure.role != "primary")
    rows = []
    for label in dict.fromkeys(model.label for model in results.models):
        cells: list[Cell | None] = []
        for measure in measures:
            figure = figures.get((label, measure.name))
            difference = differences.get((label, measure.name))
            if figure is None:
                cells.append(None)
                continue
            details = [_interval(figure.over_images, "images"), _interval(figure.over_seeds, "seeds")]
            text, verdict = "", ""
            if difference is not None:
                text, verdict = _difference(difference), _verdict(difference, measure.better)
                details.append(_difference_details(difference))
            cells.append(Cell(number(figure.mean), text, tuple(each for each in details if each), verdict))
        rows.append((label, tuple(cells)))
    one = units.pop() if len(units) == 1 else ""
    columns = tuple(
        measure.title.replace(drop, "") + ("" if one or not measure.unit else f", {measure.unit}") + ROLES[measure.role]
        for measure in measures
    )
    return Table(title, one, columns, tuple(rows))


def _interval(interval: Interval | None, over: str) -> str:
    return "" if interval is None else f"{over} {_low_high(interval, number)}"


def _low_high(interval: Interval | None, text: Callable[[float], str] = signed) -> str:
    return "none" if interval is None else f"{text(interval.low)} to {text(interval.high)}"


def _difference(row: ArmDifference) -> str:
    found = row.comparison.difference
    interval = found.over_both or found.over_images
    return signed(found.mean) + ("" if interval is None else f" ± {number(interval.half)}")


def _difference_details(row: ArmDifference) -> str:
    found = row.comparison.difference
    beside = [f"difference {_low_high(found.over_both or found.over_images)}", f"p {_p(row.p_holm)}" if row.p_holm is not None else ""]
    beside += ["own spread"] if row.unstable else []
    return "; ".join(each for each in beside if each)


def _verdict(row: ArmDifference, better: Better) -> str:
    if row.p_holm is None or row.p_holm >= ALPHA or better not in ("lower", "higher"):
        return ""
    return "better" if (row.comparison.difference.mean < 0) == (better == "lower") else "worse"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else number(value)


def _sentences(results: FlexibilityResults) -> list[str]:
    """How many differences hold, in either direction: of the primary ones, and of each chapter's exploratory ones."""
    by_name, groups = {measure.name: measure for measure in results.measures}, dict[str, list[ArmDifference]]()
    for row in results.differences:
        measure = by_name[row.measure]
        if measure.role != "descriptive":
            groups.setdefault("Primary" if measure.role == "primary" else f"Exploratory, {measure.chapter}", []).append(row)
    lines = []
    for group in sorted(groups, key=lambda group: group != "Primary"):
        rows = groups[group]
        verdicts = [_verdict(row, by_name[row.measure].better) for row in rows]
        real = sum(row.p_holm is not None and row.p_holm < ALPHA for row in rows)
        both = "" if any(row.comparison.p_both is not None for row in rows) else " over images"
        lines.append(
            f"{group}: of {len(rows)} differences to {results.against}, {real} hold{both} after correction; "
            f"{verdicts.count('better')} are better and {verdicts.count('worse')} worse."
        )
    return lines
