"""Sharded checkpoints that are either complete or not visible at all.

    saver = Saver(job)                        on every rank
    saver.save(engine, step, state)           to the local disk; a thread uploads and commits while training continues
    saver.outcomes()                          which saves were committed, and which failed
    restored = restore(engine, job)           the newest intact one, whatever number of ranks and ZeRO stage wrote it

The files are DeepSpeed's own; manifest, checksums, commit marker and conversion are ours (``layout.py``). Readers ignore what is not
committed, verify checksums before they open a file, and fall back to the checkpoint before a damaged one, which they report.
"""

from __future__ import annotations

from oar_scale.distributed.checkpoints.layout import committed_steps
from oar_scale.distributed.checkpoints.restore import Rejected, Restored, restore
from oar_scale.distributed.checkpoints.saver import SaveOutcome, Saver

__all__ = ["Rejected", "Restored", "SaveOutcome", "Saver", "committed_steps", "restore"]
