"""Numbers gathered over the steps of a window, then over the ranks, for one ``train`` event."""

from __future__ import annotations

from typing import Literal

import torch

from oar_scale.training.process import TrainingProcess

How = Literal["mean", "sum", "max", "min"]


class Metrics:
    """:meth:`add` is local and cheap; :meth:`flush` is collective. Every rank adds the same names."""

    def __init__(self, process: TrainingProcess) -> None:
        self._process = process
        self._values: dict[tuple[str, How], list[float]] = {}

    def add(self, name: str, value: float, how: How = "mean") -> None:
        """Add a value; ``how`` it is combined with others, over the steps as over the ranks."""
        self._values.setdefault((name, how), []).append(value)

    def flush(self) -> dict[str, float]:
        """Return all numbers since the last call, combined over all ranks. Collective."""
        keys = sorted(self._values)
        added, extreme = ([key for key in keys if (key[1] in ("mean", "sum")) == kind] for kind in (True, False))
        sums = torch.tensor([[sum(self._values[key]), len(self._values[key])] for key in added], dtype=torch.float64).view(-1, 2)
        signs = [-1 if how == "min" else 1 for _, how in extreme]
        most = torch.tensor(
            [max(sign * value for value in self._values[key]) for key, sign in zip(extreme, signs, strict=True)], dtype=torch.float64
        )
        self._process.all_reduce(sums)
        self._process.all_reduce(most, "max")
        values = {name: total / count if how == "mean" else total for (name, how), (total, count) in zip(added, sums.tolist(), strict=True)}
        values |= {name: sign * value for (name, _), sign, value in zip(extreme, signs, most.tolist(), strict=True)}
        self._values = {}
        return values
