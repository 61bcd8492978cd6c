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
        self._own: dict[str, list[float]] = {}
        self.by_rank: dict[str, list[float]] = {}
        """What :meth:`flush` has made of each rank's own numbers: the mean over the steps, by rank."""

    def add(self, name: str, value: float, how: How = "mean") -> None:
        """Add a value; ``how`` it is combined with others, over the steps as over the ranks."""
        self._values.setdefault((name, how), []).append(value)

    def add_own(self, name: str, value: float) -> None:
        """Add a value that is not combined over the ranks, see :attr:`by_rank`."""
        self._own.setdefault(name, []).append(value)

    def flush(self) -> dict[str, float]:
        """Return all numbers since the last call, combined over all ranks. Collective."""
        keys = sorted(self._values)
        added, extreme = ([key for key in keys if (key[1] in ("mean", "sum")) == kind] for kind in (True, False))
        sums = torch.tensor([[sum(self._values[key]), len(self._values[key])] for key in added], dtype=torch.float64).view(-1, 2)
        signs = [-1 if how == "min" else 1 for _, how in extreme]
        most = torch.tensor(
            [max(sign * value for value in self._values[key]) for key, sign in zip(extreme, signs, strict=True)], dtype=torch.float64
        )
        own = torch.zeros(len(self._own), self._process.world, dtype=torch.float64)
        for row, values in zip(own, self._own.values(), strict=True):
            row[self._process.rank] = sum(values) / len(values)
        together = self._process.all_reduce(torch.cat([sums.flatten(), own.flatten()]))  # one collective for both
        sums, own = together[: sums.numel()].view_as(sums), together[sums.numel() :].view_as(own)
        self._process.all_reduce(most, "max")
        self.by_rank, self._own = dict(zip(self._own, own.tolist(), strict=True)), {}
        combined = {
            name: total / count if how == "mean" else total for (name, how), (total, count) in zip(added, sums.tolist(), strict=True)
        }
        combined |= {name: sign * value for (name, _), sign, value in zip(extreme, signs, most.tolist(), strict=True)}
        self._values = {}
        return combined
