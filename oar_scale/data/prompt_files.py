"""Files of prompts: what is to be drawn, a picture or a few for each.

    .txt             a prompt a line
    .csv, .tsv       a column ``prompt`` or ``caption``; columns ``number`` and ``seed`` where wanted
    .jsonl           an object a line, with the same names

Blank lines are none. A prompt's number names its files and, with the seed, decides about its noise: default 0, 1, 2 ..., in the order of
the file. Any encoding with a byte order mark is read, and UTF-8 without one.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from oar_scale.data.notes import Notes
from oar_scale.data.sources.csv_table import read_csv
from oar_scale.errors import UserError
from oar_scale.json_object import parse_object
from oar_scale.storage import read_named
from oar_scale.text import NotText, clean_text, decode_bytes, shown

if TYPE_CHECKING:
    from oar_scale.tokenizers.prompts import Prompt

LONGEST = 100_000
"""Characters of a prompt."""
MAX_NUMBER = (1 << 31) - 1
FIELDS = ("prompt", "caption", "number", "seed")


class GivenPrompt(NamedTuple):
    """A prompt that pictures are wanted for."""

    prompt: Prompt
    number: int
    seed: int
    where: str
    """File and line, for errors."""


def read_prompts(path: str, seed: int = 0) -> list[GivenPrompt]:
    """The prompts of a file, here or on S3.

    Args:
        seed: of those for which the file says none.

    Raises:
        UserError: no such file, another kind of file, one without a prompt, or a line that is wrong; names file and line.
    """
    rows = _READERS.get(path.rpartition(".")[2].lower())
    if rows is None:
        raise UserError(f"{path}: prompts are read from {', '.join(f'.{ending}' for ending in _READERS)}, and this is none of them")
    prompts = [_prompt(row, place, where, seed) for place, (where, row) in enumerate(rows(path, read_named(path)))]
    if not prompts:
        raise UserError(f"{path}: there is no prompt in it")
    first = dict[int, str]()
    for each in prompts:
        if (before := first.setdefault(each.number, each.where)) != each.where:
            raise UserError(
                f"{each.where}: the number {each.number} is that of {before}, too. Each prompt needs its own, or none says one."
            )
    return prompts


Row = Mapping[str, object]


def _prompt(row: Row, place: int, where: str, seed: int) -> GivenPrompt:
    given = next((row[name] for name in FIELDS[:2] if row.get(name) not in (None, "")), None)
    if isinstance(given, bytes):
        raise UserError(f"{where}: its prompt is not UTF-8; save the file as UTF-8")
    if isinstance(given, bool) or not isinstance(given, str | int) or not str(given).strip():
        raise UserError(f"{where}: no prompt, or one that is no text ({shown(given)})")
    prompt = clean_text(str(given)).strip()
    if len(prompt) > LONGEST:
        raise UserError(f"{where}: its prompt has {len(prompt)} characters, more than {LONGEST}")
    number = _whole(row.get("number"), "number", where, 0, MAX_NUMBER)
    own_seed = _whole(row.get("seed"), "seed", where, -(2**63), 2**63 - 1)
    return GivenPrompt(prompt, place if number is None else number, seed if own_seed is None else own_seed, where)


def _whole(value: object, name: str, where: str, least: int, most: int) -> int | None:
    """A whole number in these bounds; None where the row has none."""
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    if isinstance(value, bool | float) or not re.fullmatch("-?[0-9]{1,19}", text) or not least <= int(text) <= most:
        raise UserError(f"{where}: its {name} {shown(value)} is no whole number from {least} to {most}")
    return int(text)


def _lines(path: str, data: bytes) -> Iterator[tuple[str, str]]:
    """Each line that is not blank, and where it is."""
    try:
        text = decode_bytes(data)
    except NotText as error:
        cause = error.__cause__
        at = data.count(b"\n", 0, cause.start) + 1 if isinstance(cause, UnicodeDecodeError) else 1
        raise UserError(f"{path}:{at}: {error}") from error
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _text_rows(path: str, data: bytes) -> Iterator[tuple[str, Row]]:
    return ((where, {"prompt": line}) for where, line in _lines(path, data))


def _json_rows(path: str, data: bytes) -> Iterator[tuple[str, Row]]:
    for where, line in _lines(path, data):
        try:
            row = parse_object(line)
        except ValueError as error:
            raise UserError(f'{where}: not a JSON object like {{"prompt": "a red apple"}} ({error})') from error
        _require_prompt(row, where)
        yield where, row


def _table_rows(path: str, data: bytes) -> Iterator[tuple[str, Row]]:
    notes = Notes()
    with tempfile.NamedTemporaryFile(suffix=path[path.rindex(".") :]) as copy:
        copy.write(data)
        copy.flush()
        header, cells, bad = read_csv(copy.name, path, set(FIELDS), notes)
    _require_prompt(header, path)
    for index, row in enumerate(zip(*cells.values(), strict=True)):
        where = f"{path} row {index + 2}"
        if index in bad:
            raise UserError(f"{where}: has more cells than the header: put quotation marks around a cell with a separator in it")
        yield where, dict(zip(cells, row, strict=True))


def _require_prompt(names: Iterable[str], where: str) -> None:
    if not {"prompt", "caption"} & {*(names := list(names))}:
        raise UserError(f"{where}: has neither prompt nor caption, but {shown(', '.join(names) or 'nothing')}")


_READERS = {"txt": _text_rows, "csv": _table_rows, "tsv": _table_rows, "jsonl": _json_rows}
