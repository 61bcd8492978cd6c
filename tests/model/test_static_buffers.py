"""Static buffers against slices: the same rows, whatever was placed before, and how."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONDITIONS, cond_inputs, random_codes, random_orders, small_model
from torch import Tensor

from oar_scale.model import Decoder, cache
from oar_scale.model.layouts import LAYOUTS

PARALLEL = ("instructed", "decoupled", "grouped")
"""Layouts that ask for several cells together."""


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the roundings of float32 sums taken in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    condition=st.sampled_from(sorted(CONDITIONS)),
    rotation=st.sampled_from(["identity", "zero"]),
    attention=st.sampled_from(["causal", "mutual"]),
    kv_heads=st.sampled_from([None, 1]),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
    known=st.integers(0, 5),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    together=st.booleans(),
)
@torch.no_grad()
def test_static_buffers_give_the_rows_of_slices(
    layout: str,
    condition: str,
    rotation: str,
    attention: str,
    kv_heads: int | None,
    batch: int,
    seed: int,
    known: int,
    sizes: list[int],
    together: bool,
) -> None:
    """Behind ``known`` cells, steps of some cells each: the first is a winner among all that are left, or all are asked together."""
    extra = {"step_attention": attention} if layout in ("instructed", "decoupled") else {}
    model = small_model(
        layout=layout, condition=CONDITIONS[condition], kv_heads=kv_heads, condition_rotation=rotation, grid=4, seed=seed, **extra
    )
    codes, order = random_codes(model, batch, seed), random_orders(model, batch, seed)
    if layout == "raster":
        order = torch.arange(16).repeat(batch, 1)
    decoder, placed, first = Decoder(model), known, torch.zeros(batch, dtype=torch.long)
    inputs, known_codes = model.condition(cond_inputs(model, batch, seed)), codes.gather(1, order[:, :known])
    slices = decoder.prefill(decoder.begin(inputs), order[:, :known], known_codes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cache.STATIC_ROWS, "cpu", 1)
        static = decoder.begin(inputs)
        static.cache[..., static.rows :, :] = torch.nan  # memory as it comes
        static = decoder.prefill(static, order[:, :known], known_codes).on_static_buffers()
    for size in sizes:
        if placed + size > 16:
            break
        cells = order[:, placed : placed + size]
        now, left = codes.gather(1, cells), 1 if layout == "raster" else 16 - placed
        if together and size > 1 and layout in PARALLEL:
            same(decoder.parallel_rows(static, cells), decoder.parallel_rows(slices, cells))
            static, slices = (decoder.place_parallel(prefix, cells, now) for prefix in (static, slices))
        else:
            asked = cache.padded_candidates(left, 16) if left > 1 else 1
            ours = decoder.candidate_rows(static, torch.cat([order[:, placed:], order[:, :placed]], dim=1)[:, :asked])
            theirs = decoder.candidate_rows(slices, order[:, placed : placed + left])
            same(ours.rows_BRD[:, :left], theirs.rows_BRD)
            static, slices = decoder.commit(static, ours, first, now[:, 0]), decoder.commit(slices, theirs, first, now[:, 0])
            static, slices = (decoder.prefill(prefix, cells[:, 1:], now[:, 1:]) for prefix in (static, slices))
        placed += size
        assert int(static.rows) == slices.rows
        same(static.cache[..., : slices.rows, :], slices.cache[..., : slices.rows, :])


@pytest.mark.parametrize("cells", [1, 9, 64, 255, 256])
def test_candidates_are_padded_by_an_eighth_at_most(cells: int) -> None:
    padded = [cache.padded_candidates(count, cells) for count in range(1, cells + 1)]
    assert all(count <= asked <= cells and asked - count < cells / 8 for count, asked in enumerate(padded, 1))
    assert len(set(padded)) <= 8
