"""Names under which checkpoints hold what they hold of a model and its optimizer."""

from __future__ import annotations

WEIGHTS = "weights"
"""The float32 weights; the moments have the optimizer's own names."""
GROUPS = "parameter_groups"
"""In our part of DeepSpeed's client state, the names of the optimizer's parameters by group: ZeRO-0 does not store them itself."""
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""DeepSpeed's own counters."""
