"""A flexibility report's differences between arms, in Markdown: tables by chapter (of edits by region), a row an arm.

    python tools/flexibility_tables.py runs/emoji-evidence/flexibility                          to the arm that the report compares with
    python tools/flexibility_tables.py runs/emoji-evidence/flexibility --against any_order      to any other

Differences are means over seeds and images with the half-width of their 95 % interval over both (over images, where there is one seed).
A * marks those of the report whose corrected p (Holm) is below 0.05; differences to other arms are not corrected, and have none.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oar_scale.errors import UserError
from oar_scale.evaluation.flexibility.comparison import arm_differences
from oar_scale.results.flexibility import FORMAT, Measure, MeasuredModel, unpaired_arms
from oar_scale.results.statistics import Interval
from oar_scale.runtime.program import program
from oar_scale.storage import Missing, read_json
from oar_scale.studies.flexibility_results import REPORT

CHAPTERS = ("likelihood", "calibration", "samples", "diversity", "edits")
Rows = Mapping[tuple[str, str], dict[str, Any]]
"""Differences as ``flexibility.json`` has them, by measure and label."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="a folder that oar evaluate --flexibility wrote")
    parser.add_argument("--against", help="a label; default: as in the report")
    arguments = parser.parse_args()
    print("\n".join(tables(arguments.report, arguments.against)))


def tables(folder: Path, against: str | None = None) -> list[str]:
    """The lines of all tables. Raises UserError where the folder has no report of this version, or the report no arm of that label."""
    command = f"oar evaluate --flexibility ... --out {folder}"
    try:
        content: dict[str, Any] = read_json(str(folder / REPORT))
    except Missing:
        raise UserError(f"{folder}: no {REPORT}. {command} writes it, at its end.") from None
    if content.get("format") != FORMAT:
        raise UserError(f"{folder / REPORT}: of format {content.get('format')}, and this version reads {FORMAT}. Run again: {command}")
    labels = list(dict.fromkeys(model["label"] for model in content["models"]))
    if against not in (None, *labels):
        raise UserError(f"--against {against}: no arm of the report. There are: {', '.join(labels)}")
    report = Report(folder, content, labels, against or str(content["against"]))
    rows = report.differences()
    return [*(line for shown in report.groups() for line in report.table(shown, rows)), *report.settings()]


@dataclass(frozen=True)
class Report:
    """A report, and whom its arms are compared with."""

    folder: Path
    content: dict[str, Any]
    labels: list[str]
    against: str

    def differences(self) -> Rows:
        """Those of the report; to another arm than it has, from the values of each image."""
        rows = self.content["differences"]
        if self.against != self.content["against"]:
            rows = [asdict(row) | {"p_holm": None} for row in self._computed()]
        return {(row["measure"], row["first"]): row for row in rows}

    def _computed(self) -> Sequence[Any]:
        models = [MeasuredModel(**each) for each in self.content["models"]]
        arrays = dict[str, list[Any]]()
        for model in models:
            arrays.setdefault(model.label, []).append(np.load(self.folder / model.arrays))
        measures = [Measure(**each) for each in self.content["measures"] if _is_shown(each)]
        values = {
            each.name: {label: [of_seed[each.name] for of_seed in of_arm] for label, of_arm in arrays.items() if each.name in of_arm[0]}
            for each in measures
        }
        families = read_json(str(self.folder / "arrays" / "images.json")).get("families")
        if families is None:
            raise UserError(
                f"{self.folder}: written by an earlier version, without the images' families. Run oar evaluate --flexibility again."
            )
        return arm_differences(
            measures, values, self.against, np.unique(families, return_inverse=True)[1], unpaired_arms(models, self.against)
        )

    def groups(self) -> Iterator[list[Mapping[str, Any]]]:
        """The measures that are shown, those of a table together; chapters that the report does not have are left out."""
        for chapter in CHAPTERS:
            shown = [each for each in self.content["measures"] if each["chapter"] == chapter and _is_shown(each)]
            yield from (list(group) for _, group in itertools.groupby(shown, key=_title))

    def table(self, shown: Sequence[Mapping[str, Any]], rows: Rows) -> Iterator[str]:
        """A row an arm, a column a measure."""
        means = {(each["measure"], each["label"]): each["figure"]["mean"] for each in self.content["figures"]}
        units = [unit for unit in dict.fromkeys(each["unit"] for each in shown) if unit]
        yield f"\n### {_title(shown[0])}: difference to {self.against} ({', '.join(units)})\n"
        yield _row(["arm", *(_column(each) for each in shown)])
        yield _row(["---"] * (len(shown) + 1))
        yield _row([f"{self.against}, itself", *(f"{means[each['name'], self.against]:.3f}" for each in shown)])
        for label in self.labels:
            if label != self.against:
                yield _row([label, *(_cell(rows[each["name"], label]) for each in shown)])

    def settings(self) -> Iterator[str]:
        """The settings that were chosen for each arm."""
        chosen = [row for row in self.content["sweep"] if row["chosen"]]
        if chosen:
            yield f"\n### settings, chosen on {self.content['sweep_images']}\n"
            yield _row(["arm", "temperature", "guidance", "at the edge of what was tried"])
            yield _row(["---"] * 4)
        for row in chosen:
            yield _row([row["label"], f"{row['temperature']:g}", f"{row['guidance']:g}", ", ".join(row["edges"]) or "-"])


def _title(measure: Mapping[str, Any]) -> str:
    """Of the table that a measure is a column of."""
    chapter, kind = measure["chapter"], measure["name"].split("/")[1]
    if chapter == "edits":
        return f"edits, {kind}"
    return "samples, each arm at its best settings" if (chapter, kind) == ("samples", "best") else str(chapter)


def _column(measure: Mapping[str, Any]) -> str:
    parts = measure["name"].split("/")[2 if measure["chapter"] == "edits" else 1 :]
    return " ".join(part for part in parts if part != "heldout")


def _is_shown(measure: Mapping[str, Any]) -> bool:
    """Left out are likelihoods along other arms' orders, as many as arms squared, and distances to reconstructions."""
    return not measure["name"].startswith("nll/own of") and not measure["name"].endswith("/decoded")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(row: Mapping[str, Any]) -> str:
    figure = row["comparison"]["difference"]
    interval = figure["over_both"] or figure["over_images"]
    half = math.nan if interval is None else Interval(**interval).half
    star = "*" if row["p_holm"] is not None and row["p_holm"] < 0.05 else ""
    return f"{figure['mean']:+.3f} ± {half:.3f}{star}"


if __name__ == "__main__":
    program(main)
