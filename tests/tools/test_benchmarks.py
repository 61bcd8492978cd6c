"""What the benchmarks compare computes the same."""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path

import pytest
import torch
from small_models import cond_inputs, random_codes, random_orders, small_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "benchmarks"))

import extraction
import measure
import train

from oar_scale.config.loading import dump_recipe
from oar_scale.errors import UserError
from oar_scale.model.weights import read_spec
from tools import minimal


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


def test_a_training_is_measured_of_a_run_that_has_tokens_alone(tmp_path: Path) -> None:
    """The model that training starts with is made in the benchmark's own folder; the run stays as it is."""
    run, folder = tmp_path / "run", tmp_path / "folder"
    folder.mkdir()
    recipe = minimal.make_recipe(run, None, 24, 4)
    minimal.tokenize(recipe, run)
    recipe = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"micro_batch": 8})})
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    job = train._job(str(run), str(folder))
    assert read_spec(job.start_from).dim == recipe.model.dim and Path(job.start_from).is_relative_to(folder)
    assert not (run / "models").exists()


def test_measurements_without_a_round_are_refused() -> None:
    with pytest.raises(UserError, match="--rounds 0: nothing would be measured"):
        measure.alternate(["ours"], 0, lambda case: {})


def test_a_worker_that_fails_ends_the_measurement() -> None:
    """Nobody waits for what it would have said; the others end with it."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=sys.exit, args=(1,)), context.Process(target=time.sleep, args=(600,))]
    for worker in workers:
        worker.start()
    with pytest.raises(SystemExit, match="a worker failed"):
        train._heard(context.Queue(), workers)
    assert not any(worker.is_alive() for worker in workers)
