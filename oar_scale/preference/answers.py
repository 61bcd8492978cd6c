"""The SQLite file of a study's answers: one row an answer, kept before the rater sees the next pair.

    study       its fingerprint: answers of another study are refused
    showings    what a rater was shown, at which place of the session, with which sides: so a session goes on after anything
    answers     fingerprint, rater, comparison, sides, choice, milliseconds since it was shown; once for each rater and comparison

A rater is a random number that the page made. Nothing else about a person is stored: no name, address, browser or time of day.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from oar_scale.errors import UserError
from oar_scale.text import shown

Choice = Literal["left", "right", "tie"]
LONGEST_MS = 24 * 3600 * 1000
"""A longer time to answer is stored as this: the page was left open."""

_TABLES = """
CREATE TABLE IF NOT EXISTS study (fingerprint TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS showings (
    rater TEXT NOT NULL, comparison TEXT NOT NULL, place INTEGER NOT NULL, swapped INTEGER NOT NULL CHECK (swapped IN (0, 1)),
    PRIMARY KEY (rater, comparison), UNIQUE (rater, place)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (
    study TEXT NOT NULL, rater TEXT NOT NULL, comparison TEXT NOT NULL, swapped INTEGER NOT NULL CHECK (swapped IN (0, 1)),
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie')), ms INTEGER NOT NULL,
    PRIMARY KEY (rater, comparison)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Showing:
    """What a rater was shown, and perhaps answered."""

    comparison: str
    place: int
    """In the rater's session, from 0."""
    swapped: bool
    """The first picture was on the right."""
    choice: Choice | None


@dataclass(frozen=True)
class Answer:
    """One row."""

    study: str
    rater: str
    comparison: str
    swapped: bool
    choice: Choice
    ms: int
    """From when both pictures were shown to the answer."""


class Answers:
    """The file, open for writing. Calls from several threads take turns."""

    def __init__(self, path: str, study: str) -> None:
        """Open or make it.

        Args:
            study: fingerprint of the study that is served.

        Raises:
            UserError: it belongs to another study, is damaged, or cannot be written.
        """
        self._path, self._study, self._lock = path, study, threading.RLock()
        with _explained(path):
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Close it; SQLite then folds its log into the file."""
        with self._lock:
            self._connection.close()

    def session(self, rater: str) -> list[Showing]:
        """What a rater was shown, in the order of the session."""
        query = (
            "SELECT s.comparison, s.place, s.swapped, a.choice FROM showings s LEFT JOIN answers a USING (rater, comparison) "
            "WHERE s.rater = ? ORDER BY s.place"
        )
        with self._lock:
            return [
                Showing(name, place, bool(swapped), choice) for name, place, swapped, choice in self._connection.execute(query, (rater,))
            ]

    def show(self, rater: str, showing: Showing) -> None:
        """Note that a rater is shown a comparison."""
        with self._lock:
            row = (rater, showing.comparison, showing.place, showing.swapped)
            self._connection.execute("INSERT INTO showings VALUES (?, ?, ?, ?)", row)

    def answer(self, rater: str, showing: Showing, choice: Choice, ms: int) -> None:
        """Keep an answer. One that is there already stays as it is."""
        with self._lock:
            row = (self._study, rater, showing.comparison, showing.swapped, choice, min(ms, LONGEST_MS))
            self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)

    def undo(self, rater: str, comparison: str) -> None:
        """Remove an answer."""
        with self._lock:
            self._connection.execute("DELETE FROM answers WHERE rater = ? AND comparison = ?", (rater, comparison))

    def counts(self) -> Counter[str]:
        """Answers of each comparison."""
        with self._lock:
            return Counter(dict(self._connection.execute("SELECT comparison, count(*) FROM answers GROUP BY comparison")))

    def raters(self) -> set[str]:
        """All who were shown anything."""
        with self._lock:
            return {rater for (rater,) in self._connection.execute("SELECT DISTINCT rater FROM showings")}

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")  # an answer that was confirmed survives a power cut
        _check(self._connection, self._path)
        self._connection.executescript(_TABLES)
        self._connection.execute("INSERT OR IGNORE INTO study VALUES (?)", (self._study,))
        known = [each for (each,) in self._connection.execute("SELECT fingerprint FROM study")]
        if known != [self._study]:
            self._connection.execute("DELETE FROM study WHERE fingerprint = ?", (self._study,))
            raise UserError(
                f"{self._path}: holds the answers of another study. Serve the folder that it belongs to, or move the file away."
            )


def read_answers(path: str, study: str) -> list[Answer]:
    """All answers of a file, also while it is being served.

    Raises:
        UserError: no such file, a damaged one, or answers of another study.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no answers are here yet. oar study serve makes this file.")
    with _explained(path):
        connection = sqlite3.connect(path)
        try:
            _check(connection, path)
            query = "SELECT study, rater, comparison, swapped, choice, ms FROM answers ORDER BY rater, comparison"
            answers = [
                Answer(of, rater, name, bool(swapped), choice, ms) for of, rater, name, swapped, choice, ms in connection.execute(query)
            ]
        finally:
            connection.close()
    for answer in answers:
        if answer.study != study:
            raise UserError(f"{path}: an answer of rater {shown(answer.rater)} belongs to another study ({shown(answer.study)})")
    return answers


def _check(connection: sqlite3.Connection, path: str) -> None:
    """Raise UserError where SQLite finds a fault in the file."""
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise _damaged(path, str(found))


def _damaged(path: str, why: str) -> UserError:
    return UserError(
        f"{path}: this file is damaged, or is no SQLite file of a study ({why}). Put a copy of it back; "
        f"`sqlite3 {path} .recover` saves what can be read."
    )


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if "no such" in str(error):  # table or column
            raise _damaged(path, str(error)) from error
        raise UserError(f"{path}: cannot be used ({error}). See whether its folder can be written to, and has room.") from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from error
