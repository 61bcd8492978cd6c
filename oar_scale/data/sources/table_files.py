"""The files of a table: one, those of a folder, or those that match a pattern; here or on S3; CSV, TSV or Parquet by what is in them."""

from __future__ import annotations

import codecs
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from oar_scale.data.data_files import is_data
from oar_scale.data.images import EXTENSIONS
from oar_scale.data.notes import NO_DATA, Notes
from oar_scale.errors import UserError
from oar_scale.storage import Missing, open_storage

ENDINGS = (".parquet", ".pq", ".csv", ".tsv")
_PART = re.compile(r"(?P<split>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})(?:-[0-9a-f]+)?\.parquet$")
_OTHERS = (
    (b"\x1f\x8b", "compressed with gzip; unpack it"),
    (b"PK\x03\x04", "a ZIP or Excel file; unpack it, or save the sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file; save the sheet as CSV"),
    (b"BZh", "compressed with bzip2; unpack it"),
    (b"(\xb5/\xfd", "compressed with zstd; unpack it"),
    (b"ARROW1", "an Arrow (Feather) file; save it as Parquet"),
    (b"SQLite", "a SQLite file; save the table as Parquet"),
    (b"{", "JSON; save it as CSV or Parquet"),
    (b"[{", "JSON; save it as CSV or Parquet"),
)
_FIELD = "data.source.path"


def table_files(path: str, notes: Notes) -> list[str]:
    """The files of a table, in the order of their names.

    Raises:
        UserError: there is none, or they are not all of one table: several splits, or parts that are missing.
    """
    if any(each in path.rpartition("/")[2] for each in "*?[") and not os.path.isdir(path) and not _exists(path):
        folder, _, pattern = path.rpartition("/")
        names = sorted(_matching(folder, pattern, notes))
        if not names:
            raise UserError(f"{_FIELD} {path}: no file matches this pattern")
    elif _exists(path):
        return [path]
    else:
        there = sorted(_matching(path, "*", notes))
        names = [name for name in there if name.lower().endswith(ENDINGS)]
        for name in there:
            if not name.lower().endswith((*ENDINGS, *(f".{each}" for each in EXTENSIONS))):
                notes.add("files of other kinds, left out", name)
        if not names and not os.path.isdir(path):
            raise UserError(f"{_FIELD} {path}: no such file. Is it made or fetched first? The recipe's first lines say how.")
        if not names:
            raise UserError(
                f"{_FIELD} {path}: no table in this folder ({', '.join('*' + each for each in ENDINGS)}). "
                "A folder of images with their captions in text files is type: folder."
            )
        if len({os.path.splitext(name)[1].lower() for name in names}) > 1:
            raise UserError(f"{_FIELD} {path}: tables of several kinds ({', '.join(names[:5])}). Name one, or a pattern: {path}/*.parquet")
    _check_parts(path, [os.path.basename(name) for name in names])
    return names


def _check_parts(path: str, names: list[str]) -> None:
    """Names as Hugging Face gives them say which split a file belongs to, and how many there are."""
    parts = [match for name in names if (match := _PART.fullmatch(name))]
    splits = sorted({part["split"] for part in parts})
    if len(splits) > 1:
        raise UserError(
            f"{_FIELD} {path}: the splits {', '.join(splits)} lie here. Name one of them: {os.path.dirname(path) or path}/{splits[-1]}-*"
        )
    missing = {number for part in parts for number in range(int(part["total"]))} - {int(part["number"]) for part in parts}
    if missing:
        raise UserError(
            f"{_FIELD} {path}: {len(missing)} of {int(parts[0]['total'])} files are missing, e.g. number {min(missing)}. Download them."
        )


def _exists(path: str) -> bool:
    return open_storage(path).exists(path) if path.startswith("s3://") else os.path.isfile(path)


def _matching(folder: str, pattern: str, notes: Notes) -> list[str]:
    """Files of data directly in a folder that match a pattern; those that Spark calls ``_SUCCESS`` and the like are none."""
    if folder.startswith("s3://"):
        base = folder.rstrip("/") + "/"
        names = [name for uri in open_storage(folder).list(folder) if "/" not in (name := uri.removeprefix(base))]
    else:
        base = os.path.join(folder, "")
        names = [name for name in os.listdir(folder or ".") if os.path.isfile(base + name)] if os.path.isdir(folder or ".") else []
    wanted = [name for name in names if fnmatchcase(name.lower(), pattern.lower())]
    for name in wanted:
        if not _is_wanted(name):
            notes.add(NO_DATA, base + name)
    return [base + name for name in wanted if _is_wanted(name)]


def _is_wanted(name: str) -> bool:
    return is_data(name) and not name.startswith("_")


@contextmanager
def local_file(path: str) -> Iterator[str]:
    """A file of the table on the local disk; one on S3 is downloaded into a temporary folder (``TMPDIR``)."""
    if not path.startswith("s3://"):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="oar-table-") as folder:
        copy = os.path.join(folder, os.path.basename(path))
        try:
            open_storage(path).download(path, copy)
        except Missing as error:
            raise UserError(f"{_FIELD} {path}: no such file") from error
        yield copy


def is_parquet(local: str, path: str) -> bool:
    """Whether a file is Parquet, and otherwise text. Raises UserError for what is neither."""
    try:
        with open(local, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{_FIELD} {path}: cannot be read ({os.strerror(error.errno or 0)})") from error
    packed = b"".join(start.removeprefix(codecs.BOM_UTF8).split())  # JSON may begin with blanks and line ends, between [ and { too
    for magic, what in _OTHERS:
        if (packed if magic in (b"{", b"[{") else start).startswith(magic):
            raise UserError(f"{_FIELD} {path}: no CSV, TSV or Parquet file but {what}")
    return start.startswith(b"PAR1") or path.lower().endswith((".parquet", ".pq"))
