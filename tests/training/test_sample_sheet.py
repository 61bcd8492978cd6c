"""Pictures while training are worth less than the training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_training import tiny_recipe

from oar_scale.config.schema import Recipe
from oar_scale.errors import Unreachable, UserError
from oar_scale.training.callbacks import sample_sheet
from oar_scale.training.callbacks.sample_sheet import SampleSheet


@pytest.mark.parametrize("error", [Unreachable("s3://bucket/run: no connection"), UserError("/run/samples: No space left on device.")])
def test_pictures_that_cannot_be_written_end_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: UserError
) -> None:
    codes_BN = torch.zeros(2, 4, dtype=torch.long)

    def fail(uri: str) -> None:
        raise error

    monkeypatch.setattr(sample_sheet, "generate", lambda *_, **__: SimpleNamespace(codes_BN=codes_BN, order_BN=codes_BN))
    monkeypatch.setattr(sample_sheet, "conditioning_inputs", lambda *_: codes_BN)
    monkeypatch.setattr(sample_sheet, "load_vq", fail)
    model = SimpleNamespace(condition=lambda rows: rows, dtype=torch.float32)
    loop: Any = SimpleNamespace(step=5, every=lambda steps: True, events=object())
    loop.engine = SimpleNamespace(plain_model=lambda: model, spec=SimpleNamespace(layout="dual"))
    loop.process = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), heartbeat=lambda what: None, gather=lambda value: [value])
    loop.job = SimpleNamespace(
        root="s3://bucket/run", stage="pretrain", recipe=Recipe(name="stub"), training=SimpleNamespace(sample_every=5)
    )
    heldout: Any = SimpleNamespace(encoded_prompts=codes_BN, prompts=None, orders={}, captions=["a", "b"])
    SampleSheet(heldout).after_step(loop)
    assert f"the pictures of step 5 are left out: {error}" in caplog.text


def test_each_picture_has_its_own_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten held-out images shared by four ranks: two have three of them, two have two."""
    world, drawn, emitted = 4, list[int](), dict[str, Any]()

    def decode(vq: object, codes_SN: torch.Tensor) -> list[Any]:
        drawn.extend(codes_SN[:, 0].tolist())
        return []

    def of(rank: int) -> torch.Tensor:
        return torch.arange(10)[rank::world][:, None].expand(-1, 4)

    stubs: dict[str, Any] = {
        "conditioning_inputs": lambda prompts, encoded, dtype: encoded,
        "load_vq": lambda uri: SimpleNamespace(to=lambda device: None),
        "generate": lambda model, condition, *_, **__: SimpleNamespace(codes_BN=condition, order_BN=condition),
        "decode_pictures": decode,
        "step_of_cell": lambda order: [],
        "contact_sheet": lambda *_, **__: None,
        "png": lambda sheet: b"",
        "open_storage": lambda uri: SimpleNamespace(write=lambda *_: True),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(sample_sheet, name, stub)
    events = SimpleNamespace(emit=lambda kind, **fields: emitted.update(fields))
    loop: Any = SimpleNamespace(step=5, every=lambda steps: True, events=events)
    model = SimpleNamespace(condition=lambda rows: rows, dtype=torch.float32)
    loop.engine = SimpleNamespace(plain_model=lambda: model, spec=SimpleNamespace(layout="dual"))
    loop.process = SimpleNamespace(rank=0, world=world, device=torch.device("cpu"), heartbeat=lambda what: None)
    loop.process.gather = lambda value: [(of(rank), of(rank)) for rank in range(world)]
    recipe = tiny_recipe("/nowhere")
    loop.job = SimpleNamespace(root="/r", local="/l", stage="pretrain", recipe=recipe, training=SimpleNamespace(sample_every=5))
    heldout: Any = SimpleNamespace(encoded_prompts=of(0), prompts=None, orders={}, captions=[f"{number}" for number in range(10)])
    SampleSheet(heldout).after_step(loop)
    assert emitted["captions"] == [f"{number}" for number in drawn]
