"""Recorded outputs of the peers' own code (``golden/parity``; RandAR, LlamaGen, ARPG, LPD, float32 on a CPU).

Weights are rebuilt from their names; see ``golden/parity/README.md``.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden" / "parity"


class Case(NamedTuple):
    config: dict[str, Any]
    """The peer's constructor arguments."""
    tensors: dict[str, Tensor]
    """The peer's state dict."""
    arrays: dict[str, Tensor]
    """Inputs and outputs."""
    metadata: dict[str, Any]


def peer_case(name: str) -> Case:
    metadata = json.loads((FOLDER / f"{name}.json").read_text())
    tensors = {tensor: _tensor(tensor, shape, values) for tensor, shape, values in metadata["tensors"]}
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return Case(metadata["config"], tensors, {key: torch.from_numpy(arrays[key]) for key in arrays.files}, metadata)


def _tensor(name: str, shape: list[int], values: Any) -> Tensor:
    if values == "int":
        return torch.zeros(shape, dtype=torch.long)
    scale, offset = values
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(generator.standard_normal(size=shape, dtype=np.float32) * np.float32(scale) + np.float32(offset))
