"""Who is shown what: balanced counts, sides at random, checks for all, answers that count once."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from scipy.stats import binomtest
from small_study import rater, small_study

from oar_scale.errors import UserError
from oar_scale.preference.answers import Answers, read_answers
from oar_scale.preference.sessions import AWAY_S, Sessions
from oar_scale.preference.study import ANSWERS, Study, read_study
from oar_scale.serve.api_errors import ApiError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def study(study_folder: Path) -> Study:
    return read_study(str(study_folder))


@pytest.fixture
def answers(study_folder: Path, study: Study) -> Iterator[Answers]:
    opened = Answers(str(study_folder / ANSWERS), study.fingerprint)
    yield opened
    opened.close()


def answer_all(sessions: Sessions, who: str, most: int = 1000) -> list[str]:
    """Answer what is shown; returns the comparisons."""
    answered = []
    while (session := sessions.at(who)).next and len(answered) < most:
        answered.append(session.next[0].comparison)
        sessions.answer(who, answered[-1], "left", 1000)
    return answered


def test_all_pairs_are_answered_equally_often(study: Study, answers: Answers) -> None:
    """By raters who come and go: some at once, some of whom leave early."""
    clock = Clock()
    sessions = Sessions(study, answers, clock)
    for number in range(9):
        answer_all(sessions, rater(number), most=3 + number)
        clock.now += AWAY_S + 1
    counts = answers.counts()
    of_pairs = [counts[pair.id] for pair in study.pairs]
    assert sum(of_pairs) > 3 * len(study.pairs) and max(of_pairs) - min(of_pairs) <= 1


def test_two_raters_at_once_begin_with_different_pairs(study: Study, answers: Answers) -> None:
    sessions = Sessions(study, answers)
    shown = [showing.comparison for number in range(4) for showing in sessions.at(rater(number)).next]
    pairs = [name for name in shown if name not in {check.id for check in study.checks}]
    assert len(set(pairs)) == len(pairs) >= 4


def test_a_rater_sees_each_pair_once_and_every_check(study: Study, answers: Answers) -> None:
    sessions = Sessions(study, answers)
    for number in range(5):
        answered = answer_all(sessions, rater(number))
        assert len(answered) == len(set(answered)) == study.per_rater + len(study.checks)
        places = [answered.index(check.id) for check in study.checks]
        half = len(answered) // 2
        assert sorted(place // half for place in places) == [0, 1]  # one in each half of the session


def test_sides_are_at_random(study: Study) -> None:
    """Of the two arms, of all raters and within one; the same again for the same rater."""
    swaps = [study.swapped(rater(number), pair.id) for number in range(100) for pair in study.pairs]
    assert swaps == [study.swapped(rater(number), pair.id) for number in range(100) for pair in study.pairs]
    assert binomtest(sum(swaps), len(swaps)).pvalue > 1e-4
    for number in range(20):
        assert 0 < sum(study.swapped(rater(number), pair.id) for pair in study.pairs) < len(study.pairs)


def test_a_session_goes_on_after_a_restart(study_folder: Path, study: Study) -> None:
    path = str(study_folder / ANSWERS)
    first = Answers(path, study.fingerprint)
    sessions = Sessions(study, first)
    answered = answer_all(sessions, rater(1), most=4)
    answer_all(sessions, rater(2), most=3)
    before = sessions.at(rater(1))
    first.close()
    second = Answers(path, study.fingerprint)
    again = Sessions(study, second)
    assert again.at(rater(1)) == before
    rest = answer_all(again, rater(1))
    assert len({*answered, *rest}) == again.total
    second.close()


def test_an_answer_counts_once(study: Study, answers: Answers) -> None:
    """The first one, if the same comparison is answered twice; and the last one, if it was undone in between."""
    sessions = Sessions(study, answers)
    first = sessions.at(rater(1)).next[0].comparison
    once = sessions.answer(rater(1), first, "left", 500)
    assert sessions.answer(rater(1), first, "right", 700) == once and once.done == 1
    assert sessions.undo(rater(1), first).done == 0 and sessions.undo(rater(1), first).done == 0
    assert sessions.at(rater(1)).next[0].comparison == first
    sessions.answer(rater(1), first, "tie", 10**12)
    assert [(each.choice, each.ms) for each in read_answers(answers._path, study.fingerprint)] == [("tie", 24 * 3600 * 1000)]
    assert sum(answers.counts().values()) == 1


def test_answers_to_what_was_not_asked_are_refused(study: Study, answers: Answers) -> None:
    sessions = Sessions(study, answers)
    session = sessions.at(rater(1))
    shown = {showing.comparison for showing in session.next}
    other = next(pair.id for pair in study.pairs if pair.id not in shown)
    for name, code in ((other, "unknown_pair"), ("f" * 32, "unknown_pair"), (session.next[1].comparison, "not_now")):
        with pytest.raises(ApiError) as refused:
            sessions.answer(rater(1), name, "left", 100)
        assert refused.value.code == code
    assert not answers.counts()


def test_many_raters_at_once_do_not_interfere(study: Study, answers: Answers, study_folder: Path) -> None:
    sessions = Sessions(study, answers)
    answered: dict[str, list[str]] = {}

    def one(who: str) -> None:
        answered[who] = answer_all(sessions, who)

    threads = [threading.Thread(target=one, args=(rater(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = read_answers(str(study_folder / ANSWERS), study.fingerprint)
    assert Counter((row.rater, row.comparison) for row in rows) == Counter((who, name) for who, names in answered.items() for name in names)
    assert {row.study for row in rows} == {study.fingerprint}
    assert all(row.swapped == study.swapped(row.rater, row.comparison) for row in rows)


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, study_folder: Path, study: Study) -> None:
    path = study_folder / ANSWERS
    opened = Answers(str(path), study.fingerprint)
    answer_all(Sessions(study, opened), rater(1))
    opened.close()
    other = small_study(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="another study"):
        Answers(str(path), other.fingerprint)
    assert len(read_answers(str(path), study.fingerprint)) == 10  # nothing has happened to it
    whole = path.read_bytes()
    for damaged in (b"no database at all" * 100, whole[: len(whole) // 2], whole[:4096] + b"\xff" * 4096 + whole[8192:]):
        path.write_bytes(damaged)
        for attempt in (lambda: Answers(str(path), study.fingerprint), lambda: read_answers(str(path), study.fingerprint)):
            with pytest.raises(UserError, match="damaged"):
                attempt()
    with sqlite3.connect(tmp_path / "other.sqlite") as connection:
        connection.execute("CREATE TABLE pictures (name TEXT)")
    connection.close()
    with pytest.raises(UserError, match="is no SQLite file of a study"):
        read_answers(str(tmp_path / "other.sqlite"), study.fingerprint)
    path.write_bytes(whole)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE answers SET study = 'x' WHERE comparison = (SELECT min(comparison) FROM answers)")
    connection.close()
    with pytest.raises(UserError, match="another study"):
        read_answers(str(path), study.fingerprint)
