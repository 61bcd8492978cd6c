"""What the benchmarks compare computes the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from small_models import cond_inputs, random_codes, random_orders, small_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "benchmarks"))

import extraction
import measure


@torch.no_grad()
@pytest.mark.parametrize("layout", ["instructed", "dual", "grouped"])
def test_copied_caches_choose_the_cells_that_extraction_chooses(layout: str) -> None:
    """At every number of placed cells, for all images of a batch."""
    model = small_model(layout=layout)
    condition, codes, order = model.condition(cond_inputs(model, 3)), random_codes(model, 3), random_orders(model, 3)
    for placed in range(model.spec.cells):
        step = extraction._Step(model, codes, condition, order, placed)
        assert torch.equal(step.methods[extraction.OURS](), step.methods[extraction.COPIED]())
        prefixes = step.ours, step.copied
        assert len({(each.rows, each.last.cells_BK.shape[1]) for each in prefixes}) == 1


def test_a_size_has_the_widths_and_norms_of_its_layout() -> None:
    sizes = {layout: measure.benchmark_spec("l", layout) for layout in measure.LAYOUTS}
    assert {layout: spec.layout for layout, spec in sizes.items()} == {layout: layout for layout in measure.LAYOUTS}
    assert [sizes["grouped"].ffn_hidden, sizes["grouped"].norm_eps] == [4 * 1024, 1e-6]
    assert [sizes["decoupled"].ffn_hidden, sizes["decoupled"].norm_eps] == [2816, 1e-5]
