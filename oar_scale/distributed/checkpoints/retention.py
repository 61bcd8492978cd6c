"""Which checkpoints are kept: the newest ones, every m steps, the best by held-out likelihood; the newest committed one always."""

from __future__ import annotations

import math
from dataclasses import dataclass

from oar_scale.config.schema import TrainingConfig
from oar_scale.distributed.checkpoints import layout
from oar_scale.distributed.checkpoints.layout import MARKER, CheckpointLocation, DamagedCheckpoint

METRIC = "nll_random"
"""What the best are best in; lower is better."""
LEFT_OVER_S = 3600.0
"""Age after which an attempt that nobody committed counts as dead."""


@dataclass(frozen=True)
class Keep:
    """What is kept: the ``newest`` n, the multiples of ``every``, the ``best`` n; 0 = none of that kind."""

    newest: int
    every: int = 0
    best: int = 0

    @classmethod
    def of(cls, training: TrainingConfig) -> Keep:
        return cls(training.keep_checkpoints, training.keep_every, training.keep_best)


@dataclass(frozen=True)
class Removal:
    """Objects of a step that are not kept."""

    location: CheckpointLocation
    names: tuple[str, ...]
    why: str


class Retention:
    """Decides what is removed from one stage's checkpoints; remembers the likelihoods that it has read."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self._nll: dict[int, float] = {}

    def removals(self, locations: list[CheckpointLocation], now: float | None = None) -> list[Removal]:
        """What may go, of all that a stage has.

        Args:
            now: attempts without a marker that are younger than ``LEFT_OVER_S`` are let alone, as another process may be writing
                them; ``None``: the caller is the only one who writes here, and they all go.
        """
        committed = [location for location in locations if location.committed]
        kept = self._kept(committed)
        found = []
        for location in locations:
            if location.committed and location.step not in kept:
                found.append(Removal(location, tuple(sorted(location.names)), "not kept"))
                continue
            dead = _left_over(location, now)
            if dead:
                found.append(Removal(location, dead, "left over"))
        return found

    def _kept(self, committed: list[CheckpointLocation]) -> set[int]:
        steps = sorted(location.step for location in committed)
        kept = set(steps[-max(1, self._keep.newest) :])
        if self._keep.every:
            kept |= {step for step in steps if step % self._keep.every == 0}
        if self._keep.best:
            known = {location.step: self._likelihood(location) for location in committed}
            best = sorted((nll, -step) for step, nll in known.items() if math.isfinite(nll))
            kept |= {-step for _, step in best[: self._keep.best]}
        return kept

    def _likelihood(self, location: CheckpointLocation) -> float:
        if location.step not in self._nll:
            try:
                self._nll[location.step] = layout.read_checkpoint(location.uri).metrics.get(METRIC, math.nan)
            except DamagedCheckpoint:
                return math.nan
        return self._nll[location.step]


def _left_over(location: CheckpointLocation, now: float | None) -> tuple[str, ...]:
    """What attempts have left here that are not the committed one."""
    counts: str | None = None
    if location.committed and len(location.saves) == 1:
        return ()
    if location.committed:
        try:
            counts = layout.read_checkpoint(location.uri).save
        except DamagedCheckpoint:
            return ()  # which one it was is not known: whoever loads it, says so
    dead = {save for save in location.saves - {counts} if now is None or now - layout.save_started(save) > LEFT_OVER_S}
    strange = {name for name in location.names if name != MARKER and name.split("/")[0] not in location.saves} if now is None else set()
    return tuple(sorted(strange | {name for name in location.names if name.split("/")[0] in dead}))


def prune(locations: list[CheckpointLocation], retention: Retention, now: float | None = None) -> list[Removal]:
    """Remove what is not kept, markers first; returns what was removed."""
    removals = retention.removals(locations, now)
    for removal in removals:
        layout.delete(removal.location.uri, removal.names)
    return removals
