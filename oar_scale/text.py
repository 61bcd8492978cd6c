"""The one reader of text that people wrote: captions, ``KEY.json``, tables, lists of class names.

    bytes --decode_text--> text      a byte order mark says UTF-8, UTF-16 or UTF-32 and is removed; without one it is UTF-8
    text  --clean_text---> text      line ends are ``\\n``, other control characters blanks, half a surrogate pair is ``?``

Bytes of another encoding raise :class:`NotText`: nobody can tell which one they are in, and a guess would train on wrong letters. Who
reads samples counts those as bad ones.
"""

from __future__ import annotations

import codecs
import math
import os
import re

from oar_scale.errors import UserError

_MARKS = (  # those of UTF-32 first: one of them begins with one of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UNCLEAN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")
_ODD = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")
_ESCAPES = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")
_UNCLEAN_ASCII = re.compile(rb"[\0-\x08\x0b-\x1f\x7f]")
_NOT_WRITTEN = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f]")
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), " ") | {0xFEFF: None}
MISSING = frozenset({"", "nan", "NaN", "NAN", "None", "NaT", "<NA>", "null", "NULL", "#N/A"})
"""Text that stands for a value that is not there: what programs write for one."""
SHOWN = 60
"""Characters of a value that a message shows."""


class NotText(ValueError):
    """Bytes that are no text; ``str(error)`` says why and continues "its caption"."""


def encoding_of(start: bytes) -> str:
    """The encoding that a file's first four bytes tell."""
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")


def decode_text(data: bytes | memoryview) -> str:
    """The text in these bytes, cleaned. Raises NotText."""
    raw = bytes(data)
    if raw.isascii() and not _UNCLEAN_ASCII.search(raw):  # most captions: there is nothing to look for
        return raw.decode("ascii")
    return clean_text(decode_bytes(raw))


def decode_bytes(data: bytes | memoryview) -> str:
    """The text in these bytes as it is there, but for a byte order mark. Raises NotText."""
    raw = bytes(data)
    encoding = encoding_of(raw[:4])
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise NotText(f"is not {name} (byte {error.start} is 0x{raw[error.start]:02x}); save it as UTF-8") from error
    if text.count("\0") * 3 > len(text) or len(_NOT_WRITTEN.findall(text)) * 8 > len(text):
        raise NotText("is UTF-16 or UTF-32 without a byte order mark, or no text at all; save it as UTF-8")
    return text


def clean_text(text: str) -> str:
    """Text without what is no text in it; a pair of surrogates becomes the character that it stands for."""
    if not _UNCLEAN.search(text):
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROLS)
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return joined.encode("utf-8", "replace").decode()


def is_odd(text: str) -> bool:
    """Whether cleaning takes away or replaces something that is neither a line end nor a byte order mark."""
    return _ODD.search(text) is not None


def is_missing(value: object) -> bool:
    """Whether a value stands for one that is not there: null, not a number, or text that is empty or among :data:`MISSING`."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip() in MISSING)


def read_text(path: str, where: str) -> str:
    """The text of a local file.

    Args:
        where: names the file in errors, as in ``data.source.names FILE``.

    Raises:
        UserError: there is no such file, or it is no text.
    """
    try:
        with open(path, "rb") as file:
            return decode_text(file.read())
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such file") from error
    except NotText as error:
        raise UserError(f"{where}: {error}") from error
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({os.strerror(error.errno or 0)})") from error


def shown(value: object) -> str:
    """A value as a message shows it: cut, whatever it is and however long it is."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value)} bytes that begin with {bytes(value[:8])!r}"
    if isinstance(value, str):
        return repr(value if len(value) <= SHOWN else value[: SHOWN - 3] + "...")
    if isinstance(value, list | tuple | dict):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def cut(text: str, lines: int = 100, characters: int = 2000) -> str:
    """A message of a length that a person can read: what is too long is cut, and says so."""
    kept = [line if len(line) <= characters else f"{line[:characters]}... ({len(line)} characters)" for line in text.splitlines()]
    return "\n".join(kept[:lines] + ([f"... and {len(kept) - lines} more lines"] if len(kept) > lines else []))


def say(text: str) -> None:
    """Print what may hold the text of strangers (names in a bucket, members of a tar, messages of other hosts), :func:`printable`."""
    print(printable(text), flush=True)


def printable(text: str) -> str:
    """Text for the screen: control characters, which steer a terminal, are shown as ``\\x1b``; line ends and tabs stay."""
    return _ESCAPES.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
