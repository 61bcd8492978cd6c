"""Names that others chose: in manifests, indexes, ledgers, events, listings of a bucket. They become a part of a path only through here.

file_name("00000.tar")            one part of a path
relative_path("part-0/00000.tar") several, below the folder that they are relative to
file_name("../etc/passwd")        ValueError, as for absolute paths, "..", control characters and what no file system takes
"""

from __future__ import annotations

import os
import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
LONGEST = 255
"""Bytes of a file's name that all file systems take."""


def file_name(name: object, pattern: str | None = None) -> str:
    """``name`` itself, if it can only be a file in the folder where it is looked for.

    Args:
        pattern: regular expression that the whole name must match.

    Raises:
        ValueError: it is anything else.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or _CONTROL.search(name):
        raise ValueError(f"{name!r} is not the name of a file")
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} is not the name of a file") from None
    if size > LONGEST or (pattern is not None and not re.fullmatch(pattern, name)):
        raise ValueError(f"{name[:100]!r} is not a name that is expected here")
    return name


def relative_path(name: object) -> str:
    """``name`` itself, if it leads to a file below the folder that it is relative to. Raises ValueError for anything else."""
    for part in str(name).split("/"):
        try:
            file_name(part)
        except ValueError:
            raise ValueError(f"{str(name)[:200]!r} does not lead to a file below this folder") from None
    return str(name)
