"""The figures of a study as lines for people."""

from __future__ import annotations

from collections.abc import Iterator

from oar_scale.preference.bradley_terry import Group
from oar_scale.preference.figures import Agreement, Figures, RaterFigures, Results, SideBias
from oar_scale.preference.intervals import Interval
from oar_scale.preference.study import Study
from oar_scale.runtime.tables import text_table

FEW_RATERS = 5
"""With fewer, a study says little about other people."""


def result_lines(study: Study, results: Results) -> Iterator[str]:
    """All of it, the headline first."""
    left_out = [rater for rater in results.raters if not rater.counted]
    yield f"{results.question}   ({len(study.pairs)} pairs, {len(study.checks)} attention checks, study {results.fingerprint[:8]})"
    yield from _left_out(results, left_out)
    if results.counted is None:
        yield "no rater is left: the figures below are of all of them, and show little"
    else:
        yield from _figures(results, results.counted)
    if results.everybody is not None:
        yield ""
        yield f"of all raters, those included who failed the checks ({len(results.raters)}):"
        yield from _figures(results, results.everybody)
    yield ""
    yield "raters (strengths from their answers alone, with 95 % intervals as if these were independent)"
    yield from _indented(_rater_table(results))


def _left_out(results: Results, left_out: list[RaterFigures]) -> Iterator[str]:
    if left_out:
        names = ", ".join(f"{rater.rater} ({rater.checks_passed} of {rater.checks})" for rater in left_out)
        few = f"{len(left_out)} of {len(results.raters)} raters"
        yield f"left out: {few} answered fewer than {results.threshold:.0%} of their checks rightly: {names}"
    unchecked = sum(1 for rater in results.raters if not rater.checks)
    if unchecked:
        yield f"{unchecked} of {len(results.raters)} raters have not come to an attention check, and count"


def _figures(results: Results, figures: Figures) -> Iterator[str]:
    if not figures.answers:
        yield "no pair has been answered, only attention checks"
        return
    yield f"{_count(figures.raters, 'rater')}, {_count(figures.answers, 'answer')}, {figures.ties} of them ties"
    yield ""
    yield "preferred (a tie counts half for each; 95 %: other raters, other captions)      decided answers alone (Clopper-Pearson)"
    rows = [
        [
            f"{pair.first} to {pair.second}",
            _percent(pair.rate),
            f"{pair.wins} to {pair.losses}, {pair.ties} ties, {_count(pair.raters, 'rater')}, {_count(pair.captions, 'caption')}",
            "all are ties" if pair.decided is None else _percent(pair.decided),
        ]
        for pair in figures.pairs
    ]
    yield from _indented(text_table(rows))
    if figures.raters == 1:
        yield "one rater: the intervals are about other captions for this rater, and say nothing about other people"
    elif figures.raters < FEW_RATERS:
        yield f"{figures.raters} raters are few: the intervals are as wide as that makes them"
    yield from _missing(results, figures)
    yield from _strengths(figures.groups)
    yield _agreement(figures.agreement)
    if figures.sides is not None:
        yield _sides(figures.sides)


def _missing(results: Results, figures: Figures) -> Iterator[str]:
    """What keeps arms from being compared."""
    compared = {strength.arm for group in figures.groups for strength in group.strengths}
    alone = [arm for arm in results.arms if arm not in compared]
    if alone:
        yield f"no answer about {', '.join(alone)} yet"
    if len(figures.groups) > 1:
        groups = "; ".join(", ".join(strength.arm for strength in group.strengths) for group in figures.groups)
        yield f"no answer connects these groups of arms, whose strengths cannot be compared with one another's: {groups}"


def _strengths(groups: tuple[Group, ...]) -> Iterator[str]:
    for group in groups:
        yield ""
        yield "strength (Bradley-Terry, log odds, mean 0)"
        rows = [
            [each.arm, f"{each.strength.value:+.2f}", _bounds(each.strength), _count(each.answers, "answer")] for each in group.strengths
        ]
        yield from _indented(text_table(rows))
    yield ""


def _agreement(agreement: Agreement | None) -> str:
    if agreement is None:
        return "agreement: not known, no pair has been answered by two raters"
    alpha = "all answers are the same"
    if agreement.alpha is not None:
        alpha = f"Krippendorff's alpha {agreement.alpha.value:.2f} {_bounds(agreement.alpha)}"
    several = _count(agreement.comparisons, "pair")
    return f"agreement: {agreement.same:.0%} of two raters' answers to one pair are the same, {alpha} ({several})"


def _sides(sides: SideBias) -> str:
    verdict = "a bias: it costs power, and favours no arm, since sides are at random" if sides.p_value < 0.01 else "no clear bias"
    return f"left side chosen in {_percent(sides.share)} of {sides.decided} decided answers, p = {sides.p_value:.2g}: {verdict}"


def _rater_table(results: Results) -> list[str]:
    rows = [["rater", "answers", "checks", "left", "median", *results.arms]]
    for rater in results.raters:
        strengths = {each.arm: each.strength for group in rater.groups for each in group.strengths}
        rows.append(
            [
                rater.rater + ("" if rater.counted else " (left out)"),
                str(rater.answers),
                f"{rater.checks_passed} of {rater.checks}",
                "-" if rater.left_share is None else f"{rater.left_share:.0%}",
                f"{rater.median_s:.1f} s",
                *(f"{strengths[arm].value:+.2f} {_bounds(strengths[arm])}" if arm in strengths else "-" for arm in results.arms),
            ]
        )
    return text_table(rows)


def _percent(share: Interval) -> str:
    return f"{share.value * 100:.1f} % [{share.low * 100:.1f}, {share.high * 100:.1f}]"


def _bounds(interval: Interval) -> str:
    return f"[{interval.low:+.2f}, {interval.high:+.2f}]"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _indented(lines: list[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)
