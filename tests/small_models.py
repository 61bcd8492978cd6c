"""Real any-order models that are small enough to be checked by brute force."""

from __future__ import annotations

import torch
from torch import Tensor

from oar_scale.model import AnyOrderModel, ModelSpec


def small_model(*, grid: int = 3, seed: int = 0, dropout: float = 0.0, vocab: int = 7) -> AnyOrderModel:
    """A model whose weights, head included, are large enough that every choice between its logits is clear."""
    spec = ModelSpec(dim=32, layers=2, heads=2, ffn_hidden=48, vocab_size=vocab, grid=grid, text_vocab=11, max_tokens=4, dropout=dropout)
    model = AnyOrderModel(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def random_codes(model: AnyOrderModel, images: int, seed: int = 0) -> Tensor:
    return torch.randint(model.spec.vocab_size, (images, model.spec.cells), generator=torch.Generator().manual_seed(seed))


def random_orders(model: AnyOrderModel, images: int, seed: int = 0) -> Tensor:
    return torch.rand(images, model.spec.cells, generator=torch.Generator().manual_seed(seed)).argsort(1)


def random_text(model: AnyOrderModel, images: int, seed: int = 0) -> Tensor:
    """Captions of full length: no padding."""
    return torch.randint(1, model.spec.text_vocab, (images, model.spec.max_tokens), generator=torch.Generator().manual_seed(seed))
