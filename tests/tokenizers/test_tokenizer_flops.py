"""The formulas against what torch counts while the real tokenizer runs."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from oar_scale.config.schema import ImageTokenizerConfig
from oar_scale.tokenizers.flops import decoder_flops, encoder_flops
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer

SHAPES = {
    "quick start": ({"channels": 32, "multipliers": (1, 2, 2), "res_blocks": 1, "codebook_size": 512, "codebook_dim": 8}, 8),
    "wide": ({"channels": 32, "multipliers": (1, 3), "res_blocks": 3, "codebook_size": 64, "codebook_dim": 4}, 4),
    "VQ-16": ({"channels": 128, "multipliers": (1, 1, 2, 2, 4), "res_blocks": 2, "codebook_size": 16384, "codebook_dim": 8}, 16),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_formulas_count_what_torch_counts(name: str) -> None:
    shape, grid = SHAPES[name]
    config = ImageTokenizerConfig.model_validate(shape)
    size = grid * 2 ** (len(config.multipliers) - 1)
    spec = VQSpec(image_size=size, latent_channels=config.channels * config.multipliers[-1], **shape)
    with FakeTensorMode(), torch.no_grad():  # shapes alone
        tokenizer, images_23HW = VQTokenizer(spec), torch.zeros(2, 3, size, size)
        with FlopCounterMode(display=False) as encoding:
            codes_2N = tokenizer.encode(images_23HW)
        with FlopCounterMode(display=False) as decoding:
            tokenizer.decode(codes_2N)
    assert encoding.get_total_flops() == 2 * encoder_flops(config, grid)
    assert decoding.get_total_flops() == 2 * decoder_flops(config, grid)
