"""The tables of docs/results/evidence-emoji.md, in Markdown, from a flexibility report: each arm's difference to one of them.

    python tools/flexibility_tables.py runs/emoji-evidence/flexibility                          to the control
    python tools/flexibility_tables.py runs/emoji-evidence/flexibility --against any_order      to any other arm

Differences are means over seeds and images with the half-width of their 95 % interval over both. Those to the arm that the report
compares with carry a * where the corrected p (Holm) is below 0.05; to others nothing is corrected.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oar_scale.errors import UserError
from oar_scale.evaluation.flexibility.comparison import arm_differences
from oar_scale.results.flexibility import ArmDifference, Measure
from oar_scale.run.artifacts import read_families
from oar_scale.studies.trained_arms import open_run

CHAPTERS = ("likelihood", "calibration", "samples", "diversity", "edits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="a folder that oar evaluate --flexibility wrote")
    parser.add_argument("--against", help="a label; default: as in the report")
    arguments = parser.parse_args()
    for line in tables(arguments.report, arguments.against):
        print(line)


def tables(folder: Path, against: str | None = None) -> list[str]:
    """The lines of all tables. Raises UserError where the folder has no report, or the report no arm of that label."""
    try:
        content = json.loads((folder / "flexibility.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no flexibility.json. oar evaluate --flexibility ... --out {folder} writes it, at its end.") from None
    labels = list(dict.fromkeys(model["label"] for model in content["models"]))
    if against not in (None, *labels):
        raise UserError(f"--against {against}: no arm of the report. There are: {', '.join(labels)}")
    report = Report(folder, content, labels, against)
    found = report.differences()
    return [*(line for chapter in CHAPTERS for line in report.table(chapter, found)), *report.settings()]


@dataclass(frozen=True)
class Report:
    """A report and whom its arms are compared with."""

    folder: Path
    content: dict[str, Any]
    labels: list[str]
    against: str | None

    @property
    def second(self) -> str:
        """The label that is subtracted."""
        return self.against or str(self.content["against"])

    def measures(self) -> list[Measure]:
        """All but likelihoods along other arms' orders, as many as arms squared, and distances to reconstructions."""
        found = [Measure(**each) for each in self.content["measures"]]
        return [each for each in found if not each.name.startswith("nll/own of") and not each.name.endswith("/decoded")]

    def differences(self) -> dict[tuple[str, str], ArmDifference]:
        """By the measure's name and the arm's label, from the values of each image."""
        arrays: dict[str, list[Any]] = {}
        for model in self.content["models"]:
            arrays.setdefault(model["label"], []).append(np.load(self.folder / model["arrays"]))
        measures = self.measures()
        values = {each.name: {label: [seed[each.name] for seed in seeds] for label, seeds in arrays.items()} for each in measures}
        return {(row.measure, row.first): row for row in arm_differences(measures, values, self.second, self.families())}

    def families(self) -> NDArray[np.int64]:
        """The number of the family of each image [S]."""
        run, keys = open_run(str(self.content["run"])), json.loads((self.folder / "arrays/images.json").read_text())["keys"]
        names, numbers = read_families(run, str(self.content["split"])), dict[str, int]()
        return np.array([numbers.setdefault(names.get(key) or f"image {key}", len(numbers)) for key in keys])

    def table(self, chapter: str, found: Mapping[tuple[str, str], ArmDifference]) -> Iterator[str]:
        """A table of a chapter: a row an arm, a column a measure; nothing where the report has no such chapter."""
        measures = [each for each in self.measures() if each.chapter == chapter]
        if not measures:
            return
        means = {(each["measure"], each["label"]): each["figure"]["mean"] for each in self.content["figures"]}
        yield f"\n### {chapter}: difference to {self.second} ({', '.join(dict.fromkeys(each.unit for each in measures))})\n"
        yield _row(["arm", *(" ".join(part for part in each.name.split("/")[1:] if part != "heldout") for each in measures)])
        yield _row(["---"] * (len(measures) + 1))
        yield _row([f"{self.second}, itself", *(f"{means[each.name, self.second]:.3f}" for each in measures)])
        for label in self.labels:
            if label != self.second:
                yield _row([label, *(_cell(found[each.name, label], self.against is None) for each in measures)])

    def settings(self) -> Iterator[str]:
        """The settings that were chosen for each arm."""
        chosen = [row for row in self.content["sweep"] if row["chosen"]]
        if chosen:
            yield f"\n### settings, chosen on {self.content['sweep_images']}\n"
            yield _row(["arm", "temperature", "guidance", "at the edge of what was tried"])
            yield _row(["---"] * 4)
        for row in chosen:
            yield _row([row["label"], f"{row['temperature']:g}", f"{row['guidance']:g}", ", ".join(row["edges"]) or "-"])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(row: ArmDifference, corrected: bool) -> str:
    figure = row.comparison.difference
    interval = figure.over_both or figure.over_images
    half = math.nan if interval is None else (interval.high - interval.low) / 2
    star = "*" if corrected and row.p_holm is not None and row.p_holm < 0.05 else ""
    return f"{figure.mean:+.3f} ± {half:.3f}{star}"


if __name__ == "__main__":
    main()
