"""Best against best: the temperature and guidance of each arm whose samples are nearest to some images, for figures on others.

An arm's distance is the mean of its seeds'. The images that a setting is chosen on are of other families than those of the figures
(``studies.flexibility``), and the samples for them have noise of their own: a setting is not judged by what it was chosen for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from oar_scale.errors import UserError
from oar_scale.evaluation.flexibility.pieces import Arrays
from oar_scale.evaluation.flexibility.sampling import SampleWork
from oar_scale.evaluation.flexibility.subjects import Arm, Source, values_of
from oar_scale.generation.settings import SampleSettings
from oar_scale.results.flexibility import SweepRow
from oar_scale.results.statistics import clustered_error

FIELDS = ("temperature", "guidance")
Choice = dict[str, float]
"""A value for some of :data:`FIELDS`."""


def parse_sweep(text: str) -> list[Choice]:
    """All combinations of ``temperature=0.6,0.8,1.0;guidance=1,2,4``. Raises UserError for anything else."""
    values: dict[str, list[float]] = {}
    for part in text.split(";"):
        name, _, listed = part.partition("=")
        try:
            numbers = [float(each) for each in listed.split(",")]
        except ValueError:
            numbers = []
        if name.strip() not in FIELDS or name.strip() in values or not numbers:
            raise UserError(f'--sweep {text}: wanted is "temperature=0.8,1;guidance=1,2,4", or one of the two')
        values[name.strip()] = numbers
    return [dict(zip(values, each, strict=True)) for each in product(*values.values())]


def settings_of(base: SampleSettings, choice: Choice) -> SampleSettings:
    """Settings with the values of a choice. Raises UserError for values that cannot be."""
    try:
        return replace(base, temperature=choice.get("temperature", base.temperature), guidance=choice.get("guidance", base.guidance))
    except ValueError as error:
        raise UserError(f"--sweep: {error}") from error


@dataclass(frozen=True)
class Sweep:
    """All arms' samples for the images that settings are chosen on, with each choice."""

    work: SampleWork
    choices: Sequence[Choice]

    def sources(self) -> list[Source]:
        """Distances to those images."""
        return [
            source
            for index, choice in enumerate(self.choices)
            for model in (model for arm in self.work.arms for model in arm.models)
            for source in self.work.distances(str(index), model, self.work.pieces(model, settings_of(self.work.settings, choice)))[:1]
        ]

    def rows(self, results: Mapping[str, Arrays]) -> tuple[SweepRow, ...]:
        """The distance of each arm with each choice; its smallest is chosen, the first of equal ones."""
        shares: dict[tuple[str, int], list[NDArray[np.float64]]] = {}
        sources = self.sources()
        for source, share_S in zip(sources, values_of(sources, results), strict=True):
            shares.setdefault((source.label, int(source.measure.split("/")[1])), []).append(share_S)
        rows = list[SweepRow]()
        for arm in self.work.arms:
            rows += self._of_arm(arm.label, [np.mean(shares[arm.label, index], axis=0) for index in range(len(self.choices))])
        return tuple(rows)

    def _of_arm(self, label: str, shares: Sequence[NDArray[np.float64]]) -> Iterator[SweepRow]:
        """The rows of an arm from the shares [S] of its distance with each choice."""
        best, families_S = int(np.argmin([each_S.mean() for each_S in shares])), self.work.images.families_S
        for index, (choice, each_S) in enumerate(zip(self.choices, shares, strict=True)):
            used, above_S = settings_of(self.work.settings, choice), each_S - shares[best]
            yield SweepRow(
                label,
                used.temperature,
                used.guidance,
                float(each_S.mean()),
                clustered_error(each_S, families_S) or 0.0,
                float(above_S.mean()),
                clustered_error(above_S, families_S) or 0.0,
                index == best,
                self._edges(choice) if index == best else (),
            )

    def _edges(self, choice: Choice) -> tuple[str, ...]:
        """The settings of a choice beyond whose value nothing was tried on one side."""
        tried = {name: {each[name] for each in self.choices} for name in choice}
        return tuple(name for name, values in tried.items() if len(values) > 1 and choice[name] in (min(values), max(values)))


def best_sources(work: SampleWork, rows: Sequence[SweepRow]) -> list[Source]:
    """The distances of samples that each arm draws with what was chosen for it."""
    chosen = {row.label: {"temperature": row.temperature, "guidance": row.guidance} for row in rows if row.chosen}
    return [source for arm in work.arms for source in _of_arm(work, arm, settings_of(work.settings, chosen[arm.label]))]


def _of_arm(work: SampleWork, arm: Arm, settings: SampleSettings) -> list[Source]:
    return [source for model in arm.models for source in work.distances("best", model, work.pieces(model, settings))]
