"""A table of images: a CSV or Parquet file with a row for each, its path in one column and its caption in others.

Path and caption are the name of a column, or a text with columns in braces:

    image: "images/{id}.jpg"        caption: "{baseColour} {articleType}: {productDisplayName}"
"""

from __future__ import annotations

import csv
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence

from oar_scale.config.schema import TableSource
from oar_scale.data.notes import Notes
from oar_scale.data.sources.image_files import key_of, square
from oar_scale.data.sources.source import BadImage, Content, SourceImage
from oar_scale.errors import UserError

Columns = dict[str, Sequence[str]]
_FIELD = re.compile(r"\{([^{}]*)\}")


class TableImages:
    """The images, cropped to the central square and resized. The columns that are used stay in memory, the images do not."""

    def __init__(self, config: TableSource) -> None:
        self.notes = Notes()
        self.attribution = config.attribution
        self.root = config.root or os.path.dirname(config.path) or "."
        fields = {field: getattr(config, field) for field in ("image", "caption", "label", "name", "family")}
        wanted = {field: _columns_of(text) for field, text in fields.items() if text is not None}
        columns, self.rows = _read_table(config.path, {column for names in wanted.values() for column in names}, wanted)
        self._fields = {field: _filler(fields[field], columns) for field in wanted}

    def images(self) -> Iterator[SourceImage]:
        """One image for each row of the table."""
        for row in range(self.rows):
            path = self._cell("image", row)
            name = self._cell("name", row) or os.path.splitext(path)[0] or f"row {row}"
            key = key_of(path) if path else f"row-{row}"
            yield SourceImage(key, name, functools.partial(self._read, row), self._cell("family", row))

    def _cell(self, field: str, row: int) -> str:
        """Empty for a field that the recipe does not set."""
        return self._fields[field](row) if field in self._fields else ""

    def _read(self, row: int, size: int) -> Content:
        path, caption = self._cell("image", row), self._cell("caption", row)
        if not path:
            raise BadImage("no path")
        if not caption:
            raise BadImage("no caption")
        return Content(square(os.path.join(self.root, path), size), caption, self._metadata(row))

    def _metadata(self, row: int) -> dict[str, int]:
        if "label" not in self._fields:
            return {}
        label = self._cell("label", row)
        if not label.isdecimal():
            raise BadImage(f"its label {label!r} is no whole number")
        return {"label": int(label)}


def _columns_of(text: str) -> list[str]:
    return _FIELD.findall(text) if "{" in text else [text]


def _filler(text: str, columns: Columns) -> Callable[[int], str]:
    """Return a function that fills a column, or a text with columns in it, from a row; blanks left by an empty cell are removed."""
    if "{" not in text:
        return lambda row: columns[text][row].strip()
    return lambda row: " ".join(_FIELD.sub(lambda field: columns[field[1]][row].strip(), text).split())


def _read_table(path: str, wanted: set[str], by_field: dict[str, list[str]]) -> tuple[Columns, int]:
    """The wanted columns as text, empty where a cell is, and the number of rows.

    Raises:
        UserError: no such file, or not a table, or without one of the columns.
    """
    if not os.path.isfile(path):
        raise UserError(f"data.source.path {path}: no such file")
    read = _read_parquet if path.endswith((".parquet", ".pq")) else _read_csv
    header, columns = read(path, wanted)
    for field, names in by_field.items():
        missing = next((name for name in names if name not in header), None)
        if missing is not None:
            raise UserError(f"data.source.{field}: {path} has no column {missing!r}; it has {', '.join(header)}")
    rows = len(next(iter(columns.values()), ()))
    if not rows:
        raise UserError(f"data.source.path {path}: a table without a row, or data.source.image names no column")
    return columns, rows


def _read_parquet(path: str, wanted: set[str]) -> tuple[list[str], Columns]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        header = list(pq.read_schema(path).names)
        table = pq.read_table(path, columns=[name for name in header if name in wanted])
        return header, {name: ["" if cell is None else str(cell) for cell in table.column(name).to_pylist()] for name in table.column_names}
    except pa.ArrowException as error:
        raise UserError(f"data.source.path {path}: not a Parquet file that can be read ({error})") from error


def _read_csv(path: str, wanted: set[str]) -> tuple[list[str], Columns]:
    """A line with more cells than the header has an unquoted comma in its last column: that is where the rest belongs."""
    separator = "\t" if path.endswith(".tsv") else ","
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        lines = csv.reader(file, delimiter=separator)
        try:
            header = next(lines, [])
            kept = [(header.index(name), name, list[str]()) for name in dict.fromkeys(header) if name in wanted]
            for cells in lines:
                if len(cells) > len(header):
                    cells = [*cells[: len(header) - 1], separator.join(cells[len(header) - 1 :])]
                if cells:
                    for index, _, column in kept:
                        column.append(cells[index] if index < len(cells) else "")
        except csv.Error as error:
            raise UserError(f"data.source.path {path}: line {lines.line_num} is no row of a table ({error})") from error
    return header, {name: column for _, name, column in kept}
