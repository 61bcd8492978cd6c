"""DeepSpeed ZeRO over gloo in real processes: training, checkpoints, and going on after a kill."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import run_workers, start_workers
from small_run import prepare_small_run, pretraining, small_recipe

from oar_scale.errors import UserError
from oar_scale.model import load_model
from oar_scale.observe.events import read_events
from oar_scale.stages.run import Run
from oar_scale.storage import join, open_storage
from oar_scale.training.checkpoints import latest_checkpoint
from oar_scale.training.job import TrainingJob
from oar_scale.training.schedule import learning_rate


def train_worker(job: TrainingJob) -> None:
    from oar_scale.training.worker import train

    train(job)


def losses(run: Run) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in read_events(run.events, "pretrain") if event["kind"] == "train"}


def weights(run: Run) -> dict[str, Any]:
    return load_model(run.model_uri("anyorder")).state_dict()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten steps of ZeRO-2 on two workers without interruption."""
    run = prepare_small_run(small_recipe(str(tmp_path_factory.mktemp("undisturbed"))))
    run_workers(train_worker, 2, pretraining(run))
    return run


def test_zero_2_on_two_processes_learns(undisturbed: Run) -> None:
    curve = losses(undisturbed)
    assert sorted(curve) == list(range(1, 11))
    assert curve[10] < curve[1] - 0.05
    heldout = {e["step"]: e["nll_random"] for e in read_events(undisturbed.events, "pretrain") if e["kind"] == "heldout"}
    assert heldout[10] < heldout[0]


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_with_the_same_model(undisturbed: Run, tmp_path: Path) -> None:
    run = prepare_small_run(small_recipe(str(tmp_path)))
    job = pretraining(run)
    workers = start_workers(train_worker, 2, job)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not os.path.exists(join(job.checkpoints, "step-00000003", "COMMITTED")):
        time.sleep(0.01)
    for worker in workers:
        worker.kill()
        worker.join()
    run_workers(train_worker, 2, job)

    starts = [event["start_step"] for event in read_events(run.events, "pretrain") if event["kind"] == "start"]
    assert 3 <= starts[-1] < 10, f"killed too late or resumed from nothing: {starts}"
    assert losses(run) == losses(undisturbed)
    expected = weights(undisturbed)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(undisturbed: Run) -> None:
    job = pretraining(undisturbed)
    assert latest_checkpoint(job).step == 10  # type: ignore[union-attr]
    victim = next(
        uri for uri in open_storage(job.checkpoints).list(join(job.checkpoints, "step-00000010")) if uri.endswith("optim_states.pt")
    )
    whole = Path(victim).read_bytes()
    try:
        Path(victim).write_bytes(whole[: len(whole) // 2])
        found = latest_checkpoint(job)
        assert found is not None and found.step == 9
        assert os.path.basename(victim) in found.rejected[0].fault
    finally:
        Path(victim).write_bytes(whole)


def test_an_uncommitted_checkpoint_is_never_used(undisturbed: Run) -> None:
    job = pretraining(undisturbed)
    marker = Path(join(job.checkpoints, "step-00000010", "COMMITTED"))
    marker.unlink()
    try:
        assert latest_checkpoint(job).step == 9  # type: ignore[union-attr]
    finally:
        marker.touch()


def test_a_checkpoint_of_other_settings_is_refused_by_name(undisturbed: Run) -> None:
    changed = small_recipe(undisturbed.local(), pretrain={"lr": 0.5})
    job = pretraining(Run(changed))
    with pytest.raises(UserError, match=r"training\.lr = 0\.001.*now says 0\.5"):
        latest_checkpoint(job)


def test_only_the_newest_checkpoints_are_kept(undisturbed: Run) -> None:
    job = pretraining(undisturbed)
    steps = {Path(uri).parent.name for uri in open_storage(job.checkpoints).list(job.checkpoints)}
    assert steps == {"step-00000006", "step-00000009", "step-00000010"}


def test_learning_rate_warms_up_and_decays_to_its_floor() -> None:
    config = small_recipe("unused").pretrain
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert rates[0] == config.lr / 2 and rates[1] == config.lr == max(rates)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert learning_rate(config, config.steps) == pytest.approx(config.lr * config.final_lr_fraction)
