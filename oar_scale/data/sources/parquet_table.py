"""Parquet files as a table: columns of text, whatever type they have, and columns of pictures.

    text         string, large string, dictionary; binary (as Spark and Hive write text); numbers, dates; lists of texts (several captions)
    pictures     binary, or a struct of ``bytes`` and ``path`` (the layout of Hugging Face ``datasets``)
    class names  of ``ClassLabel`` columns, from the metadata that ``datasets`` writes

A file is read some rows at a time, with the columns that are used only: memory does not grow with its row groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from oar_scale.data.sources.columns import Cell, Columns, Spool, check_header
from oar_scale.errors import UserError
from oar_scale.text import NotText, decode_text, shown

TEXT_ROWS, PICTURE_ROWS = 4096, 16
"""Rows in memory at a time, beside the columns of text that are kept."""


def read_parquet(path: str, where: str, wanted: set[str], picture: str | None, spool: Spool) -> tuple[list[str], Columns]:
    """The names of all columns, and the wanted ones.

    Args:
        where: names the file in errors.
        picture: the column that holds pictures or paths of them; None where none is a column of its own.

    Raises:
        UserError: no Parquet file that can be read, or a column of a type that is neither text nor a picture.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            schema = file.schema_arrow
            check_header(schema.names, wanted, where)
            kinds = {
                name: _kind(schema.field(name).type, name == picture, f"{where}: column {name!r}")
                for name in schema.names
                if name in wanted
            }
            cells: dict[str, list[Cell]] = {name: [] for name in kinds}
            size = TEXT_ROWS if picture is None or kinds.get(picture) in (None, "text") else PICTURE_ROWS
            for batch in file.iter_batches(size, columns=list(kinds)):
                for name, kind in kinds.items():
                    cells[name] += _cells(batch.column(name), kind, spool)
            return list(schema.names), Columns(cells, [(where, file.metadata.num_rows)], _class_names(schema.metadata))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where}: not a Parquet file that can be read ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: holds text in a struct or a list that is not UTF-8 ({error.reason}). Write it again.") from error


def _kind(kind: Any, is_picture: bool, column: str) -> str:
    """How the cells of a column are read: ``text``, ``binary``, ``struct`` or ``list``."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    binary = (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind)
    )
    if is_picture and binary:
        return "binary"
    if is_picture and pa.types.is_struct(kind):
        if {"bytes", "path"} & {kind.field(at).name for at in range(kind.num_fields)}:
            return "struct"
        raise UserError(f"{column} holds {shown(str(kind))}: a picture is a path, bytes, or a struct of bytes and path")
    of_lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if of_lists and not is_picture and not pa.types.is_nested(kind.value_type):
        return "list"
    if pa.types.is_nested(kind) or pa.types.is_union(kind):
        raise UserError(f"{column} holds {shown(str(kind))}, which is {'no picture' if is_picture else 'no text'}. Name another column.")
    return "text"


def _cells(column: Any, kind: str, spool: Spool) -> Iterator[Cell]:
    """The cells of some rows."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_temporal(column.type):
        column = column.cast(pa.string())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_binary())  # a file may call text what is not UTF-8
    if kind == "struct":
        for value in column:
            cell: dict[str, Any] = value.as_py() or {}
            yield spool.add(cell["bytes"]) if cell.get("bytes") else _text(cell.get("path"))
        return
    for value in column:
        data = value.as_py()
        yield spool.add(data) if kind == "binary" and isinstance(data, bytes) and data and not _is_path(data) else _text(data)


def _text(cell: Any) -> Cell:
    """Bytes as text, where they are."""
    if not isinstance(cell, bytes):
        known = isinstance(cell, str | int | float | list) or cell is None
        return cell if known else str(cell)
    try:
        return cell.decode()
    except UnicodeDecodeError:
        return cell


def _is_path(data: bytes) -> bool:
    """Whether bytes are the path of a picture, and not a picture."""
    try:
        return len(data) < 4096 and decode_text(data).isprintable() and b"\0" not in data
    except NotText:
        return False


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Names of classes by column, as Hugging Face ``datasets`` notes them; empty where it has not written the file."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: [str(each) for each in kind["names"]] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
