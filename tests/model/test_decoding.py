"""Placing cells one at a time: what it takes of memory, and which rows it refuses to mix up. What it computes: ``test_layouts.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import cond_inputs, random_codes, random_orders, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from oar_scale.model import Decoder, decoding
from oar_scale.orders import scores
from oar_scale.orders.extraction import extract_orders
from oar_scale.orders.settings import ExtractionSettings


@torch.no_grad()
@pytest.mark.parametrize("layout", ["instructed", "dual", "decoupled", "grouped"])
def test_how_many_rows_go_together_changes_nothing(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(layout=layout, grid=4, kv_heads=1)
    codes, rows, order = random_codes(model, 5), model.condition(cond_inputs(model, 5)), random_orders(model, 5)
    settings = ExtractionSettings(guidance=2.0, commit_per_step=3)

    def results() -> tuple[Any, torch.Tensor]:
        known = Decoder(model).prefill(Decoder(model).begin(rows), order[:, :6], codes.gather(1, order[:, :6]))
        return extract_orders(model, codes, rows, settings), Decoder(model).candidate_rows(known, order[:, 6:]).logits_BRV

    together, logits = results()
    monkeypatch.setitem(decoding.ROWS_AT_ONCE, "cpu", 20)
    monkeypatch.setitem(scores.BLOCK, "cpu", (7, 3))
    separate, other_logits = results()
    assert torch.equal(separate.order_BN, together.order_BN)
    torch.testing.assert_close(separate.score_BN, together.score_BN, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other_logits, logits, rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@torch.no_grad()
@pytest.mark.parametrize("score", ["gt_logprob", "neg_entropy"])
def test_no_tensor_of_an_extraction_exceeds_a_layers_cache(score: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the logits of all candidates, nor a mask among them, nor a copy of the cache for each."""
    model = small_model(grid=8, vocab=4096)
    codes, rows = random_codes(model, 8), model.null_condition(8)
    monkeypatch.setitem(decoding.ROWS_AT_ONCE, "cpu", 64)
    monkeypatch.setitem(scores.BLOCK, "cpu", (64, 512))
    whole_cache = Decoder(model).begin(rows).cache.numel()
    with Largest() as largest:
        extract_orders(model, codes, rows, ExtractionSettings(score=score, commit_per_step=16))
    weights = model.output.weight.numel()
    assert largest.numel <= max(whole_cache, weights)
    assert 4 * whole_cache < 8 * 64 * 4096  # what the logits would be


@torch.no_grad()
def test_the_cache_has_room_for_the_rows_of_an_image_and_no_more() -> None:
    for layout, stride in (("instructed", 2), ("dual", 1)):
        model = small_model(layout=layout, kv_heads=1)
        assert Decoder(model).begin(model.null_condition(2)).cache.shape == (2, 2, 2, 1, 4 + stride * 9, 16)


@torch.no_grad()
def test_overwritten_candidates_cannot_be_committed() -> None:
    """Rows of candidates that were written over are not committed."""
    model = small_model()
    order, codes = random_orders(model, 2), random_codes(model, 2)
    prefix, winner = Decoder(model).begin(model.null_condition(2)), torch.zeros(2, dtype=torch.long)
    first = Decoder(model).candidate_rows(prefix, order)
    second = Decoder(model).candidate_rows(prefix, order[:, :3])
    with pytest.raises(ValueError, match="rows are gone"):
        Decoder(model).commit(prefix, first, winner, codes[:, 0])
    Decoder(model).commit(prefix, second, winner, codes[:, 0])
    with pytest.raises(ValueError, match="rows are gone"):
        Decoder(model).commit(prefix, second, winner, codes[:, 0])


@torch.no_grad()
def test_more_candidates_than_cells_are_refused() -> None:
    model = small_model(layout="dual")
    with pytest.raises(ValueError, match="10 candidates are more than the cells that are left"):
        Decoder(model).candidate_rows(Decoder(model).begin(model.null_condition(1)), torch.arange(10)[None] % 9)
