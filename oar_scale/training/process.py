"""What the training loop needs of the process it runs in, and where its events go.

    process.heartbeat("step 12")        every few seconds; names what comes next
    process.stop_reason                 why this process was asked to stop, or None
    process.all_reduce(numbers)         the few numbers that the ranks agree on at each step

:class:`SingleProcess` is all that one process needs. Under Ray Train or torchrun, ``distributed/worker_process.py`` is a process group
with a watchdog and handlers of stop signals.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class EventSink(Protocol):
    """Takes the events of a training: a JSON line in a file (``observe/events.py``), a line on the screen, nothing at all."""

    def emit(self, kind: str, **fields: object) -> None:
        """Record one event, e.g. ``emit("train", step=5, loss=6.1)``."""


class TrainingProcess(Protocol):
    """One of ``world`` processes that train together."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def world(self) -> int:
        """The number of processes."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""

    @property
    def stop_reason(self) -> str | None:
        """Why this process is to save and stop; None while no stop is requested."""

    def heartbeat(self, doing: str) -> None:
        """Report progress; ``doing`` is what comes next."""

    def all_reduce(self, numbers: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Replace ``numbers`` by their sum or maximum over all ranks, and return them. Collective."""

    def gather(self, value: T) -> list[T]:
        """Return the value of each rank, in the order of ranks, on every rank. Collective."""


class SingleProcess:
    """A training process that is alone: nothing to agree on, nobody to report to."""

    rank, world = 0, 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Compute on ``device``."""
        self.device = torch.device(device)
        self.stop_reason: str | None = None

    def heartbeat(self, doing: str) -> None:
        """Do nothing: a single process has no watchdog."""

    def all_reduce(self, numbers: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Return ``numbers`` as they are."""
        return numbers

    def gather(self, value: T) -> list[T]:
        """Return the only value."""
        return [value]
