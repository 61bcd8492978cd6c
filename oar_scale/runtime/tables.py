"""Tables of plain text, laid out by rich: for terminals, pipes and files alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Align = Literal["left", "first left", "numbers right"]


def text_table(rows: Sequence[Sequence[str]], align: Align = "left") -> list[str]:
    """The lines of a table: columns as wide as their widest cell, two spaces apart, no rules, nothing wrapped or cut off.

    Args:
        rows: the cells, heads included; all rows have the same number.
        align: every cell to the left; the first column to the left and the others to the right; or cells that begin like a number
            to the right and the others to the left.
    """
    table = Table.grid(padding=(0, 2))
    for _ in rows[0]:
        table.add_column(no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell, justify=_justify(cell, column, align)) for column, cell in enumerate(row)))
    measure = Console(file=StringIO(), width=1 << 16, color_system=None, legacy_windows=False)
    measure.print(table, crop=False, soft_wrap=True)
    output = measure.file
    assert isinstance(output, StringIO)
    return [line.rstrip() for line in output.getvalue().splitlines()]


def _justify(cell: str, column: int, align: Align) -> Literal["left", "right"]:
    right = column > 0 if align == "first left" else align == "numbers right" and re.match(r"[-\d.]", cell) is not None
    return "right" if right else "left"
