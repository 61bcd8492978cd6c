"""The state of a job in the scheduler: Slurm's names of states, for both backends."""

from __future__ import annotations

from dataclasses import dataclass

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "NODE_FAIL", "PREEMPTED", "REVOKED"}
"""States that a job does not leave. One that is requeued after a lost node or a preemption is COMPLETING, then PENDING."""


@dataclass(frozen=True)
class JobState:
    """The state of a job; of a job array, of its tasks together."""

    name: str
    """``UNKNOWN``: the scheduler does not know the job (any more)."""
    detail: str = ""
    """Why it waits, on which nodes it runs, or how it ended."""

    @property
    def over(self) -> bool:
        """Whether the job has ended and does not come back."""
        return self.name in ENDED or self.name == "UNKNOWN"
