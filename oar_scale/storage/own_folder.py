"""Whether a folder of this machine is ours: where everyone may write (``/tmp``), somebody else may have made it beforehand.

A cache or scratch folder has a name that others can guess, such as ``/tmp/cache``. Whoever made it, or a link in its place, could read
what we write there, replace it, or let us overwrite files elsewhere.
"""

from __future__ import annotations

import os
import stat


def no_follow(path: str, flags: int) -> int:
    """An opener for ``open``: a symlink in place of the file is an error, so that nothing is written to what it points to."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def foreign_part(path: str) -> str | None:
    """The part of a path that another user has made in a folder where everyone may write; None where there is none.

    What belongs to root counts as ours: mount points, and the volumes of containers, to which everyone may write. So does a folder on the
    way that a member of one of our groups has made and only its owner and that group may write to: ``/scratch/team``.
    """
    asked = path = os.path.abspath(path)
    while (parent := os.path.dirname(path)) != path:
        try:
            made = os.lstat(path)
            if made.st_uid not in (os.geteuid(), 0) and os.stat(parent).st_mode & stat.S_IWOTH and (path == asked or not _of_team(made)):
                return path
        except OSError:  # not there yet
            pass
        path = parent
    return None


def _of_team(made: os.stat_result) -> bool:
    groups = {os.getegid(), *os.getgroups()}
    return stat.S_ISDIR(made.st_mode) and not made.st_mode & stat.S_IWOTH and made.st_gid in groups
