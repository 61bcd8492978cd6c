"""The tables of docs/results/evidence-emoji.md are those of the values that are committed beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import flexibility_tables

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
DATA = RESULTS / "evidence-emoji"
AGAINST = "## Differences to the any-order model"


def rows(section: str) -> list[str]:
    """Those with figures; the rest of the page is words."""
    return [line for line in section.splitlines() if line.startswith("|") and ("±" in line or ", itself |" in line)]


def sections() -> tuple[str, str]:
    """The differences to the control, and those to the any-order model."""
    before, after = (RESULTS / "evidence-emoji.md").read_text(encoding="utf-8").split(AGAINST)
    return before, after


def printed(against: str | None = None) -> set[str]:
    """All lines of the tables of the reports."""
    lines = {line for report in DATA.iterdir() for table in flexibility_tables.tables(report, against) for line in table.splitlines()}
    assert lines
    return lines


def test_differences_to_the_control_are_those_of_the_reports() -> None:
    shown = rows(sections()[0])
    assert len(shown) > 10 and not set(shown) - printed()


@pytest.mark.slow
def test_differences_to_the_any_order_model_are_of_the_same_values() -> None:
    shown = rows(sections()[1])
    assert len(shown) > 5 and not set(shown) - printed("any_order")
