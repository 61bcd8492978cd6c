"""Pictures while training are worth less than the training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
