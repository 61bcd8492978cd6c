"""Tables of text: plain, aligned, and never cut off."""

from __future__ import annotations

import pytest

from oar_scale.runtime.tables import Align, text_table

ROWS = [["STAGE", "STEP", "BYTES"], ["pretrain", "100", "2.5 GB"], ["x", "", "-"]]


@pytest.mark.parametrize(
    ("align", "expected"),
    [
        ("left", ["STAGE     STEP  BYTES", "pretrain  100   2.5 GB", "x               -"]),
        ("first left", ["STAGE     STEP   BYTES", "pretrain   100  2.5 GB", "x                    -"]),
        ("numbers right", ["STAGE     STEP  BYTES", "pretrain   100  2.5 GB", "x                    -"]),
    ],
)
def test_columns_are_two_spaces_apart(align: Align, expected: list[str]) -> None:
    assert text_table(ROWS, align) == expected


def test_a_narrow_terminal_cuts_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    long = "s3://bucket/" + "x" * 400
    assert text_table([[long, "1"], ["[bold]a[/bold] :smile:", "2"]]) == [f"{long}  1", f"{'[bold]a[/bold] :smile:':{len(long)}}  2"]
