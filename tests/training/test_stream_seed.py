"""Which samples the stages of a run see, and in which orders."""

from __future__ import annotations

from pathlib import Path

import torch
from small_run import prepare_small_run, small_recipe

from oar_scale.data.stream import Batch
from oar_scale.run.context import Run
from oar_scale.training.inputs import job_prompts, job_stream
from oar_scale.training.job import TrainingJob


def first_batches(run: Run, stage: str, version: int) -> list[Batch]:
    """Of as many images as the pretraining's batch has."""
    job = TrainingJob(run.recipe, stage, run.at(), run.local(), run.model_uri("base"), run.at("result"))
    return list(job_stream(job, job_prompts(job), 0, 1, version).batches(0, 6))


def test_the_control_does_not_replay_the_pretraining(tmp_path: Path) -> None:
    """It did in version 0, sample by sample and order by order; a run that began with it goes on with it."""
    run = prepare_small_run(small_recipe(str(tmp_path), finetune={"order": "random"}))
    assert run.recipe.pretrain.global_batch == run.recipe.finetune.global_batch
    pretrain, old, control, finetune = (
        [(batch.uid_b, batch.orders(torch.device("cpu"))) for batch in first_batches(run, stage, version)]
        for stage, version in (("pretrain", 1), ("control", 0), ("control", 1), ("finetune", 1))
    )
    for (uid_b, order_bN), (old_uid_b, old_order_bN) in zip(pretrain, old, strict=True):
        assert torch.equal(uid_b, old_uid_b) and torch.equal(order_bN, old_order_bN)
    for (uid_b, order_bN), (new_uid_b, new_order_bN) in zip(pretrain, control, strict=True):
        assert not torch.equal(uid_b, new_uid_b) and not torch.equal(order_bN, new_order_bN)
    for (uid_b, _), (ordered_uid_b, _) in zip(control, finetune, strict=True):
        assert torch.equal(uid_b, ordered_uid_b)
