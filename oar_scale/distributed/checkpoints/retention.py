"""Which checkpoints are kept: the newest ones, every m steps, the best by held-out likelihood; the newest committed one always."""

from __future__ import annotations

import math
from dataclasses import dataclass

from oar_scale.config.schema import TrainingConfig
from oar_scale.distributed.checkpoints import layout
from oar_scale.distributed.checkpoints.layout import MARKER, Damaged, Place

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

    place: Place
    names: tuple[str, ...]
    why: str


class Retention:
    """Decides what is removed from one stage's checkpoints; remembers the likelihoods that it has read."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self._nll: dict[int, float] = {}

    def removals(self, places: list[Place], now: float | None = None) -> list[Removal]:
        """What may go, of all that a stage has.

        Args:
            now: attempts without a marker that are younger than ``LEFT_OVER_S`` are let alone, as another process may be writing
                them; ``None``: the caller is the only one who writes here, and they all go.
        """
        committed = [place for place in places if place.committed]
        kept = self._kept(committed)
        found = []
        for place in places:
            if place.committed and place.step not in kept:
                found.append(Removal(place, tuple(sorted(place.names)), "not kept"))
                continue
            dead = _left_over(place, now)
            if dead:
                found.append(Removal(place, dead, "left over"))
        return found

    def _kept(self, committed: list[Place]) -> set[int]:
        steps = sorted(place.step for place in committed)
        kept = set(steps[-max(1, self._keep.newest) :])
        if self._keep.every:
            kept |= {step for step in steps if step % self._keep.every == 0}
        if self._keep.best:
            known = {place.step: self._likelihood(place) for place in committed}
            best = sorted((nll, -step) for step, nll in known.items() if math.isfinite(nll))
            kept |= {-step for _, step in best[: self._keep.best]}
        return kept

    def _likelihood(self, place: Place) -> float:
        if place.step not in self._nll:
            try:
                self._nll[place.step] = layout.read(place.uri).metrics.get(METRIC, math.nan)
            except Damaged:
                return math.nan
        return self._nll[place.step]


def _left_over(place: Place, now: float | None) -> tuple[str, ...]:
    """What attempts have left here that are not the committed one."""
    counts: str | None = None
    if place.committed and len(place.saves) == 1:
        return ()
    if place.committed:
        try:
            counts = layout.read(place.uri).save
        except Damaged:
            return ()  # which one it was is not known: whoever loads it, says so
    dead = {save for save in place.saves - {counts} if now is None or now - layout.begun(save) > LEFT_OVER_S}
    strange = {name for name in place.names if name != MARKER and name.split("/")[0] not in place.saves} if now is None else set()
    return tuple(sorted(strange | {name for name in place.names if name.split("/")[0] in dead}))


def prune(places: list[Place], retention: Retention, now: float | None = None) -> list[Removal]:
    """Remove what is not kept, markers first; returns what was removed."""
    removals = retention.removals(places, now)
    for removal in removals:
        layout.delete(removal.place.uri, removal.names)
    return removals
