"""Checkpoints by real DeepSpeed engines over gloo: the same numbers after them, whatever stage and number of workers wrote them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from launcher import run_workers
from small_run import prepare_small_run, pretraining
from small_training import note, noted, rooted, tiny_recipe, training, with_stage

from oar_scale.training.checkpoints import Saver, restore
from oar_scale.training.job import TrainingJob

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    return pretraining(prepare_small_run(tiny_recipe(str(tmp_path_factory.mktemp("checkpoints") / "run"))))


def save_all(job: TrainingJob, out: str) -> None:
    """Three steps under each stage, a checkpoint, two more steps."""
    with training(job, 5) as trainer:
        for stage, precision in [(stage, "fp32") for stage in STAGES] + [(stage, "bf16") for stage in (1, 2, 3)]:
            name = f"{precision}-{stage}"
            here = with_stage(job, stage, precision, rooted(job, name))
            train = trainer(here)
            train.losses(0, 3)
            saver = Saver(here)
            saver.save(train.engine, 3, {"metrics": {"nll_random": 4.0}, "note": name})
            outcomes = saver.finish(60)
            note(out, name, {"digest": train.digest(), "next": train.losses(3, 5), "outcomes": [vars(each) for each in outcomes]})


def restore_all(job: TrainingJob, out: str) -> None:
    """Into each stage's engine the checkpoints of all stages: the first one into a fresh engine, the others in the middle of training."""
    with training(job, 5) as trainer:
        for precision, stages in (("fp32", STAGES), ("bf16", (1, 2, 3))):
            for stage in stages:
                train = trainer(with_stage(job, stage, precision))
                for source in [*stages, *stages][stages.index(stage) + 1 :][: len(stages)]:
                    restored = restore(train.engine, with_stage(job, stage, precision, rooted(job, f"{precision}-{source}")))
                    digest = train.digest()
                    note(out, f"{precision}-{source}-to-{stage}", {"digest": digest, "next": train.losses(3, 5), **vars(restored)})


@pytest.fixture(scope="module")
def saved(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("saved"))
    run_workers(save_all, 2, job, out)
    return out


@pytest.fixture(scope="module")
def restored(job: TrainingJob, saved: str) -> str:
    run_workers(restore_all, 2, job, saved)
    return saved


@pytest.mark.parametrize("name", [*(f"fp32-{stage}" for stage in STAGES), "bf16-1", "bf16-2", "bf16-3"])
def test_the_next_losses_after_a_restart_are_the_same_bit_for_bit(restored: str, name: str) -> None:
    before, after = noted(restored, name), noted(restored, f"{name}-to-{name[-1]}")
    assert after["next"] == before["next"] and after["digest"] == before["digest"]
    assert not after["converted"] and after["step"] == 3 and after["state"]["note"] == name


@pytest.mark.parametrize("target", STAGES)
@pytest.mark.parametrize("source", STAGES)
def test_x(restored: str, source: int, target: int) -> None:
    before, after = noted(restored, f"fp32-{source}"), noted(restored, f"fp32-{source}-to-{target}")
    print(before["next"], [a-b for a,b in zip(before["next"], after["next"])], after["digest"]==before["digest"], after["seconds"], before["outcomes"])
