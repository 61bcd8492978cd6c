"""Which checkpoints are kept: the newest, every m-th step, the best by held-out likelihood; always the newest committed one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from oar_scale.config.schema import TrainingConfig
from oar_scale.distributed.checkpoints import layout
from oar_scale.distributed.checkpoints.layout import MANIFEST, CheckpointLocation, DamagedCheckpoint

METRIC = "nll_random"
"""The metric by which the best are chosen; lower is better."""
LEFT_OVER_S = 3600.0
"""Age after which an attempt without a marker counts as interrupted."""


@dataclass(frozen=True)
class Keep:
    """Retention policy: the ``newest`` n, the multiples of ``every``, the ``best`` n; 0: none of that kind."""

    newest: int
    every: int = 0
    best: int = 0

    @classmethod
    def of(cls, training: TrainingConfig) -> Keep:
        """The retention policy of a training stage in the recipe."""
        return cls(training.keep_checkpoints, training.keep_every, training.keep_best)


@dataclass(frozen=True)
class Removal:
    """Objects of a step that are to be removed."""

    location: CheckpointLocation
    names: tuple[str, ...]
    why: str
    attempts: tuple[str, ...] = ()
    """Those without a marker, which have to be given up before anything of them is removed."""

    def without(self, save: str) -> Removal:
        """What is removed if that attempt stays."""
        names = tuple(name for name in self.names if not name.startswith(f"{save}/"))
        return replace(self, names=names, attempts=tuple(each for each in self.attempts if each != save))


class Retention:
    """Decides which checkpoints of a stage are removed; caches the likelihoods that it has read."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self._nll: dict[int, float] = {}

    def removals(self, locations: list[CheckpointLocation], now: float) -> list[Removal]:
        """The objects of a stage that are to be removed.

        Args:
            locations: all steps of the stage.
            now: unix seconds; attempts without a marker stay until they are ``LEFT_OVER_S`` old, as another process may be writing them.
        """
        committed = [location for location in locations if location.committed]
        kept = self._kept(committed)
        removals = []
        for location in locations:
            if location.committed and location.step not in kept:
                removals.append(Removal(location, tuple(sorted(location.names)), "not kept"))
                continue
            attempts = _left_over(location, now)
            if attempts:
                names = tuple(sorted(name for name in location.names if name.split("/")[0] in attempts))
                removals.append(Removal(location, names, "left over", attempts))
        return removals

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


def _left_over(location: CheckpointLocation, now: float) -> tuple[str, ...]:
    """Attempts other than the committed one that started long ago."""
    committed_save: str | None = None
    if location.committed and len(location.saves) == 1:
        return ()
    if location.committed:
        try:
            committed_save = layout.read_checkpoint(location.uri).save
        except DamagedCheckpoint:
            return ()  # it is not known which attempt was committed; loading it reports the damage
    return tuple(sorted(save for save in location.saves - {committed_save} if now - layout.save_started(save) > LEFT_OVER_S))


def prune(locations: list[CheckpointLocation], retention: Retention, now: float) -> list[Removal]:
    """Remove what is not kept, markers first. Arguments as :meth:`Retention.removals`.

    Returns:
        What was removed.
    """
    removed = []
    for removal in retention.removals(locations, now):
        for save in removal.attempts:
            if not layout.give_up(removal.location.uri, save):
                removal = removal.without(save)
        if removal.names:
            given_up = {f"{save}/{MANIFEST}" for save in removal.attempts}  # giving up writes it
            layout.delete(removal.location.uri, given_up.union(removal.names))
            removed.append(removal)
    return removed
