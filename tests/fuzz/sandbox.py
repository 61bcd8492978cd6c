"""Runs a command of ``oar`` on hostile input, in this process, and says what it must not do.

It must not raise, not use a minute of processor time or gigabytes of memory, not flood the terminal, not start a program, not
talk to another machine, and not open a file for writing, make, move or remove one outside its own folders. Python's audit events
(PEP 578) tell of all that, whatever library does it.
"""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oar_scale.cli import main

CPU_S = 60
"""Of processor time, which does not depend on what else the machine does."""
MEMORY_BYTES = 4 << 30
"""Address space that a command may add."""
TERMINAL_CHARS = 20_000
CHANGING = {
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.link": (1,),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.utime": (0,),
}
"""Audit events that change a file system, and which of their arguments are paths."""
PROGRAMS = {"os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen"}
HARMLESS = {"fc-list"}
"""Programs that libraries start: matplotlib's list of fonts."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Hang(BaseException):
    """The command has used its processor time."""


@dataclass
class Watch:
    """What a command has done that it must not."""

    folder: str
    """Below this it may write."""
    offences: list[str] = field(default_factory=list)

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        """An audit event."""
        if name in PROGRAMS and str(arguments[0]) not in HARMLESS:
            self.offences.append(f"{name} {arguments[:2]!r}")
        elif (
            name == "socket.connect"
            and isinstance(arguments[1], tuple)
            and not str(arguments[1][0]).startswith(("127.", "::1", "localhost"))
        ):
            self.offences.append(f"{name} {arguments[1]!r}")
        elif name == "open":
            path, mode, flags = arguments
            if (isinstance(mode, str) and any(letter in mode for letter in "wax+")) or (mode is None and flags & WRITING):
                self._writes(name, path)
        elif name in CHANGING:
            for index in CHANGING[name]:
                self._writes(name, arguments[index])

    def _writes(self, name: str, path: object) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a file descriptor, which was opened before
        text = os.path.realpath(os.fsdecode(path))
        harmless = text.startswith(("/dev/", "/proc/")) or "__pycache__" in text
        if not harmless and not f"{text}{os.sep}".startswith(self.folder + os.sep):
            self.offences.append(f"{name} {text}")


_watch: Watch | None = None


def _audit(name: str, arguments: tuple[Any, ...]) -> None:
    if _watch is not None:
        _watch.event(name, arguments)


sys.addaudithook(_audit)  # cannot be removed; it does nothing outside a command


@contextmanager
def _limits() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Hang

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _home(folder: Path) -> Iterator[None]:
    """Working folder, home and temporary folder in the sandbox."""
    places = {"HOME": folder / "home", "TMPDIR": folder / "tmp", "XDG_CACHE_HOME": folder / "home" / ".cache"}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    before, here, temporary = {name: os.environ.get(name) for name in places}, os.getcwd(), tempfile.tempdir
    os.environ.update({name: str(place) for name, place in places.items()})
    os.chdir(folder)
    tempfile.tempdir = str(places["TMPDIR"])
    try:
        yield
    finally:
        os.chdir(here)
        tempfile.tempdir = temporary
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def oar(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run ``oar`` with the folder as its only place.

    Returns:
        The exit code, which is 0, 1 or 2, and what it printed.
    """
    global _watch
    _watch, printed = Watch(os.path.realpath(folder)), io.StringIO()
    watch = _watch
    with _home(folder), _limits(), redirect_stdout(printed), redirect_stderr(printed):
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        finally:
            _watch = None
    text = printed.getvalue()
    assert not watch.offences, f"oar {' '.join(arguments)}: {watch.offences[:5]}"
    assert code in (0, 1, 2), f"oar {' '.join(arguments)}: exit code {code}\n{text[-2000:]}"
    assert "Traceback" not in text, text[-4000:]
    assert len(text) <= TERMINAL_CHARS, f"oar {' '.join(arguments)}: {len(text)} characters on the terminal: {text[:500]}"
    assert code != 2 or text.strip(), f"oar {' '.join(arguments)}: exit code 2 without a word"
    return code, text
