"""The caption of an image and its ``KEY.json``, from whatever a source has for them: one rule for all of them.

text, bytes              the text (:mod:`oar_scale.text`), without blanks around it
several texts (a list)   one of them, a fixed choice of the key; all are kept in ``KEY.json`` as ``captions``
null, NaN, ""            no caption
a number, a mapping      a bad sample
"""

from __future__ import annotations

from collections.abc import Sequence

from oar_scale.data.hashing import name_hash
from oar_scale.data.sources.source import BadImage
from oar_scale.json_object import JsonObject, NoObject, parse_object
from oar_scale.text import NotText, clean_text, decode_text, is_missing, shown


def caption_of(value: object, key: str) -> tuple[str, list[str]]:
    """The caption of the sample of this key, empty where it has none, and all captions to choose from where there are several.

    Raises:
        BadImage: bytes that are no text, or a value of another type.
    """
    if isinstance(value, list | tuple):
        texts = [text for each in value if (text := _text(each))]
        return choose(texts, key), texts
    return _text(value), []


def choose(texts: Sequence[str], key: str) -> str:
    """One of several captions; empty where there are none."""
    return texts[int(name_hash(key, "caption") * len(texts))] if texts else ""


def caption_lines(data: bytes) -> list[str]:
    """The captions of a text with one a line. Raises BadImage for bytes that are no text."""
    return [line for line in _text(data).split("\n") if not is_missing(line)]


def metadata_of(data: bytes | memoryview | None) -> JsonObject:
    """The object in a ``KEY.json``; empty where there is none. Raises BadImage where it holds something else."""
    try:
        return parse_object(b"{}" if data is None else bytes(data))
    except NoObject as error:
        raise BadImage("its .json holds no object") from error
    except ValueError as error:
        raise BadImage(f"its .json is none ({error})") from error


def _text(value: object) -> str:
    if isinstance(value, bytes | memoryview):
        try:
            value = decode_text(value)
        except NotText as error:
            raise BadImage(f"its caption {error}") from error
    if is_missing(value):
        return ""
    if not isinstance(value, str):
        raise BadImage(f"its caption is no text but {shown(value)}")
    text = clean_text(value).strip()
    return "" if is_missing(text) else text
