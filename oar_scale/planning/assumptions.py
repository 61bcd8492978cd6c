"""The figures that a plan assumes: those of ``assumptions.yaml``, or the user's own instead.

assumed = read_assumptions(["storage.s3_read_gb_s=5"])
assumed("storage.s3_read_gb_s")          5.0; from now on it is among those that were used
assumed.used()                           for the plan to print
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ruamel.yaml import YAML

from oar_scale.errors import UserError

GIVEN = "given with this plan"
_DIVISORS = re.compile(r"mfu\..*|.*(_gb_s|_tflops|_per_s|_mfu|_efficiency|bandwidth_share)")
"""Rates, and shares of them: with 0 nothing would ever end."""
_SHARES = re.compile(r"mfu\..*|.*(_mfu|_efficiency|_share)")
"""Shares of a whole: with more than 1 a step would compute more than its GPUs can, or hide more than it sends."""


@dataclass(frozen=True)
class Assumption:
    """One assumed figure and where it is from."""

    key: str
    value: float
    source: str
    date: str
    """Month in which the source was read; empty for what the user gave."""


class Assumptions:
    """All figures by dotted key; remembers which were read."""

    def __init__(self, figures: dict[str, Assumption], labels: dict[str, str], mfu: list[tuple[float, str]]) -> None:
        self._figures, self._labels, self._mfu = figures, labels, mfu
        self._used: dict[str, Assumption] = {}

    def __call__(self, key: str) -> float:
        self._used[key] = self._figures[key]
        return self._figures[key].value

    def used(self) -> list[Assumption]:
        """Those that were read, in the order of the file."""
        return [self._used[key] for key in self._figures if key in self._used]

    def replaced(self, key: str, value: float) -> Assumptions:
        """A copy with another value for one figure.

        Raises:
            UserError: no such key, or a value that it cannot have.
        """
        if key not in self._figures:
            near = difflib.get_close_matches(key, self._figures, n=3, cutoff=0.4)
            known = f"Did you mean {', '.join(near)}?" if near else f"Keys: {', '.join(self._figures)}."
            raise UserError(f"--assume {key}: there is no such assumption. {known}")
        if not 0 <= value < float("inf"):
            raise UserError(f"--assume {key}={value:g}: a number that is not negative is needed")
        if not value and _DIVISORS.fullmatch(key):
            raise UserError(f"--assume {key}=0: a number above 0 is needed, or it would take for ever")
        if key.startswith("data_sets.") and (value < 1 or value != int(value)):
            raise UserError(f"--assume {key}={value:g}: images of a data set are a whole number from 1; --images N says those of this run")
        if value > 1 and _SHARES.fullmatch(key):
            raise UserError(f"--assume {key}={value:g}: a share of the whole is at most 1, e.g. {key}={self._figures[key].value:g}")
        return Assumptions({**self._figures, key: Assumption(key, value, GIVEN, "")}, self._labels, self._mfu)

    def gpu_label(self, gpu: str) -> str:
        """The display name of a GPU.

        Raises:
            UserError: an unknown one.
        """
        if gpu not in self._labels:
            raise UserError(
                f"--gpu {gpu}: not known; there are {', '.join(self._labels)}. For another one take the nearest and say what differs, "
                "e.g. --gpu h100 --assume gpus.h100.memory_gb=96"
            )
        return self._labels[gpu]

    def mfu(self, parameters: int) -> float:
        """Share of the peak that training a model of this size makes use of."""
        return self(next((key for most, key in self._mfu if parameters <= most), self._mfu[-1][1]))

    def mfu_keys(self) -> list[str]:
        """Keys of the MFU figures, by model size."""
        return [key for _, key in self._mfu]

    def data_set(self, names: Sequence[str]) -> int | None:
        """Images of the data set whose name one of ``names`` begins with, the longest such name first."""
        known = sorted((key for key in self._figures if key.startswith("data_sets.")), key=len, reverse=True)
        for name in names:
            for key in known:
                if name.startswith(key.removeprefix("data_sets.")):
                    return int(self(key))
        return None


def read_assumptions(overrides: Sequence[str] = ()) -> Assumptions:
    """The shipped figures, with each ``KEY=VALUE`` instead of the shipped one.

    Raises:
        UserError: an override that is none.
    """
    assumptions = _shipped()
    for override in overrides:
        key, equals, text = override.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not equals or value != value:
            raise UserError(f"--assume {override}: KEY=NUMBER is needed, e.g. --assume storage.s3_read_gb_s=5")
        assumptions = assumptions.replaced(key, value)
    return assumptions


def _shipped() -> Assumptions:
    table = YAML(typ="safe", pure=True).load(files(__package__).joinpath("assumptions.yaml").read_text(encoding="utf-8"))
    sources, figures = table.pop("sources"), dict[str, Assumption]()
    labels = {gpu: str(row["label"]) for gpu, row in table["gpus"].items()}
    mfu = [(float(row["parameters"]), f"mfu.{size}.value") for size, row in table["mfu"].items()]
    for key, leaf in _leaves(table, ""):
        value, source = leaf
        figures[key] = Assumption(key, float(value), sources[source]["text"], str(sources[source]["date"]))
    return Assumptions(figures, labels, mfu)


def _leaves(value: object, name: str) -> list[tuple[str, list[Any]]]:
    """``a.b`` and [value, source] of each figure."""
    if isinstance(value, list):
        return [(name, value)]
    if not isinstance(value, dict):
        return []
    return [leaf for key, item in value.items() for leaf in _leaves(item, f"{name}.{key}" if name else str(key))]
