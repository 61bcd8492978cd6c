"""Who has looked: attention checks against chance, and answers that came too fast for a look at both pictures.

    a rater counts   who passes ``threshold`` of the checks answered, and more than one who picks sides at random is likely to:

                     P(X >= passed) <= limit,      X ~ Binomial(checks answered, 1/2)

So nobody counts who left before enough checks, and the chance that a random clicker counts is bounded however many checks that one answers.
"""

from __future__ import annotations

import math

from scipy import stats

THRESHOLD = 0.85
"""Share of the attention checks that a rater has to answer rightly to be counted, unless the user says otherwise."""
CHANCE = 0.02
"""How likely a rater who picks sides at random may be to count, unless a study's checks are too few, or a threshold too low, for that."""
FAST_MS = 500
"""An answer in less time is no judgement: to look at two pictures takes two fixations of 200 to 300 ms (Rayner, Psychol. Bull. 124, 1998).

Leaving out what is faster than a perception can be is usual for reaction times (Whelan, Psychol. Rec. 58, 2008).
"""


def chance(passed: int, answered: int) -> float:
    """How likely a rater who picks sides at random passes as many of so many checks, or more."""
    return float(stats.binom.sf(passed - 1, answered, 0.5))


def needed(checks: int, threshold: float) -> int:
    """The checks that a rater has to pass of as many: ``threshold`` of them, or one more where that keeps chance at :data:`CHANCE`."""
    least = math.ceil(threshold * checks - 1e-9)
    return next((passed for passed in (least, min(least + 1, checks)) if chance(passed, checks) <= CHANCE), least)


def limit(checks: int, threshold: float) -> float:
    """How likely a random clicker may be to count: :data:`CHANCE`, or what a study of so many checks gives at this threshold, if more."""
    return max(CHANCE, chance(needed(checks, threshold), checks))


def attentive(passed: int, answered: int, checks: int, threshold: float) -> bool:
    """Whether a rater counts.

    Args:
        passed, answered: the rater's checks.
        checks: those of the whole study.
        threshold: share of ``answered`` that has to be passed.
    """
    return passed >= needed(answered, threshold) and chance(passed, answered) <= limit(checks, threshold) + 1e-12
