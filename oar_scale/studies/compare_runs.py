"""``oar compare RUN...``: the arms of runs side by side, over their seeds.

For each measure a row an arm: the mean over its seeds, and the interval that such trainings would have it in (Student's t of the seeds'
values; a single seed has none). Beside it the difference to the control, paired by seed. An arm of several runs is one row where these
runs differ in nothing but the seed.

Figures of other images or with other settings (of a flexibility report or an evaluation) are measures of their own, never subtracted from
one another. Arms are compared where they differ in nothing but the orders: another start, other samples, views or numbers of updates are an
error, or with ``anyway`` a mark on the row.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.results.statistics import Interval, t_interval, t_test
from oar_scale.runtime.tables import text_table
from oar_scale.storage import write_json
from oar_scale.studies.trained_arms import Conditions, TrainedArm, trained_arms

FORMAT = 1
MARK = "!"
SHOWN = 80
"""Characters of a value in an error."""


@dataclass(frozen=True)
class OverSeeds:
    """A mean over seeds."""

    mean: float
    seeds: int
    interval: Interval | None
    """None of a single seed."""
    p: float | None = None
    """Of a difference: two-sided, by Student's t. None of a single seed, and of what is no difference."""


@dataclass(frozen=True)
class ArmRow:
    """An arm: one or several seeds of it."""

    label: str
    trained: tuple[TrainedArm, ...]
    differs: tuple[str, ...]
    """In what else than the orders it differs from the first arm of all: only ``--anyway``."""


def run_compare_runs(paths: Sequence[str], *, out: str | None = None, anyway: bool = False) -> list[str]:
    """Compare the finished fine-tunings of runs; returns lines for people, and writes the figures to ``out``.

    Raises:
        UserError: no run, nothing that is finished, or runs that differ in more than the orders.
    """
    trained, notes = list[TrainedArm](), list[str]()
    for path in dict.fromkeys(paths):
        of_run, notes_of_run = trained_arms(path)
        trained, notes = trained + of_run, notes + notes_of_run
    rows = arm_rows(trained, anyway=anyway)
    if out is not None:
        write_json(out, comparison(rows, notes))
    return list(comparison_lines(rows, notes))


def arm_rows(trained: Sequence[TrainedArm], *, anyway: bool = False) -> list[ArmRow]:
    """The rows of the comparison. Raises UserError for what differs in more than the orders, unless ``anyway``."""
    first, groups = trained[0], dict[str, list[TrainedArm]]()
    for each in told_apart(trained):
        key = json.dumps([each.arm, each.orders, each.alike], sort_keys=True)
        taken = any(other.seed == each.seed for other in groups.get(key, ()))
        groups.setdefault(key + each.run if taken else key, []).append(each)
    names = [members[0].arm for members in groups.values()]
    rows = []
    for members in groups.values():
        one = members[0]
        differs = tuple(sorted(name for name in {**first.alike, **one.alike} if first.alike.get(name) != one.alike.get(name)))
        if differs and not anyway:
            raise UserError(_unlike(first, one, differs[0]))
        label = one.arm if names.count(one.arm) == 1 else f"{one.arm} ({one.run})"
        rows.append(ArmRow(label, tuple(sorted(members, key=lambda each: (each.number, each.run))), differs))
    return rows


def told_apart(trained: Sequence[TrainedArm]) -> list[TrainedArm]:
    """The arms, with figures of one name that are of other images or settings as measures of their own, named by what differs."""
    conditions: dict[str, dict[str, Conditions]] = {}
    for each in trained:
        for measure, measured_on in each.measured_on.items():
            conditions.setdefault(measure, {})[json.dumps(measured_on, sort_keys=True)] = measured_on

    def name_of(measure: str, measured_on: Conditions) -> str:
        others = conditions[measure].values()
        differs = [name for name in measured_on if any(other.get(name) != measured_on[name] for other in others)]
        return f"{measure} [{', '.join(f'{name} {_short(measured_on[name])}' for name in differs)}]" if differs else measure

    return [
        replace(each, figures={name_of(name, each.measured_on[name]): value for name, value in each.figures.items()}) for each in trained
    ]


