"""A table of images: CSV, TSV or Parquet files with a row for each, its picture or the path of it in one column, its caption in others.

Image and caption are the name of a column, or a text with columns in braces:

    image: "images/{id}.jpg"        caption: "{baseColour} {articleType}: {productDisplayName}"
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from PIL import Image

from oar_scale.config.schema import TableSource
from oar_scale.data.labels import label_of
from oar_scale.data.notes import Notes
from oar_scale.data.sources.captions import Caption, caption_of
from oar_scale.data.sources.columns import Columns, Spool, Spooled, Template, path_of
from oar_scale.data.sources.csv_table import TOO_LONG, read_csv
from oar_scale.data.sources.image_files import key_of, square, square_of
from oar_scale.data.sources.parquet_table import read_parquet
from oar_scale.data.sources.source import BadImage, Content, SourceImage
from oar_scale.data.sources.table_files import is_parquet, local_file, table_files
from oar_scale.errors import BadName, UserError
from oar_scale.storage import Missing, join, open_storage
from oar_scale.text import NotText, cut


class TableImages:
    """The images, cropped to the central square and resized.

    The columns that are used stay in memory, the images do not: those that lie in the table itself are kept in a temporary file meanwhile.
    """

    def __init__(self, config: TableSource) -> None:
        self.notes = Notes()
        self.attribution = config.attribution
        given = {field: getattr(config, field) for field in ("image", "caption", "label", "name", "family")}
        self._fields = {field: Template(text) for field, text in given.items() if text is not None}
        self._spool = Spool()
        files = table_files(config.path, self.notes)
        self.root = config.root or (files[0].rpartition("/")[0] if "://" in files[0] else os.path.dirname(files[0])) or "."
        self._columns = self._read_files(files)
        if not self._columns.rows or not self._fields["image"].columns:
            raise UserError(f"data.source.path {config.path}: a table without a row, or data.source.image names no column")

    def images(self) -> Iterator[SourceImage]:
        """One image for each row of the table."""
        row = 0
        for file, rows in self._columns.rows_of:
            stem = os.path.splitext(os.path.basename(file))[0]
            for number in range(rows):
                picture = self._picture(row)
                unnamed = f"row {row}" if len(self._columns.rows_of) == 1 and not isinstance(picture, Spooled) else f"{stem}/{number}"
                path = picture if isinstance(picture, str) else ""
                name = self._text("name", row) or os.path.splitext(path)[0] or unnamed
                yield SourceImage(key_of(path or unnamed), name, functools.partial(self._read, row), self._text("family", row))
                row += 1

    def _read_files(self, files: list[str]) -> Columns:
        """The columns of all files, one after the other."""
        wanted = {column for template in self._fields.values() for column in template.columns}
        whole = Columns({name: [] for name in wanted})
        for path in files:
            where = f"data.source.path {path}"
            with local_file(path) as local:
                if is_parquet(local, path):
                    image = self._fields["image"]
                    header, part = read_parquet(local, where, wanted, image.text if image.whole else None, self._spool)
                else:
                    header, cells, bad = read_csv(local, where, wanted, self.notes)
                    part = Columns(cells, [(where, len(next(iter(cells.values()), ())))], bad=dict.fromkeys(bad, TOO_LONG))
            for field, template in self._fields.items():
                missing = next((name for name in template.columns if name not in header), None)
                if missing is not None:
                    names = cut(", ".join(header), lines=1, characters=1000) or "none: there is no first line with their names"
                    raise UserError(f"data.source.{field}: {path} has no column {missing!r}; it has {names}")
            whole.bad.update((whole.rows + row, why) for row, why in part.bad.items())
            for name, column in whole.cells.items():
                column += part.cells[name]
            whole.rows_of.append((path, part.rows_of[0][1]))
            whole.classes.update(part.classes)
        return whole

    def _text(self, field: str, row: int) -> str:
        """A field of a row as text; empty where the recipe does not set it, or the row has no text there."""
        try:
            return self._fields[field].fill(self._columns, row) if field in self._fields else ""
        except NotText:
            return ""

    def _picture(self, row: int) -> str | Spooled:
        """Where the picture of a row lies, empty for none."""
        if row in self._columns.bad:
            return ""
        template = self._fields["image"]
        try:
            cell = self._columns.cells[template.text][row] if template.whole else template.fill(self._columns, row)
            return cell if isinstance(cell, Spooled) else path_of(cell)
        except NotText:
            return ""

    def _read(self, row: int, size: int) -> Content:
        if row in self._columns.bad:
            raise BadImage(self._columns.bad[row])
        picture = self._picture(row)
        if not picture:
            raise BadImage("no path")
        caption = self._caption(row)
        metadata: dict[str, object] = {"captions": list(caption.several)} if caption.several else {}
        metadata |= self._label(row)
        if not caption.text and "label" not in metadata:
            raise BadImage("no caption")
        return Content(self._pixels(picture, size), caption.text, metadata, changed=caption.changed)

    def _caption(self, row: int) -> Caption:
        template = self._fields["caption"]
        cell = self._columns.cells[template.text][row] if template.whole else None
        try:
            given = cell if isinstance(cell, list | str) else template.fill(self._columns, row)
        except NotText as error:
            raise BadImage(f"its caption {error}") from error
        return caption_of(given, str(row))

    def _label(self, row: int) -> dict[str, object]:
        if "label" not in self._fields:
            return {}
        template = self._fields["label"]
        cell = self._columns.cells[template.text][row] if template.whole else template.fill(self._columns, row)
        names = self._columns.classes.get(template.text, [])
        try:
            label = label_of(names.index(cell) if isinstance(cell, str) and cell in names else cell, len(names) or None)
        except ValueError as error:
            raise BadImage(str(error)) from error
        return {"label": label, "class": names[label]} if names else {"label": label}

    def _pixels(self, picture: str | Spooled, size: int) -> Image.Image:
        if isinstance(picture, Spooled):
            return square_of(self._spool.read(picture), size)
        if not self.root.startswith("s3://"):
            return square(os.path.join(self.root, picture), size)
        uri = join(self.root, picture)
        try:
            return square_of(open_storage(uri).read(uri), size)
        except Missing as error:
            raise BadImage(f"cannot be read (there is no {uri})") from error
        except BadName as error:
            raise BadImage(f"cannot be read ({error})") from error
