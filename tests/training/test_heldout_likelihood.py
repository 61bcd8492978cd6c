"""What a checkpoint says of its likelihood is measured on its own weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from small_run import prepare_small_run, pretraining
from small_training import tiny_recipe

from oar_scale.model import load_model
from oar_scale.training.callbacks.heldout import HeldoutLikelihood
from oar_scale.training.heldout_images import HeldoutImages
from oar_scale.training.inputs import job_prompts
from oar_scale.training.plain_engine import PlainEngine
from oar_scale.training.process import SingleProcess


def test_a_checkpoint_has_the_likelihood_of_its_step_or_none() -> None:
    """Evaluated every 50 steps, saved every 10: the best checkpoint is the one that was evaluated, not one that came later."""
    truth = {50: 3.0, 100: 2.5, 150: 2.7}
    loop: Any = SimpleNamespace(
        step=0, events=None, engine=SimpleNamespace(model=None), process=SimpleNamespace(heartbeat=lambda what: None)
    )
    loop.job = SimpleNamespace(training=SimpleNamespace(evaluate_every=50, ema_decay=None))
    loop.every = lambda steps: loop.step % steps == 0
    heldout: Any = SimpleNamespace(orders={"nll_random": None}, nll=lambda model, name: truth[loop.step])
    callback, saved = HeldoutLikelihood(heldout), {}
    for loop.step in range(1, 151):
        callback.after_step(loop)
        if loop.step % 10 == 0:
            saved[loop.step] = callback.state()["metrics"]
    assert {step: metrics["nll_random"] for step, metrics in saved.items() if metrics} == truth


def test_a_moving_average_is_judged_without_random_orders_too(tmp_path: Path) -> None:
    run = prepare_small_run(tiny_recipe(str(tmp_path), pretrain={"evaluate_orders": ["raster"], "ema_decay": 0.9}))
    job, process = pretraining(run), SingleProcess()
    prompts = job_prompts(job)
    engine = PlainEngine(load_model(job.start_from), prompts, job.training, job.recipe.parallel)
    loop: Any = SimpleNamespace(step=0, events=None, engine=engine, process=process, job=job)
    callback = HeldoutLikelihood(HeldoutImages(job, prompts, process))
    callback.start(loop)
    assert callback.state()["metrics"].keys() == {"nll_random", "nll_raster", "nll_ema"}
