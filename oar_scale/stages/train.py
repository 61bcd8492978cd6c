"""Stages ``pretrain``, ``finetune`` and ``control``, and those of arms and seeds: the same worker on other orders."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from oar_scale.data.manifest import read_manifest
from oar_scale.distributed.checkpoints import committed_steps
from oar_scale.distributed.ray_train import run_training
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.model import ModelSpec
from oar_scale.model.spec import condition_spec
from oar_scale.model.weights import fresh_weights, meta_model, open_model, read_spec, save_tensors
from oar_scale.run.artifacts import prompt_encoder
from oar_scale.run.context import Run
from oar_scale.storage import open_storage
from oar_scale.storage.patience import patient
from oar_scale.training.inputs import job_orders
from oar_scale.training.job import TrainingJob


def run_train(run: Run, name: str) -> JsonObject:
    """Train one stage with Ray and DeepSpeed; the result is exported to ``models/``."""
    if not run.rank:
        _warn_of_slow_bf16(run)
    with patient(run.recipe.storage.patience_s):
        if name == "pretrain" and run.rank == 0:
            write_base(run)
        if name == "pretrain" and not run.recipe.pretrain.steps:
            return _take_weights(run)
        stage = run.recipe.stage(name)
        assert stage.model is not None
        start_from, result = run.model_uri("base" if name == "pretrain" else "any_order"), run.model_uri(stage.model)
        job = TrainingJob(run.recipe.of(stage), name, run.at(), run.local(), start_from, result, run.profile_steps, stage.orders)
        if not run.rank:  # under torchrun the others reach what it writes when they have met it in the process group
            _ = job.start_id  # here, and not at every worker: the whole file is read
            job_orders(job)  # an order policy's errors are raised, and the mean order is computed once, before there are workers
    return run_training(job, run.console)


def _warn_of_slow_bf16(run: Run) -> None:
    """Say so where the workers are CPUs like this one, and such a CPU has no instructions for bfloat16 products."""
    parallel = run.recipe.parallel
    if parallel.precision == "bf16" and not parallel.gpus_per_worker and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        run.console.say(
            "  this CPU has no instructions for bfloat16, and takes several times as long in it as in float32: "
            "-o parallel.precision=fp32 -o run_dir=..."
        )


def write_base(run: Run) -> None:
    """The model that pretraining starts with: the recipe's weights, or a fresh one."""
    recipe, manifest = run.recipe, read_manifest(run.at("tokens", "train"))
    assert manifest.vocab_size is not None and manifest.grid is not None
    condition = condition_spec(prompt_encoder(run), encoder_layers=recipe.model.text_encoder_layers)
    spec = ModelSpec.from_recipe(recipe.model, vocab_size=manifest.vocab_size, grid=manifest.grid, condition=condition)
    if recipe.model.weights is None:
        base = run.model_uri("base")
        if open_storage(base).exists(base) and read_spec(base) == spec and committed_steps(run.at("checkpoints", "pretrain")):
            return  # what its checkpoints began with: another CPU, or version of torch, would draw others from the same seed
        torch.manual_seed(recipe.seed)
        _save_base(run, spec, fresh_weights(spec))
        return
    given, stored = open_model(recipe.model.weights)
    kept = given.model_copy(update={"dropout": spec.dropout})
    here, wanted = (_comparable(each) for each in (kept, spec))
    for field in {**wanted, **here}:
        if here.get(field) != wanted.get(field):
            raise UserError(
                f"model.weights {recipe.model.weights}: has {field} {here.get(field)}, "
                f"the recipe and its tokenizers make {wanted.get(field)}.\n"
                "Set the model section to the weights' sizes and use the tokenizers they were trained with, or start anew (weights: null)."
            )
    _save_base(run, kept, stored)


def _save_base(run: Run, spec: ModelSpec, tensors: Iterable[tuple[str, Tensor]]) -> None:
    save_tensors(run.model_uri("base"), spec, tensors, scratch=run.scratch)


def _take_weights(run: Run) -> JsonObject:
    """No pretraining: the recipe's weights are the any-order model."""
    if run.rank:
        return {}
    spec, stored = open_model(run.model_uri("base"))
    save_tensors(run.model_uri("any_order"), spec, stored, scratch=run.scratch)
    return {"steps": 0, "parameters": sum(parameter.numel() for parameter in meta_model(spec).parameters())}


def _comparable(spec: ModelSpec) -> JsonObject:
    """Fields that a recipe decides about; what an imported peer's weights need besides goes with the weights."""
    plain = spec.model_dump(
        exclude={
            "condition_rotation": True,
            "step_attention": True,
            "trainable_null": True,
            "condition": {"null_rows", "absent"},
        }
    )
    condition = plain.pop("condition")
    return {**plain, **{f"condition.{name}": value for name, value in condition.items()}}
