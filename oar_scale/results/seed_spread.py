"""How much a difference of two arms varies from seed to seed, as all arms tell together, and which arms vary more than the others.

Three seeds of two arms tell little about their own spread. Arms and seeds are randomised blocks, for all arms of one seed have seen the
same samples: the mean of arm a at seed r is m_a + b_r + e_ar, with e of one variance in all arms. That they share it is tested (F, exact
for normal values): of 15 arms of 3 seeds one that varies ten times as much would be told from a control that it equals in more than a
third of all cases, not in 5 % (counted in ``tests/results/test_seed_spread.py``).

    p <= 0.1            a difference with this arm (if it is the control: each difference) is judged by the spread of its two arms alone
    p <= 0.1 / arms     the arm is left out of what the others tell as well: so strict, since leaving out what is large by chance alone
                        makes the rest look smaller than it is

An arm that varies less than the others stays: its differences then hold less often than they could, never more often.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from oar_scale.results.statistics import Floats, SeedSpread, scipy_stats

DOUBTFUL = 0.1
"""p at which an arm is taken to vary more than the others."""


def pooled_spread(arms: Mapping[str, ArrayLike]) -> SeedSpread | None:
    """How much the difference of two arms varies, as those tell that vary alike.

    Its variance is twice that of the residuals of the table of means, arm by seed, with (arms - 1) (seeds - 1) degrees of freedom. (The
    mean of the variances of all arms' differences to a control would hold the control's own values once for all arms, and have fewer
    degrees of freedom than it seems to: its test is wrong more often than it says.)

    Args:
        arms: values [R, S] of each, of the same seeds, the control among them; 2 arms give what their differences give alone.

    Returns:
        None of one arm or one seed.
    """
    means_KR = np.array([np.atleast_2d(np.asarray(each, dtype=np.float64)).mean(1) for each in arms.values()])
    if min(means_KR.shape) < 2:
        return None
    names, left_out = list(arms), list[str]()
    while (p_K := _p_varies_more(means_KR)).min() <= DOUBTFUL / len(names):
        worst = int(p_K.argmin())
        left_out.append(names.pop(worst))
        means_KR = np.delete(means_KR, worst, axis=0)
    freedom = (means_KR.shape[0] - 1) * (means_KR.shape[1] - 1)
    doubtful = [name for name, p in zip(names, p_K.tolist(), strict=True) if p <= DOUBTFUL]
    return SeedSpread(2 * _residual_squares(means_KR) / freedom, freedom, len(names), (*left_out, *doubtful))


def _p_varies_more(means_KR: Floats) -> Floats:
    """Of each arm, p that it varies no more from seed to seed than the others: their mean is subtracted from it, seed by seed.

    The variance of that is independent of the residuals of the others among themselves, with R - 1 and (K - 2) (R - 1) degrees of freedom.
    Of two arms neither can be told from the other: 1.
    """
    arms, seeds = means_KR.shape
    if arms < 3:
        return np.ones(arms)
    contrast_KR = means_KR - (means_KR.sum(0) - means_KR) / (arms - 1)
    own_K = contrast_KR.var(1, ddof=1) * (arms - 1) / arms
    others_K = np.array([_residual_squares(np.delete(means_KR, arm, axis=0)) for arm in range(arms)]) / ((arms - 2) * (seeds - 1))
    rounding = (1e-12 * np.abs(means_KR).max()) ** 2
    own_K, others_K = (np.where(variance_K > rounding, variance_K, 0.0) for variance_K in (own_K, others_K))
    ratio_K = np.divide(own_K, others_K, out=np.where(own_K > 0, np.inf, 0.0), where=others_K > 0)
    return np.asarray(scipy_stats().f.sf(ratio_K, seeds - 1, (arms - 2) * (seeds - 1)))


def _residual_squares(means_KR: Floats) -> float:
    """The sum of squares that neither an arm nor a seed explains."""
    return float(np.sum((means_KR - means_KR.mean(1, keepdims=True) - means_KR.mean(0) + means_KR.mean()) ** 2))
