"""CSV and TSV files, read as they are meant: separator, quoting and encoding are those under which the file makes sense.

    separator    comma, semicolon, tab or bar: the one with which the header has the columns that are asked for
    quoting      used (a quotation mark inside of a cell is doubled, or follows a backslash; blanks may stand before the one that
                 begins a cell) where all rows are whole and nothing else stands beside the quotation marks, as a program writes them;
                 elsewhere unless the lines make more whole rows without it: then quotation marks are letters of the cells
    encoding     UTF-8, or what a byte order mark says

A row with more cells than the header has an unquoted separator. Where the last column is one that is wanted, the rest belongs to it;
elsewhere nobody can tell which column has it, and the row is a bad sample. Such rows, and those with fewer cells, are counted.
"""

from __future__ import annotations

import csv
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TextIO

from oar_scale.data.notes import Notes
from oar_scale.data.sources.columns import Cell, check_header
from oar_scale.errors import UserError
from oar_scale.text import encoding_of

_SEPARATORS = (",", ";", "\t", "|")
_LONGEST_HEADER = 1 << 20
_ESCAPED = re.compile("[\udc80-\udcff]")
TOO_LONG = "more cells than the header has columns: a separator without quotation marks"
"""Why a row is a bad sample."""
LONGER = "rows with more cells than the header: the rest was taken for the last column"
SHORTER = "rows with fewer cells than the header: the last ones are empty"


class _Form(NamedTuple):
    """How the cells of a file are written."""

    encoding: str
    separator: str
    quoting: Literal["quotes", "backslashes", "none"]
    """Around cells, and doubled or behind a backslash inside of them; or quotation marks are letters."""
    first: int
    """The line of the header: 1, or 2 behind the line ``sep=;`` that Excel writes."""
    blanks: bool = False
    """Whether a quotation mark begins a cell that blanks stand in front of."""


def read_csv(path: str, where: str, wanted: set[str], notes: Notes) -> tuple[list[str], dict[str, list[Cell]], set[int]]:
    """The header, the wanted columns, and which of their rows have more cells than columns that the rest could belong to.

    Args:
        where: names the file in errors.
        notes: gets the rows that have other numbers of cells than the header.

    Raises:
        UserError: it is no text, or no table.
    """
    with open(path, "rb") as file:
        encoding = encoding_of(file.read(4))
    csv.field_size_limit(sys.maxsize)  # the default of 131,072 characters is a guard for others
    try:
        form = _form(path, encoding, wanted)
        rows = _rows(path, form)
        header = next(rows, [])
        if any("\0" in name for name in header):
            raise UserError(f"{where}: is UTF-16 or UTF-32 without a byte order mark, or no text at all; save it as UTF-8")
        check_header(header, wanted, where)
        bad = set[int]()
        kept = [(header.index(name), name, list[Cell]()) for name in dict.fromkeys(header) if name in wanted]
        for number, cells in enumerate(rows, 2):
            if len(cells) > len(header) and header[-1] not in wanted:
                bad.add(number - 2)
            elif len(cells) != len(header):
                notes.add(LONGER if len(cells) > len(header) else SHORTER, f"{where}: row {number}")
                cells = [*cells[: len(header) - 1], form.separator.join(cells[len(header) - 1 :])]
            for index, _, column in kept:
                column.append(_cell(cells[index]) if index < len(cells) else "")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not {encoding.upper()} as its byte order mark says; save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{where}: no table ({error})") from error
    return header, {name: column for _, name, column in kept}, bad


def _cell(text: str) -> Cell:
    """Bytes where a cell is not UTF-8: they are still the name of a file, but no caption."""
    return text.encode("utf-8", "surrogateescape") if not text.isascii() and _ESCAPED.search(text) else text


def _form(path: str, encoding: str, wanted: set[str]) -> _Form:
    with _open(path, encoding) as text:
        header, first = text.readline(_LONGEST_HEADER), 1
        said = re.fullmatch(r"sep=(.)\s*", header)
        if said:
            header, first = text.readline(_LONGEST_HEADER), 2
        order = ("\t", *_SEPARATORS) if path.lower().endswith((".tsv", ".tab")) else _SEPARATORS
        separator = said[1] if said else _separator(header, order, wanted)
        spaced = re.compile(re.escape(separator) + ' +"')
        quotes = backslashes = blanks = False
        for line in itertools.chain([header], text):
            if '"' in line:
                quotes, backslashes = True, backslashes or '\\"' in line
                blanks = blanks or spaced.search(line) is not None
    form = _Form(encoding, separator, "quotes", first)
    if not quotes:
        return form
    quoted = [form, form._replace(quoting="backslashes")] if backslashes else [form]
    if blanks:
        quoted = [*(each._replace(blanks=True) for each in quoted), *quoted]
    written = next((each for each in quoted if _is_strict(path, each) and _all_whole(path, each)), None)
    if written is not None:
        return written
    return max([*quoted, form._replace(quoting="none")], key=lambda each: (_whole_rows(path, each), _is_strict(path, each)))


def _separator(header: str, order: Sequence[str], wanted: set[str]) -> str:
    """The first separator with which a header has the wanted columns, or else the one with which it has most."""

    def columns(separator: str) -> list[str]:
        return next(csv.reader([header], delimiter=separator, skipinitialspace=True), [])

    fitting = (each for each in order if wanted <= {name.strip() for name in columns(each)})
    return next(fitting, None) or max(order, key=lambda each: len(columns(each)))


def _whole_rows(path: str, form: _Form) -> int:
    """How many rows have as many cells as the header."""
    rows = _rows(path, form)
    columns = len(next(rows, []))
    return sum(len(cells) == columns for cells in rows)


def _all_whole(path: str, form: _Form) -> bool:
    """Whether every row has as many cells as the header, and none swallowed others behind a quotation mark that is a letter.

    A line of prose has blanks behind its commas, a row has none behind its separators.
    """
    rows, between = _rows(path, form), re.compile(re.escape(form.separator) + r"(?=\S)")
    columns = len(next(rows, []))
    fewest = max(columns - 1, 1)

    def swallowed(cell: str) -> bool:
        return "\n" in cell and any(len(between.findall(line)) >= fewest for line in cell.splitlines()[1:])

    return all(len(cells) == columns and not any(map(swallowed, cells)) for cells in rows)


def _is_strict(path: str, form: _Form) -> bool:
    """Whether quotation marks stand around whole cells only, as a program writes them."""
    try:
        return sum(1 for _ in _rows(path, form, strict=True)) > 0
    except csv.Error:
        return False


def _rows(path: str, form: _Form, *, strict: bool = False) -> Iterator[list[str]]:
    """The rows, the header first; blank lines are none, nor are empty cells behind the last column."""
    quoting: Literal[0, 3] = csv.QUOTE_NONE if form.quoting == "none" else csv.QUOTE_MINIMAL
    escape = "\\" if form.quoting == "backslashes" else None
    with _open(path, form.encoding) as file:
        lines = itertools.islice(file, form.first - 1, None)
        reader = csv.reader(
            lines,
            delimiter=form.separator,
            quoting=quoting,
            escapechar=escape,
            doublequote=escape is None,
            skipinitialspace=form.blanks,
            strict=strict,
        )
        rows = (cells for cells in reader if cells)
        header = [name.strip() for name in next(rows, [])]
        yield header
        for cells in rows:
            while len(cells) > len(header) and not cells[-1]:
                cells.pop()
            yield cells


def _open(path: str, encoding: str) -> TextIO:
    return open(path, encoding=encoding, errors="surrogateescape" if encoding.startswith("utf-8") else "strict", newline="")
