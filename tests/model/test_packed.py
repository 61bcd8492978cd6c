"""Images at different lengths go through the trunk together: their rows are those of each alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import cond_inputs, random_codes, random_orders, small_model
from torch import Tensor

from oar_scale.model import AnyOrderModel, Decoder, Prefix, decoding
from oar_scale.model.decoding import trunk_loads
from oar_scale.model.layouts import LAYOUTS
from oar_scale.model.row_layout import Placed

ANY_ORDER = [layout for layout in LAYOUTS if layout != "raster"]


def placed(model: AnyOrderModel, images: slice, count: int) -> tuple[Prefix, Tensor]:
    """Some of 5 images with so many cells, and the cells that are empty."""
    with torch.no_grad():
        condition_BTD = model.condition(cond_inputs(model, 5))[images]
    order_BN, codes_BN = random_orders(model, 5)[images], random_codes(model, 5)[images]
    decoder = Decoder(model)
    prefix = decoder.prefill(decoder.begin(condition_BTD), order_BN[:, :count], codes_BN[:, :count])
    return prefix, order_BN[:, count:]


def asked_twice(model: AnyOrderModel, prefix: Prefix, cells_BR: Tensor, winner_B: Tensor) -> tuple[Tensor, Tensor]:
    """Rows about cells, and about the first of them again behind a winner."""
    decoder = Decoder(model)
    candidates = decoder.candidate_rows(prefix, cells_BR)
    prefix = decoder.commit(prefix, candidates, winner_B, winner_B % model.spec.vocab_size)
    return candidates.rows_BRD, decoder.candidate_rows(prefix, cells_BR[:, :1]).rows_BRD


@pytest.mark.parametrize("at_once", [1, 7, 512])
@pytest.mark.parametrize("layout", ANY_ORDER)
def test_packed_rows_are_those_of_each_prefix(layout: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prefixes of other lengths, that ask about other numbers of cells."""
    model, parts = small_model(layout=layout, kv_heads=1), [(slice(2), 0), (slice(2, 3), 5), (slice(3, 5), 3)]
    winners = [torch.tensor([8, 3]), torch.tensor([2]), torch.tensor([0, 5])]
    expected = [asked_twice(model, *placed(model, *part), winner) for part, winner in zip(parts, winners, strict=True)]
    monkeypatch.setitem(decoding.ROWS_AT_ONCE, "cpu", at_once)
    decoder, (prefixes, cells) = Decoder(model), zip(*(placed(model, *part) for part in parts), strict=True)
    first = decoder.candidate_rows_of(prefixes, cells)
    after = [decoder.commit(*each, winner % 7) for *each, winner in zip(prefixes, first, winners, winners, strict=True)]
    second = decoder.candidate_rows_of(after, [cells_BR[:, :1] for cells_BR in cells])
    for (rows, rows_after), one, other in zip(expected, first, second, strict=True):
        torch.testing.assert_close(one.rows_BRD, rows)
        torch.testing.assert_close(other.rows_BRD, rows_after)


@pytest.mark.parametrize("layout", ANY_ORDER)
def test_images_of_one_prefix_may_differ_in_length(layout: str) -> None:
    model = small_model(layout=layout, kv_heads=1)
    prefixes, cells = zip(*(placed(model, slice(image, image + 1), count) for image, count in enumerate([2, 5])), strict=True)
    for prefix in prefixes:
        prefix.cache[:, :, :, :, prefix.rows :] = 0
    rows_B = torch.tensor([prefix.rows for prefix in prefixes])
    last = Placed(*(torch.cat(each) for each in zip(*(prefix.last for prefix in prefixes), strict=True)))
    both = replace(prefixes[0], cache=torch.cat([prefix.cache for prefix in prefixes], dim=2), rows=rows_B, last=last)
    cells_BR, winner_B = torch.cat([each[:, :3] for each in cells]), torch.tensor([2, 1])
    first, second = asked_twice(model, both, cells_BR, winner_B)
    for image, prefix in enumerate(prefixes):
        part = slice(image, image + 1)
        one, other = asked_twice(model, prefix, cells_BR[part], winner_B[part])
        torch.testing.assert_close(first[part], one)
        torch.testing.assert_close(second[part], other)


def test_loads_of_the_trunk_are_whole_images_of_all_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decoding.ROWS_AT_ONCE, "cpu", 10)
    loads = list(trunk_loads([(3, 4), (1, 20), (2, 1), (2, 5)], torch.device("cpu")))
    images = [[(at, part.start, part.stop) for at, part in load] for load in loads]
    assert images == [[(0, 0, 2)], [(0, 2, 3)], [(1, 0, 1)], [(2, 0, 2), (3, 0, 1)], [(3, 1, 2)]]
