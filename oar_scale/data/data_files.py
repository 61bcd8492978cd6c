"""Which files are data: one rule for folders, class folders, prefixes of a bucket, and the members of a tar.

What other programs leave beside people's files is no data, whatever it is called:

    hidden           ._cat.jpg and .DS_Store (macOS), .git/, .cache/, .ipynb_checkpoints/, .nfs0001
    by its name      Thumbs.db, desktop.ini, ~$list.xlsx, and all in __MACOSX/, $RECYCLE.BIN/, lost+found/,
                     System Volume Information/ and, of network drives, @eaDir/, #recycle/, @Recycle/, #snapshot/, ~snapshot/
    by its ending    files only: cat.jpg~, #cat.txt# (editors), 00000.tar.part, .partial, .crdownload, .download, .tmp, .swp, .aria2

Upper and lower case do not matter, and paths are judged from the folder on that the user named: a data set below ``~/.cache`` is one.
Links are followed, to folders as to files. A folder or file counts once, under its own path where that lies inside, so that a link to a
folder above it is no loop, and no picture is on both sides of the split. Whatever is passed over is noted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from oar_scale.data.notes import NO_DATA, Notes
from oar_scale.errors import UserError
from oar_scale.storage import open_storage
from oar_scale.storage.schemes import LOCAL, scheme_of

BROKEN_LINKS = "links that lead nowhere, left out"
READ_BEFORE = "linked folders that were read under another path, left out"
SECOND_LINKS = "linked files that were read under another path, left out"
UNREADABLE = "folders that may not be read, left out"

_NO_DATA = re.compile(
    r"(^|/)(\.(?!\.?(/|$))|~\$|\#[^/]*\#$|(thumbs|ehthumbs(_vista)?)\.db$|desktop\.ini$|"
    r"(__macosx|\$recycle\.bin|\#recycle|@recycle|\#snapshot|~snapshot|@eadir|lost\+found|system volume information)(/|$))"
    r"|~$|\.(part|partial|filepart|crdownload|opdownload|download|incomplete|gstmp|tmp|temp|swp|swo|aria2)$",
    re.IGNORECASE,
)
_HINTS = ("\0.", "/.", "~", "#", "humbs", "desktop.ini", "__macosx", "$recycle", "@eadir", "@recycle", "lost+found", "system volume")
_ENDINGS = (".part", ".filepart", "download", ".incomplete", ".gstmp", ".tmp", ".temp", ".sw", ".aria2")

_OTHER_ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4", ".zip", ".7z", ".rar")

FileId = tuple[int, int]
"""Device and inode: the same for a file or folder under all its paths."""


def is_data(path: str) -> bool:
    """Whether a path, relative to the folder that the user named, is a file of data by its name."""
    return _NO_DATA.search(path) is None


def which_are_data(names: Sequence[str]) -> list[bool] | None:
    """For each of many names whether :func:`is_data`; None where all are, which a few searches through all of them at once show."""
    together = ("\0" + "\0".join(names)).lower()
    if not any(hint in together for hint in (*_HINTS, *_ENDINGS)):
        return None
    return [is_data(name) for name in names]


def files_below(folder: str, notes: Notes) -> list[str]:
    """All files of data in and below a folder or a prefix of a bucket, relative to it, with ``/``, sorted."""
    if scheme_of(folder) == LOCAL:
        return sorted(walk(folder, notes)) if os.path.isdir(folder) else []
    base, found = folder.rstrip("/") + "/", []
    for uri in open_storage(folder).list(folder):
        name = uri.removeprefix(base)
        if is_data(name):
            found.append(name)
        else:
            notes.add(NO_DATA, name)
    return found


def require_folder(path: str, what: str = "") -> None:
    """Check that a folder that is about to be listed is there; prefixes of a bucket are never.

    Args:
        what: begins the error: where the user named it.

    Raises:
        UserError: there is nothing at a local path, or a file.
    """
    if scheme_of(path) != LOCAL or os.path.isdir(path):
        return
    why = "is a file, and a folder is wanted" if os.path.exists(path) else "no such folder. Check the path"
    raise UserError(f"{what}{path}: {why}.")


def shards_among(names: Sequence[str], notes: Notes, pattern: str = "*.tar") -> list[str]:
    """The names that match a pattern, in upper as in lower case; archives of other kinds, which somebody may take for shards, are noted."""
    shards = []
    for name in names:
        if fnmatchcase(name.lower(), pattern.lower()):
            shards.append(name)
        elif name.lower().endswith(_OTHER_ARCHIVES):
            notes.add("archives that are no plain .tar, left out", name)
    return shards


def walk(folder: str, notes: Notes, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[str]:
    """The files of data in and below a local folder, relative to it, with ``/``; follows links (see the module).

    Args:
        wanted: which files are read by their name, so that a second link to one is left out; others may have any number of links.
    """
    seen, waiting, linked, linked_files = set[FileId](), [""], list[str](), list[str]()
    while waiting or linked:
        at = waiting.pop() if waiting else linked.pop(0)  # a folder's own path before a link to it
        path = os.path.join(folder, at)
        try:
            if _identity(path) in seen:
                notes.add(READ_BEFORE, f"{at or folder}/")
                continue
            seen.add(_identity(path))
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            notes.add(UNREADABLE, f"{at or folder}/")
            continue
        for entry in entries:
            name = f"{at}/{entry.name}" if at else entry.name
            broken = entry.is_symlink() and not os.path.exists(entry.path)
            folder_here = not broken and entry.is_dir()
            if not is_data(f"{entry.name}/" if folder_here else entry.name):
                notes.add(NO_DATA, f"{name}/" if folder_here else name)
            elif broken:
                notes.add(BROKEN_LINKS, name)
            elif folder_here:
                (linked if entry.is_symlink() else waiting).append(name)
            elif entry.is_file() and entry.is_symlink():
                linked_files.append(name)
            elif entry.is_file():
                yield name
    for name in linked_files:
        if wanted(name) and _is_read(os.path.realpath(os.path.join(folder, name)), seen, wanted):
            notes.add(SECOND_LINKS, name)
        else:
            yield name


def _is_read(target: str, seen: set[FileId], wanted: Callable[[str], bool]) -> bool:
    """Whether the target of a link is read under its own path, or was under another link; if not, it is by now."""
    parent, name = os.path.split(target)
    if _identity(parent) in seen and is_data(name) and wanted(name):
        return True
    before, this = len(seen), _identity(target)
    seen.add(this)
    return len(seen) == before


def _identity(path: str) -> FileId:
    status = os.stat(path)
    return status.st_dev, status.st_ino
