"""Settings of torch for processes that work on GPUs. They count from a process's start, so they are set before torch is loaded.

    PYTORCH_ALLOC_CONF=expandable_segments:True      blocks of changing sizes do not cut the memory to pieces
    TORCH_FR_BUFFER_SIZE, TORCH_FR_DUMP_ON_TIMEOUT   the flight recorder: the last collectives of each rank, written down when one hangs

Whoever has set a variable, under its present or its former name, has decided.
"""

from __future__ import annotations

from collections.abc import Mapping

SETTINGS = {
    "PYTORCH_ALLOC_CONF": ("expandable_segments:True", ("PYTORCH_CUDA_ALLOC_CONF",)),
    "TORCH_FR_BUFFER_SIZE": ("2000", ("TORCH_NCCL_TRACE_BUFFER_SIZE",)),
    "TORCH_FR_DUMP_ON_TIMEOUT": ("1", ("TORCH_NCCL_DUMP_ON_TIMEOUT",)),
}
"""The value of each variable, and its former names, which torch still reads."""


def gpu_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are still to be set in an environment, with their values."""
    return {name: value for name, (value, former) in SETTINGS.items() if not any(each in environment for each in (name, *former))}
