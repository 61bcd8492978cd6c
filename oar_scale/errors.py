"""The one error a user is meant to read.

Whatever the user can fix (a recipe, a file, a bucket, a missing package) raises ``UserError`` with a text that names the
thing, the location and the remedy. The command line prints the text without a traceback and exits with code 2; everything
else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can fix; ``str(error)`` names the thing, the location and the remedy."""


class Requeue(Exception):
    """A stop was requested and the state is saved; the same command resumes from it (exit code 75)."""

    def __init__(self, reason: str, unfinished: int = 0) -> None:
        """``unfinished``: shards or parts that were being computed, of which nothing is saved."""
        super().__init__(reason)
        self.reason, self.unfinished = reason, unfinished

    @property
    def state(self) -> str:
        """What of the work is saved, in words."""
        if not self.unfinished:
            return "everything saved"
        were = "1 part was" if self.unfinished == 1 else f"{self.unfinished} parts were"
        return f"all finished parts saved; {were} still being computed and will be computed anew"


class Missing(UserError):
    """There is no object at ``uri``."""

    def __init__(self, uri: str) -> None:
        super().__init__(f"{uri}: there is nothing here. Check the path, or run the stage that writes it first.")
        self.uri = uri

    def __reduce__(self) -> tuple[type[Missing], tuple[str]]:
        return Missing, (self.uri,)  # the default would hand the whole text to __init__ when the error crosses a process


class BadName(UserError):
    """No object can have this name."""


class Unreachable(UserError):
    """The storage does not answer: the same call may succeed later."""


class DamagedJson(UserError):
    """What is at ``uri`` should be JSON, and is not: a disk that was full, or a server that lost power, may leave such files."""

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(f"{uri}: this is not JSON, or not all of it ({why}). Delete it and run the stage that writes it again.")
        self.uri, self.why = uri, why

    def __reduce__(self) -> tuple[type[DamagedJson], tuple[str, str]]:
        return DamagedJson, (self.uri, self.why)


def first_line(text: str) -> str:
    """The first line of a message that may have more, or none."""
    return (text.strip().splitlines() or [""])[0]


def error_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {first_line(str(error))}"
