"""Who is shown what next.

A session has ``per_rater`` pairs and all attention checks, of which each lies at a random place of its own stretch of the session:

    place     0   1   2   3   4   5   6   7   8   9
              pair    check   pair        check       pair ...

A pair is the one that the fewest raters have answered or have before them at the moment, so that all are answered equally often whoever
leaves when; among equals a hash of rater and pair decides. What a rater was shown is stored, so the same session goes on after a reload of
the page, a restart of the server, or a year.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from oar_scale.preference.answers import Answers, Choice, Showing
from oar_scale.preference.study import Comparison, Study
from oar_scale.serve.api_errors import ApiError

AHEAD = 2
"""Comparisons that a page holds: the one that is shown, and the next."""
AWAY_S = 900.0
"""Who asks for nothing for so long has left: what is before them goes to others as well."""
MOST_RATERS = 10_000


@dataclass(frozen=True)
class Session:
    """Where a rater is."""

    done: int
    total: int
    last: str | None
    """The comparison that was answered last, which can be undone."""
    next: tuple[Showing, ...]


class Sessions:
    """The sessions of one study. Calls from several threads take turns, so that two raters never see each other's half-done work."""

    def __init__(self, study: Study, answers: Answers, clock: Callable[[], float] = time.monotonic) -> None:
        self.study = study
        self.comparisons: dict[str, Comparison] = {each.id: each for each in (*study.pairs, *study.checks)}
        self._answers, self._clock, self._lock = answers, clock, threading.Lock()
        self._counts = answers.counts()
        self._raters = answers.raters()
        self._seen: dict[str, float] = {}
        self._before: dict[str, set[str]] = {}
        """Of raters who are there: pairs that they have not answered yet."""

    @property
    def total(self) -> int:
        """Comparisons of a whole session."""
        return min(self.study.per_rater, len(self.study.pairs)) + len(self.study.checks)

    def at(self, rater: str) -> Session:
        """Where a rater is, and what comes next. Raises ApiError where there are too many raters."""
        with self._lock:
            return self._session(rater)

    def answer(self, rater: str, comparison: str, choice: Choice, ms: int) -> Session:
        """Take an answer. The same comparison a second time changes nothing: a request may come twice.

        Raises:
            ApiError: the rater is not asked about this comparison now.
        """
        with self._lock:
            showing = next((each for each in self._answers.session(rater) if each.comparison == comparison), None)
            if showing is None:
                raise ApiError(404, "this pair is not one that you were shown", param="comparison", code="unknown_pair")
            if showing.choice is None:
                current = self._session(rater).next[0]
                if current.comparison != comparison:
                    raise ApiError(409, "another pair comes first", param="comparison", code="not_now")
                self._answers.answer(rater, showing, choice, ms)
                self._counts[comparison] += 1
            return self._session(rater)

    def undo(self, rater: str, comparison: str) -> Session:
        """Take the last answer back, if it is the one of this comparison: a request may come twice."""
        with self._lock:
            if self._session(rater).last == comparison:
                self._answers.undo(rater, comparison)
                self._counts[comparison] -= 1
            return self._session(rater)

    def _session(self, rater: str) -> Session:
        shown = self._answers.session(rater)
        if not shown and rater not in self._raters:
            if len(self._raters) >= MOST_RATERS:
                raise ApiError(429, "this study has as many raters as it can take", code="too_many_raters")
            self._raters.add(rater)
        answered = [each for each in shown if each.choice is not None]
        waiting = [each for each in shown if each.choice is None]
        self._seen[rater] = self._clock()
        self._before[rater] = {each.comparison for each in waiting}
        while len(waiting) < AHEAD and len(shown) < self.total:
            showing = self._choose(rater, shown)
            self._answers.show(rater, showing)
            self._before[rater].add(showing.comparison)
            shown.append(showing)
            waiting.append(showing)
        last = answered[-1].comparison if answered else None
        return Session(len(answered), self.total, last, tuple(waiting[:AHEAD]))

    def _choose(self, rater: str, shown: list[Showing]) -> Showing:
        place = len(shown)
        comparison = self._check_at(rater, place) or self._least_answered(rater, {each.comparison for each in shown})
        return Showing(comparison, place, self.study.swapped(rater, comparison), None)

    def _check_at(self, rater: str, place: int) -> str | None:
        """The check of this place, if it is one of the places that have one."""
        checks = sorted(self.study.checks, key=lambda each: self.study.digest("check order", rater, each.id))
        for number, check in enumerate(checks):
            start, end = (self.total * at // len(checks) for at in (number, number + 1))
            if place == start + self.study.digest("check place", rater, number) % (end - start):
                return check.id
        return None

    def _least_answered(self, rater: str, shown: set[str]) -> str:
        away = [each for each, seen in self._seen.items() if self._clock() - seen > AWAY_S]
        for each in away:
            del self._seen[each], self._before[each]
        load = self._counts + Counter(name for names in self._before.values() for name in names)
        free = (pair.id for pair in self.study.pairs if pair.id not in shown)
        return min(free, key=lambda name: (load[name], self.study.digest("turn", rater, name)))
