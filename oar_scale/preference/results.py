"""``oar study results``: what the answers say, and how sure that is.

Everything that depends on who counts is computed twice where raters failed the attention checks, or answers came too fast
(:mod:`oar_scale.preference.attention`): without them, and of all answers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict

import evalica
import numpy as np
import pandas as pd
from scipy import stats

from oar_scale.errors import UserError
from oar_scale.json_object import without_nan
from oar_scale.preference.answers import Answer, read_answers
from oar_scale.preference.attention import FAST_MS, THRESHOLD, attentive, chance, limit, needed
from oar_scale.preference.bradley_terry import strength_groups
from oar_scale.preference.figures import Agreement, Figures, RaterFigures, Results, SideBias
from oar_scale.preference.intervals import CONFIDENCE, RESAMPLES, Interval, clopper_pearson, pair_figures, resample
from oar_scale.preference.results_text import result_lines
from oar_scale.preference.study import ANSWERS, Study, read_study
from oar_scale.preference.votes import WIN, Votes, captions_without_family, outcome, votes_of
from oar_scale.storage import join, open_storage
from oar_scale.text import shown


def study_results(places: Sequence[str], threshold: float, json_path: str | None, say: Callable[[str], None]) -> Results:
    """Read answers, compute the figures, and say them.

    Args:
        places: a study's folder; then other folders of the same study, or SQLite files, whose answers are counted as well.
        json_path: where the figures are written, too.

    Raises:
        UserError: no study, no answers, or answers that are damaged or of another study.
    """
    study = read_study(places[0])
    answers = merged_answers(study, [join(place, ANSWERS) if os.path.isdir(place) else place for place in places])
    results = compute_results(study, answers, threshold)
    if json_path is not None:
        text = json.dumps(without_nan(asdict(results)), indent=2, ensure_ascii=False)
        open_storage(json_path).write(json_path, f"{text}\n".encode())
    for line in result_lines(study, results):
        say(line)
    return results


def merged_answers(study: Study, paths: Sequence[str]) -> list[Answer]:
    """The answers of several files; one that is in two of them counts once. Raises UserError where they contradict each other."""
    known = {each.id for each in (*study.pairs, *study.checks)}
    found: dict[tuple[str, str], tuple[Answer, str]] = {}
    for path in paths:
        for answer in read_answers(path, study.fingerprint):
            if answer.comparison not in known:
                raise UserError(f"{path}: an answer is about {shown(answer.comparison)}, which the study does not have")
            before, where = found.setdefault((answer.rater, answer.comparison), (answer, path))
            if before != answer:
                raise UserError(
                    f"{where} and {path}: rater {answer.rater[:8]} has answered {answer.comparison} in two ways. One is a copy that went "
                    "on by itself: name one of them."
                )
    if not found:
        raise UserError(f"{', '.join(paths)}: nobody has answered yet. Send raters the address that oar study serve says.")
    return [found[key][0] for key in sorted(found)]


def compute_results(study: Study, answers: Sequence[Answer], threshold: float = THRESHOLD) -> Results:
    """All figures of these answers, of which there is at least one."""
    by_rater: dict[str, list[Answer]] = {}
    for answer in answers:
        by_rater.setdefault(answer.rater, []).append(answer)
    names = _short_names(sorted(by_rater))
    raters = [_rater(study, names[rater], given, threshold) for rater, given in sorted(by_rater.items())]
    counted = {rater for rater, figures in zip(sorted(by_rater), raters, strict=True) if figures.counted}
    everybody = _figures(study, answers)
    checks = {check.id for check in study.checks}
    kept = [answer for answer in answers if answer.rater in counted and (answer.comparison in checks or answer.ms >= FAST_MS)]
    return Results(
        study.fingerprint,
        study.question,
        tuple(arm.name for arm in study.arms),
        threshold,
        needed(len(study.checks), threshold),
        chance(needed(len(study.checks), threshold), len(study.checks)),
        limit(len(study.checks), threshold),
        FAST_MS,
        CONFIDENCE,
        RESAMPLES,
        tuple(raters),
        (everybody if len(kept) == len(answers) else _figures(study, kept)) if kept else None,
        None if len(kept) == len(answers) else everybody,
    )


def _rater(study: Study, name: str, answers: Sequence[Answer], threshold: float) -> RaterFigures:
    checks = {check.id for check in study.checks}
    passed = [outcome(answer) == WIN for answer in answers if answer.comparison in checks]
    votes, of_pairs = votes_of(study, answers), _of_pairs(study, answers)
    sides = [answer.choice for answer in of_pairs if answer.choice != "tie"]
    return RaterFigures(
        name,
        attentive(sum(passed), len(passed), len(checks), threshold),
        len(votes),
        sum(1 for answer in of_pairs if answer.ms < FAST_MS),
        len(passed),
        sum(passed),
        chance(sum(passed), len(passed)),
        sides.count("left") / len(sides) if sides else None,
        float(np.median([answer.ms for answer in of_pairs])) / 1000 if of_pairs else None,
        tuple(strength_groups(votes)),
    )


def _of_pairs(study: Study, answers: Sequence[Answer]) -> list[Answer]:
    """Without those to attention checks."""
    checks = {check.id for check in study.checks}
    return [answer for answer in answers if answer.comparison not in checks]


def _figures(study: Study, answers: Sequence[Answer]) -> Figures:
    votes = votes_of(study, answers)
    sides = _sides(_of_pairs(study, answers))
    families = any(pair.family is not None for pair in study.pairs)
    if not len(votes):
        return Figures(0, 0, 0, (), (), None, sides, families, captions_without_family(study))
    rng = np.random.default_rng(study.digest("bootstrap"))
    over_raters, over_captions = resample(votes.by_rater(), rng), resample(votes.by_caption(), rng)
    return Figures(
        len(np.unique(votes.rater_A)),
        len(votes),
        int(votes.counts()[:, 1].sum()),
        tuple(pair_figures(votes, over_raters, over_captions)),
        tuple(strength_groups(votes, over_raters, over_captions)),
        _agreement(votes, study.digest("alpha") >> 32),
        sides,
        families,
        captions_without_family(study),
    )


def _agreement(votes: Votes, seed: int) -> Agreement | None:
    names, unit_A = np.unique(votes.comparison_A, return_inverse=True)
    counts_U3 = np.zeros((len(names), 3))
    np.add.at(counts_U3, (unit_A, votes.outcome_A), 1)
    totals = counts_U3.sum(axis=1)
    several = totals > 1
    if not several.any():
        return None
    same = (counts_U3 * (counts_U3 - 1)).sum() / (totals * (totals - 1)).sum()
    alpha = None
    if np.count_nonzero(counts_U3[several].sum(axis=0)) > 1:
        table = np.full((len(votes.raters), len(names)), np.nan)
        table[votes.rater_A, unit_A] = votes.outcome_A
        sampled = evalica.alpha_bootstrap(pd.DataFrame(table), n_resamples=RESAMPLES, confidence_level=CONFIDENCE, random_state=seed)
        alpha = Interval(sampled.alpha, sampled.low, sampled.high)
    return Agreement(int(several.sum()), float(same), alpha)


def _sides(answers: Sequence[Answer]) -> SideBias | None:
    """Of answers to pairs: on a check one picture is right, on whichever side it is."""
    decided = [answer.choice for answer in answers if answer.choice != "tie"]
    left = decided.count("left")
    share = clopper_pearson(left, len(decided))
    if share is None:
        return None
    return SideBias(left, len(decided), share, float(stats.binomtest(left, len(decided)).pvalue))


def _short_names(raters: Sequence[str]) -> dict[str, str]:
    """Eight digits of each, or as many more as tell them apart."""
    length = 8
    while len({rater[:length] for rater in raters}) < len(raters):
        length += 1
    return {rater: rater[:length] for rater in raters}
