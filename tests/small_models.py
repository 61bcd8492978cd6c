"""Real any-order models that are small enough to be checked by brute force."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oar_scale.model import AnyOrderModel, ModelSpec
from oar_scale.model.spec import ClassSpec, FeatureSpec, TextSpec

CONDITIONS = {"class": ClassSpec(classes=5), "text": TextSpec(vocab=11, rows=4), "features": FeatureSpec(width=6, rows=3)}


def small_spec(**changes: Any) -> ModelSpec:
    sizes: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 2, "ffn_hidden": 48, "vocab_size": 7, "grid": 3}
    return ModelSpec(**{**sizes, "condition": TextSpec(vocab=11, rows=4), **changes})


def small_model(*, grid: int = 3, seed: int = 0, dropout: float = 0.0, vocab: int = 7, **changes: Any) -> AnyOrderModel:
    """A model whose weights, head included, are large enough that every choice between its logits is clear."""
    spec = small_spec(grid=grid, dropout=dropout, vocab_size=vocab, **changes)
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
    kind = model.spec.condition
    assert isinstance(kind, TextSpec)
    return torch.randint(1, kind.vocab, (images, kind.rows), generator=torch.Generator().manual_seed(seed))


def cond_inputs(model: AnyOrderModel, images: int, seed: int = 0) -> Tensor:
    """Random inputs of a model's condition (labels, text ids or features) for some images, as ``model.condition`` takes them."""
    generator, kind = torch.Generator().manual_seed(seed), model.spec.condition
    if isinstance(kind, FeatureSpec):
        return torch.randn(images, kind.rows, kind.width, generator=generator)
    if isinstance(kind, ClassSpec):
        return torch.randint(kind.classes, (images, 1), generator=generator)
    return random_text(model, images, seed)
