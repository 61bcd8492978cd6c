"""Pearson's chi-square test, without a statistics package."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def deviation(counts: Tensor, expected: Tensor | float) -> float:
    """By how many standard deviations Pearson's statistic is above its mean under the hypothesis, after Wilson and Hilferty.

    Bins of which less than 5 are expected are taken together.
    """
    wanted = torch.as_tensor(expected, dtype=torch.float64).expand(counts.shape)
    counts, rare = counts.double(), wanted < 5
    if rare.any():
        counts, wanted = (torch.cat([each[~rare], each[rare].sum()[None]]) for each in (counts, wanted))
    freedom = len(counts) - 1
    statistic = float(((counts - wanted) ** 2 / wanted.clamp_min(1e-9)).sum())
    spread = 2 / (9 * freedom)
    return (math.cbrt(statistic / freedom) - (1 - spread)) / math.sqrt(spread)
