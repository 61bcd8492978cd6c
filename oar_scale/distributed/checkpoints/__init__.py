"""Sharded checkpoints that are either whole or not there.

    saver = Saver(job)                        on every rank
    saver.save(engine, step, state)           to the local disk; a thread uploads and commits while training goes on
    saver.outcomes()                          what has become of it
    restored = restore(engine, job)           the newest whole one, whatever number of ranks and ZeRO stage wrote it

The files are DeepSpeed's own; manifest, checksums, commitment and conversion are ours (``layout.py``). Readers look at nothing that is
not committed, verify what is before they open it, and fall back to the one before, saying so.
"""

from __future__ import annotations

from oar_scale.distributed.checkpoints.layout import committed_steps
from oar_scale.distributed.checkpoints.restore import Rejected, Restored, restore
from oar_scale.distributed.checkpoints.saver import SaveOutcome, Saver

__all__ = ["Rejected", "Restored", "SaveOutcome", "Saver", "committed_steps", "restore"]
