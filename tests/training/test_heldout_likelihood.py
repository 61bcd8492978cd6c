"""What a checkpoint says of its likelihood is measured on its own weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from oar_scale.training.callbacks.heldout import HeldoutLikelihood


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