def _short(value: object) -> str:
    """A value in a name: of a long one the beginning, and a checksum that tells it from others."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... (crc {zlib.crc32(text.encode()):08x})"


def _unlike(first: TrainedArm, other: TrainedArm, name: str) -> str:
    here, there = (json.dumps(each.alike.get(name))[:SHOWN] for each in (other, first))
    return (
        f"{other.run} (stage {other.stage}): {name} is {here}, and {there} in {first.run} (stage {first.stage}). "
        "Arms are compared that differ in nothing but the orders.\n"
        "Leave that run out, or compare it with a mark on its rows: --anyway"
    )


def measures_of(rows: Sequence[ArmRow]) -> list[str]:
    """The names of everything that was measured of any arm."""
    return list(dict.fromkeys(name for row in rows for each in row.trained for name in each.figures))


def mean_of(row: ArmRow, measure: str) -> OverSeeds | None:
    """The mean of a measure over an arm's seeds; None where it was not measured."""
    return _over_seeds([each.figures[measure] for each in row.trained if measure in each.figures])


def minus_control(row: ArmRow, rows: Sequence[ArmRow], measure: str) -> OverSeeds | None:
    """The difference to the control of the same seed, over the seeds that have one; None where none has."""
    pairs = [(each, control) for each in row.trained if (control := _control_of(each, rows)) is not None and control is not each]
    differences = [one.figures[measure] - two.figures[measure] for one, two in pairs if measure in one.figures and measure in two.figures]
    found = _over_seeds(differences)
    return found and OverSeeds(found.mean, found.seeds, found.interval, t_test(differences))


def _control_of(arm: TrainedArm, rows: Sequence[ArmRow]) -> TrainedArm | None:
    """The control that differs from an arm in the orders alone: of the same run, else of another one."""
    controls = [each for row in rows for each in row.trained if each.arm == "control" and each.seed == arm.seed and each.alike == arm.alike]
    return min(controls, key=lambda each: each.run != arm.run, default=None)


def _over_seeds(values: list[float]) -> OverSeeds | None:
    return OverSeeds(float(np.mean(values)), len(values), t_interval(values)) if values else None


def comparison(rows: Sequence[ArmRow], notes: Sequence[str]) -> JsonObject:
    """All figures, for other programs."""
    measures = measures_of(rows)
    return {
        "format": FORMAT,
        "measures": measures,
        "arms": [
            {
                "arm": row.label,
                "differs": list(row.differs),
                "orders": row.trained[0].orders,
                "seeds": [_of_seed(each) for each in row.trained],
                "mean": {name: asdict(found) for name in measures if (found := mean_of(row, name))},
                "minus_control": {name: asdict(found) for name in measures if (found := minus_control(row, rows, name))},
            }
            for row in rows
        ],
        "notes": list(notes),
    }


def _of_seed(arm: TrainedArm) -> JsonObject:
    plain = {name: getattr(arm, name) for name in ("run", "stage", "number", "seed", "model", "alike", "figures")}
    return {**plain, "curves": {name: [list(point) for point in curve] for name, curve in arm.curves.items()}}


def comparison_lines(rows: Sequence[ArmRow], notes: Sequence[str]) -> Iterator[str]:
    """A table for each measure."""
    for measure in measures_of(rows):
        yield f"{measure}{_unit(measure)}"
        head = ["arm", "seeds", "mean", "95 % interval", "- control", "95 % interval", "p", "each seed"]
        yield from (f"  {line}" for line in text_table([head, *_table(rows, measure)]))
        yield ""
    for row in rows:
        if row.differs:
            yield f"{MARK} {row.label} differs from {rows[0].label} in more than the orders: {', '.join(row.differs)}"
    if all(len(row.trained) == 1 for row in rows):
        yield "One seed of each arm: there are no intervals, and a difference may be chance. pipeline.seeds adds some."
    yield from notes


def _unit(measure: str) -> str:
    if measure.startswith("flexibility"):  # which says its own
        return ""
    if measure == "training loss":
        return " (nats per code, each arm's along its own orders: it does not say which arm is better)"
    return " (lower is better)" if "kid" in measure else " (nats per code, lower is better)"


def _table(rows: Sequence[ArmRow], measure: str) -> Iterator[list[str]]:
    for row in rows:
        mean, difference = mean_of(row, measure), minus_control(row, rows, measure)
        if mean is not None:
            values = " ".join(f"{each.figures[measure]:.4f}" for each in row.trained if measure in each.figures)
            beside = [f"{difference.mean:+.4f}", _interval(difference, "+.4f"), _p(difference)] if difference else ["", "", ""]
            label = f"{row.label} {MARK}" if row.differs else row.label
            yield [label, str(mean.seeds), f"{mean.mean:.4f}", _interval(mean, ".4f"), *beside, values]


def _interval(found: OverSeeds, form: str) -> str:
    return f"{found.interval.low:{form}} to {found.interval.high:{form}}" if found.interval else "none: one seed"


def _p(found: OverSeeds) -> str:
    return "" if found.p is None else f"{found.p:.3f}" if found.p >= 0.001 else "< 0.001"
