"""Class labels: what counts as one, wherever it comes from (``KEY.json``, ``KEY.cls``, a table, the number of a folder).

3   3.0   "3"   "003"   "+3"   " 3.0\\n"   b"3"   ->  3        true   "True"  ->  1        -0   "-0"  ->  0
-1   2.5   "three"   "1e3"   [3]            ->  none: the sample is a bad one, with the reason
null   NaN   ""   "nan"   "None"            ->  no label
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from oar_scale.text import NotText, clean_text, decode_text, is_missing, shown

_WHOLE = re.compile(r"(?:\+?[0-9]{1,18}|-0{1,18})(?:\.0*)?")
_TRUTH = {"true": 1, "false": 0}
LARGEST = 2**62
"""Labels are below it, whatever the number of classes."""


def label_of(value: object, classes: int | None = None) -> int:
    """A label as a number.

    Args:
        classes: labels are below it; None: their number is not known.

    Raises:
        ValueError: there is none, or it is no label; the text says so in a few words.
    """
    given = value
    if isinstance(value, bytes | memoryview):
        try:
            value = decode_text(value)
        except NotText as error:
            raise ValueError(f"its label {error}") from error
    if is_missing(value):
        raise ValueError("no label")
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        value = int(value.strip().partition(".")[0])
    elif isinstance(value, str):
        value = _TRUTH.get(value.strip().lower(), value)
    if isinstance(value, float | Decimal) and -LARGEST < value < LARGEST and value == int(value):
        value = int(value)
    if not isinstance(value, int):
        raise ValueError(f"its label {shown(given)} is no whole number")
    if not 0 <= value < (LARGEST if classes is None else classes):
        raise ValueError(f"its label {shown(value)} is {'below 0' if value < 0 else f'none of 0 to {(classes or LARGEST) - 1}'}")
    return int(value)


def stored_label(metadata: Mapping[str, object], cls: bytes | memoryview | None, field: str = "label") -> object:
    """What a sample has as its label: a field of its JSON or, where that is missing, its ``.cls``; None for neither."""
    found = metadata.get(field)
    if not is_missing(found) or cls is None:
        return found
    try:
        return decode_text(cls).strip()
    except NotText:
        return bytes(cls[:16]).decode(errors="replace")  # which is no label


def readable(name: str) -> str:
    """The name of a class as a caption has it: of several ("tench, Tinca tinca") the first, without underscores."""
    return clean_text(name).split(",")[0].replace("_", " ").strip()
