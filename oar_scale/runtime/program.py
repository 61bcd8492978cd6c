"""How a program ends: with a line about what its user can fix, and safely where it may have used Ray."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from oar_scale.errors import UserError
from oar_scale.redaction import redact
from oar_scale.text import cut, printable

USERS_FAULT = 2
"""Exit code of a program that failed at something its user can fix, as of one whose arguments are wrong."""


def program(main: Callable[[], int | None]) -> NoReturn:
    """Run a script and exit with the code that ``main`` returns. What its user can fix ends it as it ends ``oar``."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(say_user_error(error))


def say_user_error(error: UserError) -> int:
    """Write the error for people to stderr, without secrets and control characters. Returns the exit code."""
    print(f"error: {cut(printable(redact(str(error))))}", file=sys.stderr)
    return USERS_FAULT


@contextmanager
def program_exit() -> Iterator[None]:
    """End a program safely: ``with program_exit(): sys.exit(main())`` skips the end of Ray's C++ library where Ray was imported.

    Threads of Ray's client that collect metrics keep running after ``ray.shutdown``. At the end of a process the C++ library destroys
    static objects that they may be using. That is the likely cause of a run that had finished well and ended with SIGSEGV, in a
    function that hashes strings; a scheduler would have begun it again. The exit code stays that of the program.
    """
    code = 1

    def leave() -> None:
        if "ray" in sys.modules:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # nobody reads, or it was closed
                    stream.flush()
            os._exit(code)

    atexit.register(leave)  # the first to be registered is the last to run: after the handlers of W&B and others
    try:
        yield
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
        raise
