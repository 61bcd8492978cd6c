"""The training worker in real processes, DeepSpeed ZeRO over gloo: what it learns, what it survives, what it leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import run_workers, start_workers
from PIL import Image
from small_run import copy_run, prepare_small_run, pretraining, small_recipe

from oar_scale.distributed.checkpoints import committed_steps
from oar_scale.model import load_model
from oar_scale.observe.events import attempts, read_events
from oar_scale.run.context import Run
from oar_scale.storage import join
from oar_scale.training.job import TrainingJob
from oar_scale.training.learning_rate import learning_rate

FLOAT32 = {"model": {"dropout": 0.1}, "parallel": {"precision": "fp32"}}
"""No rounding: runs of different shape can be compared, their dropout included."""


def train_worker(job: TrainingJob, *, left_at: int | None = None, poisoned: tuple[int, ...] = (), spiked: tuple[int, ...] = ()) -> None:
    """The worker as it is, with things that happen to its steps: SIGTERM after one, an infinite gradient or a leap uphill in some."""
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
    from oar_scale.distributed.worker import train
    from oar_scale.errors import Requeue

    one_step = DeepSpeedEngine.train_step

    def step(engine: Any, batch: Any, lr: float, seeds: Any) -> Any:
        handle = None
        if batch.step in poisoned and os.environ["RANK"] == "1":
            handle = engine.model.norm.register_forward_hook(lambda module, inputs, output: output * float("inf"))
        result = one_step(engine, batch, -1e4 * lr if batch.step in spiked else lr, seeds)
        if handle is not None:
            handle.remove()
        if batch.step == left_at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    DeepSpeedEngine.train_step = step  # type: ignore[method-assign]
    try:
        train(job)
    except Requeue:
        sys.exit(75)


def leaves_at(job: TrainingJob, step: int) -> None:
    train_worker(job, left_at=step)


def poisoned_at(job: TrainingJob, steps: tuple[int, ...]) -> None:
    train_worker(job, poisoned=steps)


def spiked_at(job: TrainingJob, steps: tuple[int, ...]) -> None:
    train_worker(job, spiked=steps)


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run.events, "pretrain") if event["kind"] == kind]


def losses(run: Run) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(run, "train")}


def weights(run: Run) -> dict[str, Any]:
    return load_model(run.model_uri("any_order")).state_dict()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare_small_run(small_recipe(str(tmp_path_factory.mktemp("prepared"))))


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare_small_run(small_recipe(str(tmp_path_factory.mktemp("still")), **FLOAT32))


def slow_by_its_own_watch(job: TrainingJob) -> None:
    """The second rank measures 100 s more for its forward passes than they take."""
    from oar_scale.training.engine import Stopwatch

    if os.environ["RANK"] == "1":
        measured = Stopwatch.seconds
        Stopwatch.seconds = lambda watch: measured(watch) + 100  # type: ignore[method-assign]
    train_worker(job)


@pytest.fixture(scope="module")
def undisturbed(prepared: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten steps of ZeRO-2 on two workers without interruption."""
    run = copy_run(prepared, str(tmp_path_factory.mktemp("undisturbed")))
    run_workers(slow_by_its_own_watch, 2, pretraining(run))
    return run


def test_the_rank_that_all_wait_for_is_named(undisturbed: Run) -> None:
    logged = events(undisturbed, "train")
    assert {(event["slowest_rank"], event["slowest_host"]) for event in logged} == {(1, socket.gethostname())}
    assert all(event["slowest_rank_s"] > 100 for event in logged)
    assert 0 < sum(event["median_rank_s"] for event in logged) < 100 * len(logged), "that of the other one, as measured"


def test_zero_2_on_two_processes_learns(undisturbed: Run) -> None:
    curve = losses(undisturbed)
    assert sorted(curve) == list(range(1, 11))
    assert curve[10] < curve[1] - 0.05
    heldout = {e["step"]: e["nll_random"] for e in events(undisturbed, "heldout")}
    assert heldout[10] < heldout[0]


def test_each_stage_of_zero_trains_as_a_single_process_does(still: Run, tmp_path: Path) -> None:
    """Twenty steps in float32: the losses within 1e-5, the averaged weights within 1e-5."""
    losses_by_stage: dict[tuple[int, int], tuple[dict[int, float], dict[str, Any]]] = {}
    for workers, zero_stage in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3)):
        changes = {**FLOAT32, "parallel": {"precision": "fp32", "workers": workers, "zero_stage": zero_stage}}
        run = copy_run(still, str(tmp_path / f"{workers}-{zero_stage}"), **changes, pretrain={"steps": 20, "ema_decay": 0.9})
        run_workers(train_worker, workers, pretraining(run))
        losses_by_stage[workers, zero_stage] = losses(run), weights(run)
    expected, averaged = losses_by_stage[1, 0]
    assert expected[20] < expected[1] - 0.2
    for shape, (curve, tensors) in losses_by_stage.items():
        assert max(abs(curve[step] - expected[step]) for step in expected) < 1e-5, shape
        assert max(float((tensor - averaged[name]).abs().max()) for name, tensor in tensors.items()) < 1e-5, shape


