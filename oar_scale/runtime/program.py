"""How a program that may have used Ray ends."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


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
