"""Learning rate by step."""

from __future__ import annotations

import math

from oar_scale.config.schema import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of 0-based ``step``: linear warm-up to ``lr``, then the schedule down to ``lr * final_lr_fraction``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    tail = config.tail_fraction * config.steps if config.schedule == "linear_tail" else config.steps - config.warmup_steps
    progress = max(0.0, 1 - (config.steps - step) / max(1, tail))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * remaining)
