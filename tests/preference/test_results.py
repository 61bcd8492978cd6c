"""``oar study results``: what it says of good, few, careless and contradicting answers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from simulated import a_study, answer_of, answers_of
from small_study import rater

from oar_scale.cli import main
from oar_scale.errors import UserError
from oar_scale.preference import intervals, results
from oar_scale.preference.answers import Answer, Answers, Showing
from oar_scale.preference.results import compute_results, merged_answers
from oar_scale.preference.results_text import result_lines
from oar_scale.preference.study import ANSWERS, Comparison, Study, read_study


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (intervals, results):
        monkeypatch.setattr(module, "RESAMPLES", 40)


def said(study: Study, answers: Sequence[Answer]) -> str:
    return "\n".join(result_lines(study, compute_results(study, answers)))


def store(folder: Path, answers: Sequence[Answer]) -> None:
    study = read_study(str(folder))
    opened = Answers(str(folder / ANSWERS), study.fingerprint)
    for place, answer in enumerate(answers):
        showing = Showing(answer.comparison, place, answer.swapped, None)
        opened.show(answer.rater, showing)
        opened.answer(answer.rater, showing, answer.choice, answer.ms)
    opened.close()


def test_what_is_on_which_side_changes_no_figure() -> None:
    study = a_study()
    rng = np.random.default_rng(0)
    answers = answers_of(study, 5, 20, lambda rater, pair: float(rng.choice([0, 0.5, 1])))
    flip = {"left": "right", "right": "left", "tie": "tie"}
    other = [replace(answer, swapped=not answer.swapped, choice=flip[answer.choice]) for answer in answers]
    one, two = compute_results(study, answers), compute_results(study, other)
    assert one.counted is not None and two.counted is not None
    assert one.counted.pairs == two.counted.pairs and one.counted.groups == two.counted.groups
    assert one.counted.sides != two.counted.sides


def test_the_arm_that_raters_prefer_is_named_first() -> None:
    study = a_study(arms=3)
    rng = np.random.default_rng(0)
    worth = [0.0, 2.0, 1.0]

    def value(rater: int, pair: Comparison) -> float:
        assert pair.arms is not None
        return float(rng.random() < 1 / (1 + np.exp(worth[pair.arms[1]] - worth[pair.arms[0]])))

    answers = answers_of(study, 10, 40, value)
    found = compute_results(study, answers)
    assert found.counted is not None and found.everybody is None
    (group,) = found.counted.groups
    assert [each.arm for each in group.strengths] == ["arm B", "arm C", "arm A"]
    for each, true in zip(group.strengths, (1.0, 0.0, -1.0), strict=True):
        assert each.strength.value == pytest.approx(true, abs=0.5) and each.strength.low < each.strength.value < each.strength.high
    of_one = [answer for answer in answers if answer.rater.startswith(found.raters[0].rater)]
    assert compute_results(study, of_one).raters[0] == found.raters[0]  # nobody else's answers are in it
    assert [pair.rate.value > 0.5 for pair in found.counted.pairs] == [False, False, True]


def test_raters_who_fail_the_checks_are_left_out_and_shown() -> None:
    """Three of twelve press any key: with them the preference looks smaller, and both figures are said."""
    study = a_study(checks=6)
    rng = np.random.default_rng(1)

    def value(rater: int, pair: Comparison) -> float:
        return float(rng.random() < (0.5 if rater < 3 else 0.8))

    answers = answers_of(study, 12, 40, value, passes=lambda rater: 0.3 if rater < 3 else 1.0)
    found = compute_results(study, answers)
    assert found.counted is not None and found.everybody is not None
    assert sum(not each.counted for each in found.raters) == 3
    assert (found.counted.raters, found.everybody.raters) == (9, 12)
    assert found.counted.pairs[0].rate.value > found.everybody.pairs[0].rate.value > 0.6
    text = said(study, answers)
    assert "left out: 3 of 12 raters, who passed too few checks" in text and text.count("(left out)") == 3
    assert "of all 12 raters and all answers" in text
    assert compute_results(study, answers, 0.0).everybody is None


def test_who_clicks_at_random_is_rarely_counted_and_who_left_early_never() -> None:
    """A hundred random clickers and ten raters: the share of the raters is not pulled to a half."""
    study = a_study(checks=10)
    rng = np.random.default_rng(4)
    answers = answers_of(
        study, 110, 10, lambda rater, pair: float(rater < 10 or rng.random() < 0.5), 0, lambda rater: 1.0 if rater < 10 else 0.5
    )
    found = compute_results(study, answers)
    assert 10 <= sum(each.counted for each in found.raters) <= 13 and (found.checks_needed, found.chance_limit) == (9, 0.02)
    assert found.counted is not None and found.counted.pairs[0].rate.value > 0.9
    text = said(study, answers)
    assert "at least 85% of the attention checks, of all 10 checks 9: one who picks sides at random does so with a chance of 1.1%" in text
    checks = {check.id for check in study.checks[5:]}
    early = [answer for answer in answers_of(study, 2, 10, lambda rater, pair: 1.0) if answer.comparison not in checks]
    text = said(study, early)
    assert "2 of 2 raters, who answered too few checks to tell them from chance" in text and "(5 of 5 passed)" in text
    assert "everybody counts" in said(a_study(checks=0), answers_of(a_study(checks=0), 2, 4, lambda rater, pair: 1.0))


def test_a_rater_below_the_rule_has_failed_though_above_the_share() -> None:
    """6 of 7 checks are more than 85 %, but chance would pass as many too often: 7 are needed, and nothing is missing but the seventh."""
    study = a_study(checks=7)
    answers = answers_of(study, 3, 10, lambda rater, pair: 1.0)
    one = next(answer for answer in answers if answer.comparison == study.checks[0].id)
    wrong = [replace(answer, choice="right" if answer.choice == "left" else "left") if answer is one else answer for answer in answers]
    text = said(study, wrong)
    assert (
        "left out: 1 of 3 raters, who passed too few checks:" in text and "(6 of 7 passed)" in text and "too few checks to tell" not in text
    )


def test_answers_that_came_too_soon_are_shown_and_left_out() -> None:
    """A rater who passes all checks slowly, and presses keys in between."""
    study = a_study(checks=10)
    answers = answers_of(study, 6, 20, lambda rater, pair: 1.0)
    checks = {check.id for check in study.checks}
    hasty = [
        replace(answer, ms=499, choice="tie") if answer.rater == answers[0].rater and answer.comparison not in checks else answer
        for answer in answers
    ]
    found = compute_results(study, hasty)
    assert found.counted is not None and found.everybody is not None
    assert (found.counted.raters, found.counted.ties, found.everybody.ties) == (5, 0, 20)
    assert sorted(each.fast for each in found.raters) == [0, 0, 0, 0, 0, 20] and all(each.counted for each in found.raters)
    assert "20 of 120 answers of the raters who count: they came within 500 ms" in said(study, hasty)
    assert compute_results(study, [replace(answer, ms=500) for answer in answers]).everybody is None


def test_captions_of_one_family_are_one_cluster() -> None:
    """Six skin tones of ten drawings, about which raters think alike, are ten captions."""
    plain = a_study(captions=60, checks=0)
    pairs = tuple(pair.model_copy(update={"family": f"drawing {pair.item // 6}"}) for pair in plain.pairs)
    study = Study.make(question="Which?", seed=0, per_rater=40, arms=plain.arms, pairs=pairs, checks=())
    found = []
    for each in (plain, study):
        answers = answers_of(each, 20, 30, lambda rater, pair: float(pair.item // 6 < 7))
        results = compute_results(each, answers)
        assert results.counted is not None
        found.append((results.counted.pairs[0], said(each, answers)))
    (independent, said_plain), (clustered, said_family) = found
    assert (independent.captions, clustered.captions) == (60, 10) and independent.rate.value == clustered.rate.value
    assert clustered.rate.high - clustered.rate.low > 1.8 * (independent.rate.high - independent.rate.low)
    assert "captions are taken as independent" in said_plain and "captions are taken as independent" not in said_family
    assert "10 families" in said_family
    one = (plain.pairs[0].model_copy(update={"family": "a drawing"}), *plain.pairs[1:])
    study = Study.make(question="Which?", seed=0, per_rater=40, arms=plain.arms, pairs=one, checks=())
    text = said(study, answers_of(study, 20, 30, lambda rater, pair: 1.0))
    assert "59 captions of no known family: each is taken as independent" in text, "one picture with a family says nothing of the others"


def test_more_than_two_arms_have_corrected_differences() -> None:
    study = a_study(arms=3, captions=20, checks=0)
    answers = answers_of(study, 8, 30, lambda rater, pair: float((rater + pair.item) % 4 > 0) if pair.arms == (0, 1) else 0.5)
    text = said(study, answers)
    assert "p corrected for 3 differences by Holm" in text and "arm A - arm B" in text
    assert "that all 3 do at once is less likely" in text


def test_one_rater_speaks_for_nobody_else() -> None:
    study = a_study()
    answers = answers_of(study, 1, 40, lambda rater, pair: float(pair.item % 3 != 0))
    assert "say nothing about other people" in said(study, answers)
    found = compute_results(study, answers)
    assert found.counted is not None and found.counted.agreement is None
    rate = found.counted.pairs[0].rate
    assert rate.low < 2 / 3 < rate.high and rate.high - rate.low > 0.2


def test_two_raters_give_a_wide_interval() -> None:
    """One always prefers A, one prefers it half the time: nobody knows what a third would say."""
    study = a_study()
    answers = answers_of(study, 2, 40, lambda rater, pair: 1.0 if rater else float(pair.item % 2))
    found = compute_results(study, answers)
    assert found.counted is not None and found.counted.pairs[0].rate.low < 0.3
    assert "2 raters are few" in said(study, answers)


def test_only_ties_are_no_preference() -> None:
    study = a_study()
    answers = answers_of(study, 5, 20, lambda rater, pair: 0.5)
    found = compute_results(study, answers)
    assert found.counted is not None and found.counted.sides is None
    (pair,) = found.counted.pairs
    assert pair.decided is None and pair.rate.value == 0.5 and 0.4 < pair.rate.low < pair.rate.high < 0.6
    (group,) = found.counted.groups
    assert all(each.strength.value == pytest.approx(0) and each.strength.low < 0 < each.strength.high for each in group.strengths)
    text = said(study, answers)
    assert "all are ties" in text and "all answers are the same" in text


def test_an_arm_that_always_wins_has_a_finite_strength() -> None:
    study = a_study()
    found = compute_results(study, answers_of(study, 6, 10, lambda rater, pair: 1.0))
    assert found.counted is not None
    (pair,), (group,) = found.counted.pairs, found.counted.groups
    assert pair.rate.value == pair.rate.high == 1 and pair.rate.low < 0.95
    assert 0 < group.strengths[0].strength.low < group.strengths[0].strength.high < 10


def test_arms_that_no_answer_connects_are_said() -> None:
    study = a_study(arms=5, captions=10)
    chosen = [pair for pair in study.pairs if pair.arms in ((0, 1), (2, 3))]
    answers = [answer_of(study, rater(who), pair, float(pair.item % 2)) for who in range(6) for pair in chosen]
    text = said(study, answers)
    assert "no answer connects these groups of arms" in text and "arm A, arm B; arm C, arm D" in text
    assert "no answer about arm E yet" in text


def test_checks_alone_are_no_result() -> None:
    study = a_study()
    answers = [answer_of(study, rater(1), check, 1.0) for check in study.checks]
    assert "no pair has been answered" in said(study, answers)
    careless = [answer_of(study, rater(1), check, 0.5) for check in study.checks] + [answer_of(study, rater(1), study.pairs[0], 1.0)]
    assert "no rater is left" in said(study, careless)


def test_who_always_presses_left_is_seen() -> None:
    study = a_study()
    answers = [replace(answer, choice="left") for answer in answers_of(study, 8, 40, lambda rater, pair: 1.0)]
    found = compute_results(study, answers, 0.0)
    assert found.counted is not None and found.counted.sides is not None
    assert found.counted.sides.p_value < 1e-6
    assert found.counted.pairs[0].rate.low < 0.5 < found.counted.pairs[0].rate.high  # sides are at random: no arm gains


def test_checks_count_neither_as_sides_nor_as_time() -> None:
    """A rater who chooses left on 15 of 20 pairs, 3 s each; checks are answered on the right side, at once."""
    study = a_study(checks=10)
    pairs = [replace(each, choice="left" if number < 15 else "right", ms=3000) for number, each in enumerate(to_pairs(study, 20))]
    checks = [replace(answer_of(study, rater(1), check, 1.0), choice="right", swapped=True, ms=100) for check in study.checks]
    found = compute_results(study, pairs + checks)
    assert found.counted is not None and found.counted.sides is not None
    assert (found.counted.sides.left, found.counted.sides.decided) == (15, 20)
    exact, share = stats.binomtest(15, 20), found.counted.sides.share
    assert (found.counted.sides.p_value, share.low, share.high) == pytest.approx((exact.pvalue, *exact.proportion_ci(0.95)))
    assert (found.raters[0].left_share, found.raters[0].median_s, found.raters[0].checks_passed) == (0.75, 3.0, 10)
    text = said(study, pairs + checks)
    assert "of 20 decided answers to pairs" in text and "answers, left, median: of pairs, without attention checks" in text
    (alone,) = compute_results(study, checks).raters
    assert (alone.left_share, alone.median_s) == (None, None) and "no pair has been answered" in said(study, checks)


def to_pairs(study: Study, count: int) -> list[Answer]:
    return [answer_of(study, rater(1), pair, 1.0) for pair in study.pairs[:count]]


def test_the_command_says_and_writes_its_figures(study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = read_study(str(study_folder))
    answers = answers_of(study, 6, 8, lambda rater, pair: 1.0 if pair.arms == (0, 1) else 0.5)
    assert main(["study", "results", str(study_folder)]) == 2
    assert "no answers are here yet" in capsys.readouterr().err
    store(study_folder, answers)
    out = tmp_path / "figures.json"
    assert main(["study", "results", str(study_folder), "--json", str(out)]) == 0
    text = capsys.readouterr().out
    figures = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert figures == json.loads(json.dumps(asdict(compute_results(study, merged_answers(study, [str(study_folder / ANSWERS)])))))
    assert f"6 raters, {figures['counted']['answers']} answers" in text and "ordered to control" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_answers_of_several_servers_are_merged(study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy of the folder for each; what is in two files counts once."""
    study = read_study(str(study_folder))
    answers = answers_of(study, 4, 8, lambda rater, pair: 1.0)
    first, rest = answers[:30], answers[20:]
    shutil.copytree(study_folder, tmp_path / "copy")
    store(study_folder, first)
    store(tmp_path / "copy", rest)
    assert main(["study", "results", str(study_folder), str(tmp_path / "copy" / ANSWERS)]) == 0
    assert "4 raters, 32 answers" in capsys.readouterr().out
    (tmp_path / "copy" / ANSWERS).unlink()
    store(tmp_path / "copy", [replace(answers[0], choice="tie")])
    with pytest.raises(UserError, match="in two ways"):
        merged_answers(study, [str(study_folder / ANSWERS), str(tmp_path / "copy" / ANSWERS)])


def test_an_answer_to_no_comparison_of_the_study_is_refused(study_folder: Path) -> None:
    study = read_study(str(study_folder))
    store(study_folder, [replace(answers_of(study, 1, 1, lambda rater, pair: 1.0)[0], comparison="0" * 32)])
    with pytest.raises(UserError, match="which the study does not have"):
        merged_answers(study, [str(study_folder / ANSWERS)])


@pytest.mark.parametrize("package", ["evalica", "scipy"])
def test_results_without_their_packages_name_the_extra(
    package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["study", "results", "no/study"]) == 2
    assert "pip install 'oar_scale[study]'" in capsys.readouterr().err
