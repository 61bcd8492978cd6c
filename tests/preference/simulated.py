"""Studies whose raters are simulated: what they prefer is known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np

from oar_scale.preference.answers import Answer, Choice
from oar_scale.preference.study import Arm, Comparison, Study, content_hash


def a_study(arms: int = 2, captions: int = 60, checks: int = 4) -> Study:
    """Every caption is asked about for every pair of arms. No picture exists."""

    def name(*keys: object) -> str:
        return content_hash(repr(keys).encode())

    pairs = [
        Comparison(
            id=name(item, pair), caption=f"caption {item}", item=item, pictures=(name(item, pair[0]), name(item, pair[1])), arms=pair
        )
        for item in range(captions)
        for pair in combinations(range(arms), 2)
    ]
    scrambled = [
        Comparison(id=name("check", item), caption=None, item=item, pictures=(name(item, 0), name("noise", item)), arms=None)
        for item in range(checks)
    ]
    named = tuple(Arm(name=f"arm {'ABCDEF'[arm]}", left_out=0) for arm in range(arms))
    return Study.make(question="Which?", seed=0, per_rater=40, arms=named, pairs=tuple(pairs), checks=tuple(scrambled))


def answer_of(study: Study, rater: str, comparison: Comparison, value: float, ms: int = 2000) -> Answer:
    """The answer of somebody to whom the first picture is worth this: 1, 0, or 0.5 for a tie."""
    swapped = study.swapped(rater, comparison.id)
    choice: Choice = "tie" if value == 0.5 else "left" if (value == 1) != swapped else "right"
    return Answer(study.fingerprint, rater, comparison.id, swapped, choice, ms)


def answers_of(
    study: Study,
    raters: int,
    each: int,
    value: Callable[[int, Comparison], float],
    seed: int = 0,
    passes: Callable[[int], float] = lambda rater: 1.0,
) -> list[Answer]:
    """Each rater answers ``each`` pairs, drawn at random, and all checks.

    Args:
        value: what a rater chooses, as in ``answer_of``.
        passes: the probability that a rater passes a check.
    """
    rng = np.random.default_rng([seed, 99])
    answers = []
    for rater in range(raters):
        name = content_hash(f"rater {rater}".encode())
        for number in rng.permutation(len(study.pairs))[:each]:
            answers.append(answer_of(study, name, study.pairs[number], value(rater, study.pairs[number])))
        answers += [answer_of(study, name, check, float(rng.random() < passes(rater))) for check in study.checks]
    return answers
