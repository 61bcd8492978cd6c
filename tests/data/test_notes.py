"""Notes: what was left out or changed is counted by reason and named, in one line and in the record of the stage."""

from __future__ import annotations

from oar_scale.data.notes import Notes


def test_notes_count_by_reason_and_name_the_first() -> None:
    notes = Notes()
    for number in range(20):
        notes.add("files that are no data, left out", f"._p{number}.jpg")
    notes.add("odd captions", "cat")
    assert notes.line() == (
        "left out or changed: 20 files that are no data, left out (._p0.jpg, ._p1.jpg, ._p2.jpg, ...); 1 odd captions (cat)"
    )
    assert notes.record()["odd captions"] == {"count": 1, "examples": ["cat"]}


def test_notes_of_several_processes_add_up() -> None:
    whole, part = Notes(), Notes()
    for number in range(5):
        part.add("odd", str(number))
    for _ in range(2):
        whole.merge(part.record())
    assert whole.record() == {"odd": {"count": 10, "examples": ["0", "1", "2"]}}


def test_where_nothing_was_noted_nothing_is_said() -> None:
    assert (Notes().line(), Notes().record()) == ("", {})


def test_names_from_outside_cannot_write_on_the_terminal() -> None:
    notes = Notes()
    notes.add("odd", "a\x1b[31m\nb\udcff" + "x" * 1000)
    assert notes.line().isprintable() and notes.line().encode() and len(notes.line()) < 300
