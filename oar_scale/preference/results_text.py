"""The figures of a study as lines for people."""

from __future__ import annotations

from collections.abc import Iterator

from oar_scale.preference.attention import needed
from oar_scale.preference.bradley_terry import Difference, Group
from oar_scale.preference.figures import Agreement, Figures, Results, SideBias
from oar_scale.preference.intervals import Interval
from oar_scale.preference.study import Study
from oar_scale.runtime.tables import text_table

FEW_RATERS = 5
"""With fewer, a study says little about other people."""


def result_lines(study: Study, results: Results) -> Iterator[str]:
    """All of it, the headline first."""
    yield f"{results.question}   ({len(study.pairs)} pairs, {len(study.checks)} attention checks, study {results.fingerprint[:8]})"
    yield _rule(study, results)
    yield from _left_out(results)
    if results.counted is None:
        yield "no rater is left: the figures below are of all raters, and say little"
    else:
        yield from _figures(results, results.counted)
    if results.everybody is not None:
        yield ""
        yield f"of all {len(results.raters)} raters and all answers, those included that are left out above:"
        yield from _figures(results, results.everybody)
    yield ""
    yield "raters (answers, left, median: of pairs, without attention checks; strengths by this rater's answers alone, and the"
    yield "95 % intervals take these answers for independent)"
    yield from _indented(_rater_table(results))


def _rule(study: Study, results: Results) -> str:
    """Who counts, and how likely somebody does who picks sides at random."""
    if not study.checks:
        return "no attention checks: everybody counts, also a rater who picks sides at random"
    return (
        f"a rater counts who passes at least {results.threshold:.0%} of the attention checks, of all {len(study.checks)} checks "
        f"{results.checks_needed}: one who picks sides at random does so with a chance of {results.chance:.1%}. A rater who has answered "
        f"fewer checks counts only where that chance is at most {results.chance_limit:.1%}, too"
    )


def _left_out(results: Results) -> Iterator[str]:
    left_out = [rater for rater in results.raters if not rater.counted]
    failed = [rater for rater in left_out if rater.checks_passed < needed(rater.checks, results.threshold)]
    early = [rater for rater in left_out if rater not in failed]
    for raters, why in ((failed, "passed too few checks"), (early, "answered too few checks to tell them from chance")):
        if raters:
            names = ", ".join(f"{rater.rater} ({rater.checks_passed} of {rater.checks} passed)" for rater in raters)
            yield f"left out: {len(raters)} of {len(results.raters)} raters, who {why}: {names}"
    if fast := sum(rater.fast for rater in results.raters if rater.counted):
        of = sum(rater.answers for rater in results.raters if rater.counted)
        yield (
            f"left out: {fast} of {of} answers of the raters who count: they came within {results.fast_ms} ms, too soon to have looked at "
            "both pictures"
        )


def _figures(results: Results, figures: Figures) -> Iterator[str]:
    if not figures.answers:
        yield "no pair has been answered, only attention checks"
        return
    yield f"{_count(figures.raters, 'rater')}, {_count(figures.answers, 'answer')}, {figures.ties} of them ties"
    yield ""
    captions = "families" if figures.families else "captions"
    yield f"preferred (a tie counts half for each; 95 %: other raters, other {captions})      decided answers alone (Clopper-Pearson)"
    rows = [
        [
            f"{pair.first} to {pair.second}",
            _percent(pair.rate),
            f"{pair.wins} to {pair.losses}, {pair.ties} ties, {_count(pair.raters, 'rater')}, "
            + (_count(pair.captions, "famil", "y", "ies") if figures.families else _count(pair.captions, "caption")),
            "all are ties" if pair.decided is None else _percent(pair.decided),
        ]
        for pair in figures.pairs
    ]
    yield from _indented(text_table(rows))
    if len(figures.pairs) > 1:
        yield (
            f"each interval by itself holds the true share in 95 of 100 studies; that all {len(figures.pairs)} do at once is less likely: "
            "compare arms by the corrected p below"
        )
    if figures.captions_without_family:
        which = f"{_count(figures.captions_without_family, 'caption')} of no known family: each is" if figures.families else "captions are"
        yield f"{which} taken as independent: where some are variants of one drawing (skin tones), the intervals are too narrow"
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
        if group.differences:
            yield f"differences of strengths (95 % each; p corrected for {len(group.differences)} differences by Holm)"
            yield from _indented(text_table([_difference(each) for each in group.differences]))
    yield ""


def _difference(found: Difference) -> list[str]:
    name, value = f"{found.first} - {found.second}", f"{found.difference.value:+.2f}"
    return [name, value, _bounds(found.difference), f"p = {found.p_holm:.2g}"]


def _agreement(agreement: Agreement | None) -> str:
    if agreement is None:
        return "agreement: not known, no pair has been answered by two raters"
    alpha = "all answers are the same"
    if agreement.alpha is not None:
        alpha = f"Krippendorff's alpha {agreement.alpha.value:.2f} {_bounds(agreement.alpha)}"
    several = _count(agreement.comparisons, "pair")
    return f"agreement: two raters of the same pair give the same answer in {agreement.same:.0%} of the cases, {alpha} ({several})"


def _sides(sides: SideBias) -> str:
    verdict = "a bias: it costs power, and favours no arm, since sides are at random" if sides.p_value < 0.01 else "no clear bias"
    return f"left side chosen in {_percent(sides.share)} of {sides.decided} decided answers to pairs, p = {sides.p_value:.2g}: {verdict}"


def _rater_table(results: Results) -> list[str]:
    rows = [["rater", "answers", f"< {results.fast_ms} ms", "checks", "by chance", "left", "median", *results.arms]]
    for rater in results.raters:
        strengths = {each.arm: each.strength for group in rater.groups for each in group.strengths}
        rows.append(
            [
                rater.rater + ("" if rater.counted else " (left out)"),
                str(rater.answers),
                str(rater.fast),
                f"{rater.checks_passed} of {rater.checks}",
                f"{rater.chance:.1%}",
                "-" if rater.left_share is None else f"{rater.left_share:.0%}",
                "-" if rater.median_s is None else f"{rater.median_s:.1f} s",
                *(f"{strengths[arm].value:+.2f} {_bounds(strengths[arm])}" if arm in strengths else "-" for arm in results.arms),
            ]
        )
    return text_table(rows)


def _percent(share: Interval) -> str:
    return f"{share.value * 100:.1f} % [{share.low * 100:.1f}, {share.high * 100:.1f}]"


def _bounds(interval: Interval) -> str:
    return f"[{interval.low:+.2f}, {interval.high:+.2f}]"


def _count(number: int, thing: str, one: str = "", many: str = "s") -> str:
    return f"{number} {thing}{one if number == 1 else many}"


def _indented(lines: list[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)
