"""Columns of a table in memory, whatever file they come from, and how cells become text.

Cells are kept as the file has them: text, bytes, numbers, lists of texts, None. A cell that holds a whole picture is not kept but
spooled: its bytes go into one temporary file without a name (in ``TMPDIR``), and where they lie there is kept. So a table of any size is
read in one pass, some rows at a time, and its pictures are read in any order afterwards.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from oar_scale.data.labels import readable
from oar_scale.errors import UserError
from oar_scale.text import NotText, clean_text, decode_text, is_missing, shown


class Spooled(NamedTuple):
    """Where a picture lies in the spool."""

    start: int
    end: int


class Spool:
    """Bytes of pictures in one temporary file, which is made with the first of them and gone with the process."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._end = 0

    def add(self, data: bytes) -> Spooled:
        """Append bytes. Raises UserError where they cannot be written."""
        start = self._end
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="oar-pictures-", buffering=0)  # noqa: SIM115 (as long as the source)
            self._end += os.pwrite(self._file.fileno(), data, start)
            if self._end < start + len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: {os.strerror(error.errno or 0)}. The pictures of a table are kept here while it is prepared: "
                "free some space, or set TMPDIR to another disk."
            ) from error
        return Spooled(start, self._end)

    def read(self, at: Spooled) -> bytes:
        """The bytes of a picture. Called by several threads at once, after the last :meth:`add`."""
        assert self._file is not None
        return os.pread(self._file.fileno(), at.end - at.start, at.start)


Cell = str | bytes | int | float | list[object] | Spooled | None


@dataclass
class Columns:
    """The columns of a table that the recipe uses."""

    cells: dict[str, list[Cell]]
    rows_of: list[tuple[str, int]] = field(default_factory=list)
    """The files that the rows come from, and how many of them."""
    classes: dict[str, list[str]] = field(default_factory=dict)
    """Names of the classes of columns whose numbers stand for classes."""
    bad: dict[int, str] = field(default_factory=dict)
    """Rows that cannot be used, and why."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(rows for _, rows in self.rows_of)


def check_header(header: Sequence[str], wanted: set[str], where: str) -> None:
    """Raise UserError where a column that is used comes twice."""
    twice = next((name for name in header if name in wanted and header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: has {header.count(twice)} columns {shown(twice)}; give each a name of its own")


def cell_text(cell: Cell, names: Sequence[str] = ()) -> str:
    """A cell as text: empty where it is missing, whole numbers without a point, a class by its name.

    Args:
        names: of the classes that the column's numbers stand for.

    Raises:
        NotText: bytes that are no text.
    """
    if isinstance(cell, bytes):
        cell = decode_text(cell)
    if is_missing(cell):
        return ""
    if names and isinstance(cell, int):
        return readable(names[cell]) if 0 <= cell < len(names) else ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, list | Spooled):
        raise NotText("is no text")
    return clean_text(str(cell)).strip()


def path_of(cell: Cell) -> str:
    """A cell as a path: bytes that are no UTF-8 stay the name that they are on the disk. Raises NotText for what is no path."""
    if isinstance(cell, bytes):
        return cell.decode("utf-8", "surrogateescape").strip()
    return cell_text(cell)


class Template:
    """The name of a column, or a text with columns in braces; blanks left by an empty cell are removed."""

    _FIELD = re.compile(r"\{([^{}]*)\}")

    def __init__(self, text: str) -> None:
        self.text = text
        self.whole = "{" not in text
        self.columns: list[str] = [text] if self.whole else self._FIELD.findall(text)

    def fill(self, columns: Columns, row: int) -> str:
        """The text of a row. Raises NotText for cells that are none."""
        texts = {name: cell_text(columns.cells[name][row], columns.classes.get(name, ())) for name in self.columns}
        return texts[self.text] if self.whole else " ".join(self._FIELD.sub(lambda match: texts[match[1]], self.text).split())
