"""What a question about a drafted cell knows: what it would know one by one, and nothing else."""

from __future__ import annotations

import pytest
import torch
from small_models import cond_inputs, random_codes, random_orders, small_model
from torch import Tensor

from oar_scale.model import AnyOrderModel, Decoder
from oar_scale.model.window import WindowDecoder

LAYOUTS = ("instructed", "dual", "decoupled", "grouped")
SETTLED, DRAFTED, WIDTH = torch.tensor([0, 2, 4]), torch.tensor([3, 0, 2]), 3
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def asked(model: AnyOrderModel, order: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The rows about the cells ahead of three images, and the cells' places; ``codes`` are in the order of generation."""
    window = WindowDecoder(model, model.condition(cond_inputs(model, 3)), order, WIDTH)
    window.prefill(codes[:, : int(SETTLED.max())])
    return window.ask(codes, SETTLED, DRAFTED, int(SETTLED.max()))


@torch.no_grad()
@each_layout
def test_a_window_asks_what_one_by_one_would_ask(layout: str) -> None:
    """In turn as in one pass over the whole image, which of a grouped model has groups of one; behind the drafts as candidates."""
    model = small_model(layout=layout)
    order, codes = random_orders(model, 3), random_codes(model, 3)
    rows, places = asked(model, order, codes.gather(1, order))
    condition = model.condition(cond_inputs(model, 3))
    whole = model.rows(codes, order, condition)
    for image, (settled, drafted) in enumerate(zip(SETTLED.tolist(), DRAFTED.tolist(), strict=True)):
        one, turn, known = slice(image, image + 1), drafted + 1, settled + drafted
        assert places[image, :turn].tolist() == list(range(settled, known + 1))
        torch.testing.assert_close(rows[image, :turn], whole[image, settled : known + 1], rtol=1e-4, atol=1e-5)
        after = places[image, WIDTH + 1 :]
        assert after.tolist() == list(range(known + 1, known + 1 + WIDTH))
        decoder = Decoder(model)
        prefix = decoder.prefill(decoder.begin(condition[one]), order[one, :known], codes.gather(1, order)[one, :known])
        cells = order[image, after[after < 9]]
        alone = decoder.candidate_rows(prefix, cells[None]).rows_BRD[0]
        torch.testing.assert_close(rows[image, WIDTH + 1 :][after < 9], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@each_layout
@pytest.mark.parametrize("place", range(9))
def test_a_question_does_not_see_the_code_of_its_own_cell_or_a_later_one(layout: str, place: int) -> None:
    """Another code at a place changes no answer about that place or an earlier one, to the last bit, and all later ones if it is known."""
    model = small_model(layout=layout)
    order, codes = random_orders(model, 3), random_codes(model, 3)
    other = codes.clone()
    other[:, place] = (codes[:, place] + 1) % model.spec.vocab_size
    (before, places), (after, _) = (asked(model, order, each) for each in (codes, other))
    differs = (before != after).any(-1)
    end = (SETTLED + DRAFTED)[:, None]
    meant = ((torch.arange(2 * WIDTH + 1) <= DRAFTED[:, None]) | (torch.arange(2 * WIDTH + 1) > WIDTH)) & (places < 9)
    assert torch.equal(differs[meant], ((places > place) & (end > place))[meant])