def test_a_stage_exports_the_average_where_one_is_kept(still: Run, tmp_path: Path) -> None:
    """The average of the weights, that is."""
    plain = copy_run(still, str(tmp_path / "plain"), **FLOAT32)
    kept = copy_run(still, str(tmp_path / "kept"), **FLOAT32, pretrain={"ema_decay": 0.9})
    for run in (plain, kept):
        run_workers(train_worker, 2, pretraining(run))
    assert losses(plain) == losses(kept), "keeping an average must not change the training"
    assert any(not torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(kept).items())
    last = events(kept, "heldout")[-1]
    assert last["nll_ema"] != last["nll_random"]


def test_a_killed_run_resumes_and_ends_with_the_same_model(prepared: Run, undisturbed: Run, tmp_path: Path) -> None:
    """They are killed in the sixth step, which never ends: ten steps might be over before anybody kills."""
    run = copy_run(prepared, str(tmp_path))
    job = pretraining(run)
    workers = start_workers(stuck, 2, job, 5)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not os.path.exists(join(job.checkpoints, "step-00000003", "COMMITTED")):
        time.sleep(0.02)
    for worker in workers:
        worker.kill()
        worker.join()
    run_workers(train_worker, 2, job)

    assert [event["start_step"] for event in events(run, "start")] == [0, 3]
    assert losses(run) == losses(undisturbed)
    expected = weights(undisturbed)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, expected[name]), name


def test_five_steps_and_a_signal_and_five_steps_are_ten_steps(prepared: Run, undisturbed: Run, tmp_path: Path) -> None:
    """SIGTERM at one rank: all save what they have, and leave with the code that asks to be started again."""
    run = copy_run(prepared, str(tmp_path))
    workers = start_workers(leaves_at, 2, pretraining(run), 4)
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [75, 75]
    assert committed_steps(pretraining(run).checkpoints)[-1] == 5
    assert [(event["step"], event["reason"]) for event in events(run, "stopping")] == [(5, "SIGTERM")]
    run_workers(train_worker, 2, pretraining(run))
    assert losses(run) == losses(undisturbed)


def leaves_with_a_slow_storage(job: TrainingJob, folder: str) -> None:
    """SIGTERM at rank 1 after the second step; rank 0 takes a while to commit. Each notes what is committed when it leaves."""
    from oar_scale.distributed.checkpoints import layout

    commit = layout.commit

    def slow(*args: Any) -> None:
        time.sleep(2)
        commit(*args)

    layout.commit = slow
    try:
        train_worker(job, left_at=1)
    finally:
        Path(folder, f"committed-{os.environ['RANK']}").write_text(json.dumps(committed_steps(job.checkpoints)))


def test_no_worker_leaves_before_the_last_checkpoint_is_committed(prepared: Run, tmp_path: Path) -> None:
    """Ray Train kills the others as soon as one has left."""
    run = copy_run(prepared, str(tmp_path / "run"), pretrain={"checkpoint_every": 100})
    workers = start_workers(leaves_with_a_slow_storage, 2, pretraining(run), str(tmp_path))
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [75, 75]
    assert [json.loads((tmp_path / f"committed-{rank}").read_text()) for rank in (0, 1)] == [[2], [2]]


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_batch_without_a_finite_gradient_is_skipped_and_named(prepared: Run, tmp_path: Path, zero_stage: int) -> None:
    parallel = {"precision": "fp32" if zero_stage == 0 else "bf16", "zero_stage": zero_stage}
    run = copy_run(prepared, str(tmp_path), parallel=parallel)
    run_workers(poisoned_at, 2, pretraining(run), (3, 7))
    emitted = events(run, "non_finite")
    assert [event["step"] for event in emitted] == [4, 8]
    assert all(len(event["uids"]) == 4 for event in emitted), "the samples of the rank whose loss it was"
    assert all(loss is not None for step, loss in losses(run).items() if step not in (4, 8))
    assert losses(run)[10] < losses(run)[1] - 0.05
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


def test_too_many_such_batches_end_the_stage(prepared: Run, tmp_path: Path) -> None:
    run = copy_run(prepared, str(tmp_path), pretrain={"max_non_finite": 1})
    workers = start_workers(poisoned_at, 2, pretraining(run), (3, 4, 5))
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [1, 1]
    assert len(events(run, "non_finite")) == 2


def test_a_spike_is_rolled_back_and_its_batches_are_skipped(prepared: Run, tmp_path: Path) -> None:
    """A leap uphill at step 27 spoils what follows; with the guard the run goes back and past it."""
    training = {"steps": 36, "spike_guard": "rollback", "checkpoint_every": 5, "evaluate_every": 100}
    run = copy_run(prepared, str(tmp_path), pretrain=training)
    run_workers(spiked_at, 2, pretraining(run), (26,))
    ((_, first), *more) = attempts(run.events, "pretrain")
    written = [json.loads(line) for line in Path(first).read_text().splitlines()]
    (spike,) = (event for event in written if event["kind"] == "spike")
    assert spike["action"] == "rollback" and spike["step"] > 26 and spike["loss"] > spike["expected"] + 0.2
    assert len(more) == 1
    start = events(run, "start")[-1]
    assert start["start_step"] == 25 and start["left_out_batches"] == spike["step"] - 25
    curve = losses(run)
    assert sorted(curve) == list(range(1, 37)) and curve[36] < curve[25]


