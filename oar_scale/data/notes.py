"""What a stage left out or changed, and why: nothing of the user's data is dropped or altered without a word.

Whoever reads data adds a note where it passes something over or takes it otherwise than it is there:

    notes.add("files that are no data, left out", "photos/._cat.jpg")
    notes.add("captions that are not UTF-8, read with U+FFFD", "cat")

Notes are counted by their reason, with the names of the first few. The stage or command prints them as one line at its end
(:meth:`Notes.line`) and keeps them in its record (:meth:`Notes.record`: a marker, an event, JSON):

    left out or changed: 20 files that are no data, left out (photos/._cat.jpg, ...); 1 captions that are ... (cat)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from threading import Lock

from oar_scale.json_object import JsonObject

EXAMPLES = 3
"""Names that are kept for a reason."""
NAME_LENGTH = 200
"""Characters of a name that are shown."""

NO_DATA = "files that are no data, left out"
SEVERAL_FORMATS = "samples with pictures of several formats, of which one is taken"
BAD_SAMPLES = "bad samples, left out"


class Notes:
    """Counts by reason, with a few examples. Safe to use from several threads."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}
        self._lock = Lock()

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count one more of this reason (a phrase that follows a number), or ``count`` of which ``name`` is an example."""
        with self._lock:
            self._counts[reason] = self._counts.get(reason, 0) + count
            examples = self._examples.setdefault(reason, [])
            if len(examples) < EXAMPLES:
                examples.append(printable(name))

    def merge(self, record: Mapping[str, JsonObject]) -> None:
        """Add the notes of another process or an earlier attempt, as :meth:`record` returned them."""
        for reason, noted in record.items():
            with self._lock:
                self._counts[reason] = self._counts.get(reason, 0) + noted["count"]
                examples = self._examples.setdefault(reason, [])
                examples += noted["examples"][: EXAMPLES - len(examples)]

    def record(self) -> dict[str, JsonObject]:
        """The notes as JSON: ``{reason: {"count": 20, "examples": [...]}}``."""
        with self._lock:
            return {reason: {"count": count, "examples": list(self._examples[reason])} for reason, count in self._counts.items()}

    def line(self) -> str:
        """The closing line of a stage: ``left out or changed: ...``; empty where there is nothing to say."""
        phrases = "; ".join(_phrases(self.record()))
        return f"left out or changed: {phrases}" if phrases else ""


def escaped(name: str) -> str:
    """A name from outside with its control characters and lone surrogates escaped."""
    return name if name.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in name)


def printable(name: str) -> str:
    """A name from outside as it may be printed: control characters and lone surrogates escaped, very long ones cut."""
    shown = escaped(name)
    return shown if len(shown) <= NAME_LENGTH else shown[:NAME_LENGTH] + "..."


def _phrases(record: Mapping[str, JsonObject]) -> Iterator[str]:
    for reason, noted in record.items():
        more = ", ..." if noted["count"] > len(noted["examples"]) else ""
        yield f"{noted['count']} {reason} ({', '.join(noted['examples'])}{more})"
