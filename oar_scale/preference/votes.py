"""The answers of a study as arrays: who preferred which arm, for which caption.

    arms a < b of a pair, what the rater chose:   a -> outcome 0,   a tie -> 1,   b -> 2

Two answers are alike because they are of one rater, or because they are about one caption; so both are kept with each answer.
Shapes: A answers, P pairs of arms, 3 outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from oar_scale.preference.answers import Answer
from oar_scale.preference.study import Comparison, Study

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
WIN, TIE, LOSS = 0, 1, 2
SCORE = np.array([1.0, 0.5, 0.0])
"""What an outcome is worth to the first arm of a pair: a tie counts half for each."""


@dataclass(frozen=True)
class Votes:
    """Answers to pairs; attention checks are not among them."""

    arms: tuple[str, ...]
    raters: tuple[str, ...]
    rater_A: Ints
    """Index into ``raters``."""
    caption_A: Ints
    """The same number for all answers about one caption, or captions of one family."""
    comparison_A: Ints
    pair_A: Ints
    """Index into ``arm_pairs``."""
    outcome_A: Ints

    @property
    def arm_pairs(self) -> list[tuple[int, int]]:
        """All pairs of arms, also those without an answer."""
        return list(combinations(range(len(self.arms)), 2))

    def __len__(self) -> int:
        return len(self.rater_A)

    def counts(self) -> Floats:
        """[P, 3]: answers by pair of arms and outcome."""
        return np.asarray(self.by_rater().sum(axis=0))

    def by_rater(self) -> Floats:
        """[R, P, 3]: the counts of each rater who has answered a pair."""
        return self._by(self.rater_A)

    def by_caption(self) -> Floats:
        """[C, P, 3]: the counts of each caption that was asked about."""
        return self._by(self.caption_A)

    def _by(self, group_A: Ints) -> Floats:
        names, index_A = np.unique(group_A, return_inverse=True)
        counts = np.zeros((len(names), len(self.arm_pairs), 3))
        np.add.at(counts, (index_A, self.pair_A, self.outcome_A), 1)
        return counts


def votes_of(study: Study, answers: Sequence[Answer]) -> Votes:
    """The answers to a study's pairs."""
    pairs = {pair.id: (number, pair) for number, pair in enumerate(study.pairs)}
    captions = _captions(study)
    arm_pairs = {pair: number for number, pair in enumerate(combinations(range(len(study.arms)), 2))}
    raters = tuple(sorted({answer.rater for answer in answers}))
    index = {name: number for number, name in enumerate(raters)}
    rows = []
    for answer in answers:
        if answer.comparison in pairs:
            number, pair = pairs[answer.comparison]
            assert pair.arms is not None
            rows.append((index[answer.rater], captions[number], number, arm_pairs[pair.arms], outcome(answer)))
    table = np.array(rows, np.int64).reshape(-1, 5)
    return Votes(tuple(arm.name for arm in study.arms), raters, *table.T)


def outcome(answer: Answer) -> int:
    """Whether the first picture of the comparison won."""
    if answer.choice == "tie":
        return TIE
    return WIN if (answer.choice == "left") != answer.swapped else LOSS


def captions_without_family(study: Study) -> int:
    """How many captions of the study's pairs are of no known family."""
    return len({_caption(pair) for pair in study.pairs if pair.family is None})


def _captions(study: Study) -> list[int]:
    """A number for the caption of each pair; several drawings of one caption, and captions of one family, share it."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(_caption(pair), len(numbers)) for pair in study.pairs]


def _caption(pair: Comparison) -> object:
    if pair.family is not None:
        return ("family", pair.family)
    return pair.item if pair.caption is None else pair.caption
