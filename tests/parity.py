"""Recorded outputs of the peers' own code (``golden/parity``; RandAR, LlamaGen, ARPG, LPD, float32 on a CPU).

Weights are rebuilt from their names; see ``golden/parity/README.md``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from oar_scale.model import AnyOrderModel, Decoder
from oar_scale.orders.scores import score_rows

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


def assert_gradient_norms(
    model: AnyOrderModel, another: AnyOrderModel, export: Callable[[AnyOrderModel], dict[str, Tensor]], norms: dict[str, float]
) -> None:
    """The norms of the model's gradients are the recorded ones of the peer's tensors. ``another`` is the same model, to be overwritten."""
    for parameter, mine in zip(another.parameters(), model.parameters(), strict=True):
        assert mine.grad is not None
        parameter.data = mine.grad
    theirs = export(another)  # the gradient of each of their tensors is where the tensor itself is
    assert theirs.keys() == norms.keys()
    for name, norm in norms.items():
        assert float(theirs[name].norm()) == pytest.approx(norm, rel=1e-5), name


def assert_score_tables(model: AnyOrderModel, arrays: dict[str, Tensor], condition_BTD: Tensor, score: Any) -> None:
    """At every step of a recorded order, all cells that are still empty score as recorded."""
    order, codes = arrays[f"exact_order_{score}"], arrays["idx"]
    decoder, rows = Decoder(model), torch.arange(len(codes))
    prefix = decoder.begin(condition_BTD)
    for step in range(model.spec.cells):
        empty = order[:, step:].sort(1).values
        candidates = decoder.candidate_rows(prefix, empty)
        found = score_rows(model.output.weight, candidates.rows_BRD.flatten(0, 1), score, codes.gather(1, empty).flatten())
        expected = arrays[f"exact_table_{score}"][:, step].gather(1, empty)
        torch.testing.assert_close(found.view_as(empty), expected, rtol=0, atol=5e-5)
        winner = (empty == order[:, step, None]).int().argmax(1)
        prefix = decoder.commit(prefix, candidates, winner, codes[rows, order[:, step]])


def _tensor(name: str, shape: list[int], values: Any) -> Tensor:
    if values == "int":
        return torch.zeros(shape, dtype=torch.long)
    scale, offset = values
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(generator.standard_normal(size=shape, dtype=np.float32) * np.float32(scale) + np.float32(offset))
