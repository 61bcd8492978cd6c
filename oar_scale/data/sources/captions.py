"""The caption of an image and its ``KEY.json``, from whatever a source has for them: one rule for all of them.

text, bytes              the text (:mod:`oar_scale.text`), without blanks around it
several texts (a list)   one of them, a fixed choice of the key; all are kept in ``KEY.json`` as ``captions``
null, NaN, ""            no caption
a number, a mapping      a bad sample
"""

from __future__ import annotations

from typing import NamedTuple

from oar_scale.data.hashing import name_hash
from oar_scale.data.sources.source import BadImage
from oar_scale.json_object import JsonObject, NoObject, parse_object
from oar_scale.text import NotText, clean_text, decode_bytes, is_missing, is_odd, shown

CLEANED = "captions with control characters or half a surrogate pair: blanks, or ? in their place"


class Caption(NamedTuple):
    """A caption, and what is to be said of it."""

    text: str
    """Empty where there is none."""
    several: tuple[str, ...] = ()
    """All captions to choose from, where there are several."""
    changed: tuple[str, ...] = ()
    """As of :class:`oar_scale.data.sources.source.Content`."""


def caption_of(value: object, key: str) -> Caption:
    """The caption of the sample of this key. Raises BadImage for bytes that are no text, and values of another type."""
    raw = [_raw(each) for each in (value if isinstance(value, list | tuple) else [value])]
    changed = (CLEANED,) if any(is_odd(each) for each in raw) else ()
    texts = [text for each in raw if not is_missing(text := clean_text(each).strip())]
    if isinstance(value, list | tuple):
        return Caption(texts[int(name_hash(key, "caption") * len(texts))] if texts else "", tuple(texts), changed)
    return Caption(texts[0] if texts else "", changed=changed)


def caption_lines(data: bytes) -> list[str]:
    """The captions of a text with one a line. Raises BadImage for bytes that are no text."""
    return _raw(data).replace("\r\n", "\n").replace("\r", "\n").split("\n")


def metadata_of(data: bytes | memoryview | None) -> JsonObject:
    """The object in a ``KEY.json``; empty where there is none. Raises BadImage where it holds something else."""
    try:
        return parse_object(b"{}" if data is None else bytes(data))
    except NoObject as error:
        raise BadImage("its .json holds no object") from error
    except ValueError as error:
        raise BadImage(f"its .json is none ({error})") from error


def _raw(value: object) -> str:
    """The text of a value, not cleaned; empty for a missing one."""
    if isinstance(value, bytes | memoryview):
        try:
            return decode_bytes(value)
        except NotText as error:
            raise BadImage(f"its caption {error}") from error
    if is_missing(value):
        return ""
    if not isinstance(value, str):
        raise BadImage(f"its caption is no text but {shown(value)}")
    return value
