"""A training goes on from its checkpoint with other settings: they hold from there on, and they are logged."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launcher import run_workers, start_workers
from small_run import copy_run, prepare_small_run, pretraining, small_recipe
from small_training import note, noted, rooted, tiny_recipe, training, with_stage

from oar_scale.distributed.checkpoints import Restored, Saver, restore
from oar_scale.distributed.worker import _resume, train
from oar_scale.observe.events import read_events
from oar_scale.run.context import Run
from oar_scale.storage import join
from oar_scale.training.callbacks.stability import Stability
from oar_scale.training.job import TrainingJob

CHANGED = {"weight_decay": 0.4, "clip_norm": 0.25, "lr": 1e-4}


def seen_by_train(job: TrainingJob, poisoned: tuple[int, ...]) -> None:
    """The worker as it is; each step's uids are noted, and some gradients are infinite."""
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine

    one_step = DeepSpeedEngine.train_step

    def step(engine: Any, batch: Any, lr: float, seeds: Any) -> Any:
        handle = None
        if batch.step in poisoned:
            handle = engine.model.norm.register_forward_hook(lambda module, inputs, output: output * float("inf"))
        result = one_step(engine, batch, lr, seeds)
        if handle is not None:
            handle.remove()
        note_uids(job, batch)
        return result

    DeepSpeedEngine.train_step = step  # type: ignore[method-assign]
    train(job)


def note_uids(job: TrainingJob, batch: Any) -> None:
    with open(join(job.local, f"uids-{os.environ['RANK']}.jsonl"), "a") as file:
        file.write(json.dumps([batch.step, batch.uid_b.tolist()]) + "\n")


def uids(run: Run) -> list[int]:
    """The samples of all steps, of both ranks."""
    lines = [json.loads(line) for rank in (0, 1) for line in Path(run.local(f"uids-{rank}.jsonl")).read_text().splitlines()]
    return [uid for _, batch in lines for uid in batch]


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run.events, "pretrain") if event["kind"] == kind]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare_small_run(small_recipe(str(tmp_path_factory.mktemp("prepared"))))


def test_a_finished_training_goes_on_with_other_settings(prepared: Run, tmp_path: Path) -> None:
    """More steps, another rate, other streams. Three steps and the next ones are one epoch, in which no sample comes twice."""
    first = copy_run(prepared, str(tmp_path), pretrain={"steps": 3})
    run_workers(seen_by_train, 2, pretraining(first), ())
    data = {**first.recipe.data.model_dump(), "canonical_streams": 2}
    changes = {"schedule": "constant", **CHANGED}
    parallel = {**first.recipe.parallel.model_dump(), "gradient_dtype": "fp32"}
    longer = copy_run(prepared, str(tmp_path), pretrain={"steps": 7, **changes}, data=data, parallel=parallel)
    run_workers(seen_by_train, 2, pretraining(longer), ())
    assert [event["start_step"] for event in events(longer, "start")] == [0, 3]
    (changed,) = events(longer, "settings_changed")
    assert changed["step"] == 3
    assert changed["changes"] == {
        "data.canonical_streams": {"was": 4, "is": 2},
        "parallel.gradient_dtype": {"was": "bf16", "is": "fp32"},
        "pretrain.clip_norm": {"was": 1.0, "is": 0.25},
        "pretrain.lr": {"was": 1e-3, "is": 1e-4},
        "pretrain.schedule": {"was": "cosine", "is": "constant"},
        "pretrain.steps": {"was": 3, "is": 7},
        "pretrain.weight_decay": {"was": 0.05, "is": 0.4},
    }
    assert {event["lr"] for event in events(longer, "train") if event["step"] > 3} == {1e-4}
    taken = uids(longer)
    assert len(taken) == 56 and len(set(taken)) == 56, "other streams must repeat none"
    longest = copy_run(prepared, str(tmp_path), pretrain={"steps": 8, **changes}, data=data, parallel=parallel)
    run_workers(seen_by_train, 2, pretraining(longest), ())
    assert len(set(uids(longest))) == len(uids(longest)) == 64, "its checkpoint has to know that the streams were others once"


def test_a_raised_limit_gets_a_stopped_training_past(prepared: Run, tmp_path: Path) -> None:
    """The stream is deterministic: the same batches fail again, and the count of them is in the checkpoint."""
    run = copy_run(prepared, str(tmp_path), pretrain={"max_non_finite": 1, "checkpoint_every": 1})
    workers = start_workers(seen_by_train, 2, pretraining(run), (5, 6, 8))
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [1, 1]
    raised = copy_run(prepared, str(tmp_path), pretrain={"max_non_finite": 3, "checkpoint_every": 1})
    run_workers(seen_by_train, 2, pretraining(raised), (5, 6, 8))
    assert [event["step"] for event in events(raised, "non_finite")] == [6, 7, 9]
    assert 0 < events(raised, "start")[-1]["start_step"] <= 6, "the last save may have been under way when the workers ended"
    assert events(raised, "end")
    assert events(raised, "settings_changed")[0]["changes"] == {"pretrain.max_non_finite": {"was": 1, "is": 3}}


@pytest.mark.parametrize(
    ("changed", "count"),
    [({"pretrain.lr": (1e-3, 1e-4)}, 0), ({"pretrain.max_non_finite": (1, 9)}, 7), ({"data.max_bad_fraction": (0.01, 1)}, 7)],
)
def test_skipped_batches_are_counted_anew_under_a_lower_rate(prepared: Run, changed: dict[str, tuple[object, object]], count: int) -> None:
    """Which so gets a training past that had as many of them as it may; a limit says how many all of them may be."""
    stability, state = Stability(), {"left_out_batches": 0, "stability": {"losses": [], "non_finite": 7}}
    restored = Restored(3, "", state, (4, 2), changed, (), converted=False, world_size=1, zero_stage=2, seconds=0.0)
    loop = SimpleNamespace(job=pretraining(prepared), events=None)
    _resume(loop, restored, {"stability": stability}, None)  # type: ignore[arg-type]
    assert stability.state()["non_finite"] == count


def optimizer_settings(job: TrainingJob, out: str) -> None:
    """Under each ZeRO stage a checkpoint of one step; then an engine with other settings, which loads it."""
    with training(job, 1) as trainer:
        for stage in (0, 1, 2, 3):
            here = with_stage(job, stage, root=rooted(job, str(stage)))
            train = trainer(here)
            train.losses(0, 1)
            saver = Saver(here)
            saver.save(train.engine, 1, {})
            saver.finish(60)
            recipe = here.recipe.model_copy(update={"pretrain": here.recipe.pretrain.model_copy(update=CHANGED)})
            other = replace(here, recipe=recipe)
            resumed = trainer(other)
            restored = restore(resumed.engine, other)
            assert restored is not None and not restored.converted
            decays = [group["weight_decay"] for group in resumed.engine.optimizer.param_groups]
            clip = getattr(resumed.engine.optimizer, "clip_grad" if stage else "clip_norm")
            note(out, str(stage), {"decays": decays, "clip": clip})


def test_a_load_leaves_the_optimizer_its_own_settings(tmp_path: Path) -> None:
    """Under each ZeRO stage; DeepSpeed and torch load the decay of the checkpoint with the moments."""
    job = pretraining(prepare_small_run(tiny_recipe(str(tmp_path / "run"))))
    run_workers(optimizer_settings, 1, job, str(tmp_path))
    for stage in ("0", "1", "2", "3"):
        assert noted(str(tmp_path), stage) == {"decays": [0.4, 0.0], "clip": 0.25}, stage
