"""The folders that are compared, and which of their pictures belong together.

    oar sample RUN --prompts P --out A      every PNG says how it was drawn: paired by prompt, seed and number
    any other pictures                      paired by the name of the file without its ending; caption: NAME.txt beside one of them,
                                            else the words of the name (000012-a-red-apple.png: "a red apple")
    NAME.json beside one of them            {"family": "waving hand"}: captions of one family are alike

Names count where any picture of any folder has no record. Only what all folders have is shown.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from oar_scale.data.data_files import files_below, require_folder
from oar_scale.data.images import EXTENSIONS
from oar_scale.data.notes import Notes
from oar_scale.data.shards import identity
from oar_scale.errors import UserError
from oar_scale.generation.picture_files import DrawingRecord, read_record
from oar_scale.json_object import parse_object
from oar_scale.preference.study import Arm
from oar_scale.storage import join, open_storage, read_named
from oar_scale.storage.background import in_order
from oar_scale.text import NotText, decode_text, shown

READERS = 16
_NUMBER = re.compile(r"^\d+(_\d+)?(?=$|[-_. ])")
"""With which ``oar sample`` begins the names of its files."""


@dataclass(frozen=True)
class ArmPicture:
    """One picture of a folder."""

    path: str
    stem: str
    """Its path in the folder, without the ending."""
    record: DrawingRecord | None
    family: str | None = None
    """What it is a variant of, as ``NAME.json`` beside it says (``{"family": ...}``)."""


@dataclass(frozen=True)
class Item:
    """What every arm has a picture of."""

    caption: str | None
    """None for drawings of features, which no text describes."""
    paths: tuple[str, ...]
    """Of the arms' pictures, in the order of the arms."""
    family: str | None = None
    """What the pictures are variants of: an emoji in several skin tones. None where no file beside them says it."""


def read_arms(folders: Sequence[tuple[str, str]]) -> tuple[list[Arm], list[Item]]:
    """The arms and what they share, sorted by what it is paired by.

    Args:
        folders: name and folder of each arm; a folder may be ``s3://``.

    Raises:
        UserError: a folder without pictures, two pictures of one arm that are paired by the same, or arms that share none.
    """
    arms = [(name, folder, _pictures(name, folder)) for name, folder in folders]
    by_record = all(picture.record is not None for *_, pictures in arms for picture in pictures)
    tables = [_by_key(name, pictures, by_record) for name, _, pictures in arms]
    shared = [key for key in tables[0] if all(key in table for table in tables[1:])]
    if not shared:
        raise UserError(_nothing_shared([name for name, *_ in arms], tables, by_record))
    items = [
        Item(
            _caption([folder for _, folder, _ in arms], each),
            tuple(picture.path for picture in each),
            next((picture.family for picture in each if picture.family), None),
        )
        for each in _rows(tables, shared)
    ]
    return [_arm(name, pictures, len(shared)) for name, _, pictures in arms], items


def _pictures(name: str, folder: str) -> list[ArmPicture]:
    require_folder(folder, f"{name}=")
    files = files_below(folder, Notes())
    names = [each for each in files if each.lower().rpartition(".")[2] in EXTENSIONS]
    if not names:
        raise UserError(f"{name}={folder}: no picture in this folder (*.{', *.'.join(EXTENSIONS)})")
    paths = [join(folder, each) for each in names]
    records = in_order(lambda path: read_record(read_named(path), path), paths, READERS)
    stems, beside = [each.rpartition(".")[0] for each in names], set(files)
    described = [join(folder, f"{stem}.json") if f"{stem}.json" in beside else None for stem in stems]
    families = in_order(_family, described, READERS)
    return [ArmPicture(*each) for each in zip(paths, stems, records, families, strict=True)]


def _family(path: str | None) -> str | None:
    """The family that a file beside a picture names, as in shards that ``oar data`` writes; None of a file that is about something else."""
    if path is None:
        return None
    try:
        return identity(parse_object(bytes(read_named(path))))[1] or None
    except ValueError:
        return None


def _by_key(name: str, pictures: list[ArmPicture], by_record: bool) -> dict[Hashable, ArmPicture]:
    table = dict[Hashable, ArmPicture]()
    for picture in pictures:
        record = picture.record
        key: Hashable = (str(record.prompt), record.seed, record.number) if by_record and record else picture.stem
        before = table.setdefault(key, picture)
        if before is not picture:
            same = "are drawings of the same prompt, seed and number" if by_record else "have the same name"
            raise UserError(f"arm {name}: {before.path} and {picture.path} {same}, so that nobody can say which is compared: remove one")
    return dict(sorted(table.items(), key=lambda entry: repr(entry[0]))) if by_record else table


def _rows(tables: list[dict[Hashable, ArmPicture]], shared: list[Hashable]) -> list[list[ArmPicture]]:
    return [[table[key] for table in tables] for key in shared]


def _nothing_shared(names: list[str], tables: list[dict[Hashable, ArmPicture]], by_record: bool) -> str:
    first = "; ".join(f"{name} begins with {_shown_key(next(iter(table)))}" for name, table in zip(names, tables, strict=True))
    if by_record:
        return (
            f"no prompt, seed and number is in all arms ({first}). Draw all of them with the same prompts: "
            "oar sample RUN --prompts FILE --seed N --out FOLDER"
        )
    return f"no name of a picture is in all arms ({first}). Pictures without a record of oar sample are paired by the names of their files."


def _shown_key(key: Hashable) -> str:
    if isinstance(key, tuple):
        prompt, seed, number = key
        return f"{shown(prompt)}, seed {seed}, number {number}"
    return shown(key)


def _caption(folders: list[str], pictures: list[ArmPicture]) -> str | None:
    records = [picture.record for picture in pictures if picture.record is not None]
    for record in records:
        if record.prompt is not None:
            return record.prompt if isinstance(record.prompt, str) else f"class {record.prompt}"
    if records:
        return None
    for folder, picture in zip(folders, pictures, strict=True):
        path = join(folder, f"{picture.stem}.txt")
        if open_storage(path).exists(path):
            try:
                return decode_text(read_named(path)).strip() or None
            except NotText as error:
                raise UserError(f"{path}: {error}") from error
    words = _NUMBER.sub("", pictures[0].stem.rpartition("/")[2])
    return re.sub(r"[-_\s]+", " ", words).strip() or None


def _arm(name: str, pictures: list[ArmPicture], shared: int) -> Arm:
    records = [picture.record for picture in pictures if picture.record is not None]
    models = sorted({f"{record.name} {record.model}" if record.name else record.model for record in records})
    orders = sorted({record.order if isinstance(record.order, str) else "given" for record in records})
    return Arm(name=name, left_out=len(pictures) - shared, models=tuple(models), orders=tuple(orders))
