"""The shipped tokenizer is as good as recipes/weights says, measured again on the drawings it has never seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from oar_scale.config.schema import DataConfig, OpenMojiSource
from oar_scale.data.hashing import name_hash
from oar_scale.data.sources.openmoji import OpenMojiImages
from oar_scale.tokenizers.vq import load_vq
from oar_scale.tokenizers.vq_training import assess_vq

WEIGHTS = Path(__file__).resolve().parents[2] / "recipes" / "weights"


@pytest.fixture(scope="module")
def heldout() -> Tensor:
    """All drawings whose names the emoji recipe holds out, 32 px."""
    share = DataConfig().heldout_fraction
    drawings = [drawing for drawing in OpenMojiImages(OpenMojiSource()).images() if name_hash(drawing.name, "heldout") < share]
    return torch.from_numpy(np.stack([np.asarray(drawing.read(32).image) for drawing in drawings]))


def test_the_shipped_tokenizer_reaches_its_stated_quality(heldout: Tensor) -> None:
    """Stated: 23.4 dB on 403 held-out drawings, all 512 codes in use (README and emoji.json)."""
    stated = json.loads((WEIGHTS / "emoji" / "history.json").read_text())["stages"]["tokenizer"]["results"]
    assert "23.4 dB PSNR on 403 held-out drawings, all 512 codes in use" in (WEIGHTS / "README.md").read_text()
    psnr_db, use, _ = assess_vq(load_vq(str(WEIGHTS / "emoji" / "vq.safetensors")), heldout)
    assert len(heldout) == 403
    assert psnr_db >= 23 and psnr_db == pytest.approx(stated["psnr_db"], abs=0.05)
    assert use == stated["codebook_use"] == 1.0
