"""Which process is meant: a process id alone may belong to another process by now, or be one of another machine."""

from __future__ import annotations

import os
from pathlib import Path


def process_start(pid: int) -> int:
    """When a running process was started, in clock ticks since the machine was; 0 if there is no such process, or a zombie.

    Not by the clock, which somebody may set: a process that lives would seem to be another one.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()  # a name may have spaces
    except OSError:
        return 0
    return 0 if state == "Z" else int(rest[18])


def machine_id() -> str:
    """Names the process ids that mean the same as here: this boot, this namespace of processes. Empty where that is unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