def test_samples_and_their_orders_are_drawn_while_training(prepared: Run, tmp_path: Path) -> None:
    run = copy_run(prepared, str(tmp_path), pretrain={"steps": 4, "sample_every": 4}, sample={"images": 5})
    run_workers(train_worker, 2, pretraining(run))
    (drawn,) = events(run, "samples")
    assert len(drawn["captions"]) == 6, "as many for each rank"
    for name in ("image", "orders"):
        assert Image.open(run.local(drawn[name])).size == (6 * 96 + 5 * 4, 96)


def test_held_out_likelihood_under_other_orders(prepared: Run, tmp_path: Path) -> None:
    run = copy_run(prepared, str(tmp_path), pretrain={"steps": 4, "evaluate_orders": ["random", "raster", "stored"]})
    run_workers(train_worker, 2, pretraining(run))
    last = events(run, "heldout")[-1]
    assert {"nll_random", "nll_raster", "nll_stored"} <= last.keys()
    assert len({last["nll_random"], last["nll_raster"], last["nll_stored"]}) == 3


def profiled(job: TrainingJob) -> None:
    from dataclasses import replace

    train_worker(replace(job, profile_steps=3))


def test_a_profile_says_where_the_step_goes(prepared: Run, tmp_path: Path) -> None:
    run = copy_run(prepared, str(tmp_path))
    run_workers(profiled, 2, pretraining(run))
    (emitted,) = events(run, "profile")
    table = Path(emitted["table"]).read_text()
    for part in ("data wait", "forward", "backward, reduction", "optimizer"):
        assert part in table
    assert Path(emitted["trace"]).stat().st_size > 10_000


def stuck(job: TrainingJob, step: int) -> None:
    """Rank 1 sleeps for ever in the middle of a step."""
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine

    one_step = DeepSpeedEngine.train_step

    def step_of(engine: Any, batch: Any, lr: float, seeds: Any) -> Any:
        if batch.step == step and os.environ["RANK"] == "1":
            time.sleep(1000)
        return one_step(engine, batch, lr, seeds)

    DeepSpeedEngine.train_step = step_of  # type: ignore[method-assign]
    train_worker(job)


def test_hung_workers_write_their_stacks_and_exit(prepared: Run, tmp_path: Path) -> None:
    run = copy_run(prepared, str(tmp_path), parallel={"hang_timeout_s": 20})  # nothing else takes so long, not on a busy machine either
    workers = start_workers(stuck, 2, pretraining(run), 4)
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [70, 70]
    stacks = [Path(run.local("logs", f"pretrain-rank{rank}.stacks")).read_text() for rank in (0, 1)]
    assert all("nothing moved for 20 s" in text and "step 5" in text for text in stacks)
    assert "step_of" in stacks[1] and "in train_step" in stacks[0]
    recorded = [json.loads(Path(run.local("logs", f"pretrain-rank{rank}.collectives.json")).read_text()) for rank in (0, 1)]
    waiting, stuck_one = ([entry["state"] for entry in each["entries"]] for each in recorded)
    assert len(waiting) > len(stuck_one) > 0 and waiting[-1] != "completed"


def hangs(job: TrainingJob) -> None:
    from oar_scale.distributed.worker_process import WorkerProcess

    with WorkerProcess(job):
        time.sleep(20)


def test_a_hung_worker_ends_where_its_stacks_cannot_be_written(prepared: Run, tmp_path: Path) -> None:
    """A full disk may be why it hangs; one that stayed would hold its GPU, and all others."""
    run = copy_run(prepared, str(tmp_path), parallel={"hang_timeout_s": 1})
    Path(run.local("logs")).write_text("no folder")
    (worker,) = start_workers(hangs, 1, pretraining(run))
    worker.join(600)
    assert worker.exitcode == 70


def test_learning_rate_warms_up_and_decays_to_its_floor() -> None:
    config = small_recipe("unused").pretrain
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert rates[0] == config.lr / 2 and rates[1] == config.lr == max(rates)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert learning_rate(config, config.steps) == pytest.approx(config.lr * config.final_lr_fraction)


def test_a_linear_tail_is_constant_until_it_falls() -> None:
    config = small_recipe("unused", pretrain={"steps": 100, "schedule": "linear_tail", "tail_fraction": 0.2}).pretrain
    rates = [learning_rate(config, step) for step in range(101)]
    assert set(rates[2:81]) == {config.lr}
    assert rates[80:] == pytest.approx([config.lr * (1 - 0.95 * part / 20) for part in range(21)])
