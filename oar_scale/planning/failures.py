"""The cost of failures to a training run, and the best checkpoint interval.

    work |--interval--|save|--interval--|save|--in  X   lost since the last save that was uploaded, then the restart
                           `-- upload --'

With the time between failures M and the time a save stands in the way d, the best interval is about sqrt(2 d M) (Young, CACM 1974), and
with the next terms (Daly, FGCS 2006)

    sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + d / 18M) - d            for d < 2M, else M

The simulation draws the times between failures from an exponential distribution, with a seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

YEAR_S = 365.25 * 86400
HOPELESS = 20
"""A run that is expected to take so many times its time without failures counts as never ending."""


@dataclass(frozen=True)
class CheckpointTiming:
    """How a run saves checkpoints and what a failure costs it, in seconds."""

    interval_s: float
    """Training between two saves."""
    stall_s: float
    """Time for which a save stops training."""
    upload_s: float
    """Time from then until the checkpoint is uploaded and committed."""
    restart_s: float
    """Time from a failure to the next step, loading the checkpoint included."""
    between_failures_s: float
    """Mean time between failures; infinite where nothing fails."""


@dataclass(frozen=True)
class Survival:
    """Outcome of a run with failures, as the mean over simulated runs."""

    hours: float
    goodput: float
    """Share of the time that is training which was not lost."""
    goodput_low: float
    """5 % quantile of the goodput over the simulated runs."""
    failures: float
    lost_hours: float
    """Time of repeated training and of restarts."""


def between_failures(per_gpu_year: float, gpus: int) -> float:
    """Mean seconds between failures of a job on so many GPUs."""
    return YEAR_S / (per_gpu_year * gpus) if per_gpu_year else math.inf


def best_interval(stall_s: float, between_failures_s: float) -> float:
    """Daly's interval, in seconds; infinite where nothing fails."""
    if math.isinf(between_failures_s):
        return math.inf
    if stall_s >= 2 * between_failures_s:
        return between_failures_s
    ratio = stall_s / (2 * between_failures_s)
    return math.sqrt(2 * stall_s * between_failures_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def simulate_failures(work_s: float, saving: CheckpointTiming, *, seed: int, runs: int = 200) -> Survival:
    """Simulate ``work_s`` seconds of training with random failures, ``runs`` independent runs at once (vectorised)."""
    import numpy as np

    cycle = saving.interval_s + saving.stall_s
    plain = work_s + int(work_s / saving.interval_s) * saving.stall_s
    if math.isinf(saving.between_failures_s):
        return Survival(plain / 3600, work_s / plain, work_s / plain, 0.0, 0.0)
    if _expected(work_s, saving) > HOPELESS * (plain + saving.restart_s):
        return Survival(math.inf, 0.0, 0.0, math.inf, math.inf)
    draw = np.random.default_rng(seed)
    left, took, failures = np.full(runs, float(work_s)), np.zeros(runs), np.zeros(runs)
    alive = np.ones(runs, dtype=bool)
    starting = 0.0  # the first start is no restart
    while alive.any():
        up = draw.exponential(saving.between_failures_s, runs)
        need = starting + left + np.floor(left / saving.interval_s) * saving.stall_s
        ends = alive & (need <= up)
        took[ends] += need[ends]
        alive &= ~ends
        trained = np.maximum(0.0, up - starting)
        saved = np.maximum(0.0, np.floor((trained - saving.upload_s) / cycle)) * saving.interval_s
        took[alive] += up[alive]
        left[alive] -= np.minimum(saved, left - 1e-9)[alive]
        failures += alive
        starting = saving.restart_s
    good = work_s / took
    return Survival(
        hours=float(took.mean()) / 3600,
        goodput=float(good.mean()),
        goodput_low=float(np.quantile(good, 0.05)),
        failures=float(failures.mean()),
        lost_hours=float(took.mean() - plain) / 3600,
    )


def _expected(work_s: float, saving: CheckpointTiming) -> float:
    """Expected seconds of a run that fails many times: time between failures over the mean share of the work that it brings forward."""
    between, cycle = saving.between_failures_s, saving.interval_s + saving.stall_s
    first = math.exp(-(saving.restart_s + cycle + saving.upload_s) / between)  # probability that one save is committed
    gained = saving.interval_s * first / -math.expm1(-cycle / between)
    whole = math.exp(-(work_s + saving.restart_s) / between)  # or that the whole run is done without a failure
    return between / max(gained / work_s, whole) if max(gained, whole) else math.inf
