"""The one place that reads what ``torch.save`` wrote: such a file is a pickle, and a pickle can be a program.

    read_pickle(path, "s3://bucket/vq.pt")                              tensors and plain values, nothing else
    read_pickle(path, name, classes=[LossScaler], map_location="meta")  also these classes; tensors without their bytes

torch's restricted unpickler interprets the file; one that asks for anything that is not allowed is refused before it gets it. Nothing else
in the package may unpickle: ``tests/test_untrusted.py`` looks for it.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from typing import IO

import torch

from oar_scale.errors import UserError


def read_pickle(
    file: str | IO[bytes],
    shown: str,
    *,
    classes: Sequence[type] = (),
    map_location: str | torch.device | None = "cpu",
    mmap: bool = False,
) -> object:
    """What ``torch.save`` wrote, without running code from it.

    Args:
        file: a path, or an open file.
        shown: its name, for errors.
        classes: that it may hold beside tensors and plain values. They must be harmless whatever they are made with.
        map_location: as of ``torch.load``; ``"meta"`` leaves out the bytes of the tensors.
        mmap: leave the tensors of a local file on the disk until they are used.

    Raises:
        UserError: it asks for anything else, is damaged, or is another kind of file.
    """
    try:
        with torch.serialization.safe_globals(list(classes)):
            mapped = mmap and isinstance(file, str) and zipfile.is_zipfile(file)
            content: object = torch.serialization.load(file, map_location=map_location, weights_only=True, mmap=mapped)
            return content
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a file that somebody made for it may fail in any way
        raise UserError(f"{shown}: {_fault(error)}") from error


def _fault(error: Exception) -> str:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return (
            f"asks for {refused[1]}, and reading that would run code from the file. "
            "Where you trust its author, load it there and save its state_dict() as safetensors."
        )
    # torch opens with the advice to switch the protection off, which must not be done.
    advice = ("Weights only load failed", "Please file an issue")
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(advice)]
    first = lines[0] if lines else type(error).__name__
    return (
        "not a checkpoint that can be read without running code from it: damaged, cut off, or another kind of file "
        f"({first[:200]}). Copy it again."
    )
