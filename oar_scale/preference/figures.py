"""The vocabulary of a study's figures: what is computed and what is printed both speak it."""

from __future__ import annotations

from dataclasses import dataclass

from oar_scale.preference.bradley_terry import Group
from oar_scale.preference.intervals import Interval, PairFigures


@dataclass(frozen=True)
class RaterFigures:
    """One rater."""

    rater: str
    """First digits of the random number, as many as tell raters apart."""
    counted: bool
    answers: int
    """To pairs."""
    fast: int
    """Of these, answers in less time than a look at both pictures takes (``fast_ms``)."""
    checks: int
    checks_passed: int
    chance: float
    """How likely one who picks sides at random passes as many of these checks."""
    left_share: float | None
    """Of the answers to pairs that are no ties; None without any."""
    median_s: float | None
    """Of the answers to pairs; None without any."""
    groups: tuple[Group, ...]
    """Strengths from this rater's answers alone, their intervals as if these were independent."""


@dataclass(frozen=True)
class Agreement:
    """Do raters agree, where several have answered the same pair?"""

    comparisons: int
    """That two or more raters have answered."""
    same: float
    """Share of pairs of answers to one comparison that are the same, ties being an answer of their own."""
    alpha: Interval | None
    """Krippendorff's alpha, nominal: 1 agreement, 0 as by chance. None where all answers are the same."""


@dataclass(frozen=True)
class SideBias:
    """How often the left picture of a pair was chosen, attention checks left out.

    Sides are at random, so that without a bias each choice is left with probability 1/2.
    """

    left: int
    decided: int
    share: Interval
    p_value: float
    """Of the exact binomial test."""


@dataclass(frozen=True)
class Figures:
    """What a set of raters says."""

    raters: int
    answers: int
    ties: int
    pairs: tuple[PairFigures, ...]
    groups: tuple[Group, ...]
    agreement: Agreement | None
    """None where no comparison was answered twice."""
    sides: SideBias | None
    families: bool
    """Whether pictures say which captions are variants of one drawing: these are then one caption to all intervals."""
    captions_without_family: int
    """Captions of the study whose pictures say nothing of the kind: each is taken as independent of all others."""


@dataclass(frozen=True)
class Results:
    """All that ``oar study results`` says."""

    fingerprint: str
    question: str
    arms: tuple[str, ...]
    threshold: float
    checks_needed: int
    """Of all the study's checks, those that a rater has to pass."""
    chance: float
    """How likely one who picks sides at random passes as many of all checks."""
    chance_limit: float
    """How likely such a rater may be to count, however many checks that one has answered."""
    fast_ms: int
    """Answers to pairs in less time are in ``everybody`` alone."""
    confidence: float
    resamples: int
    raters: tuple[RaterFigures, ...]
    counted: Figures | None
    """None where no rater counts."""
    everybody: Figures | None
    """Of all answers of all raters; None where they are the same."""
