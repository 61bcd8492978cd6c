"""The model as DeepSpeed trains it: objective, engine, one optimiser step; its weights put together again.

    engine = make_engine(job, prompts, world)
    done = train_step(engine, batch, lr, micro_batch, device)
    with averaged(engine): ...                     the weights' moving average in the place of the weights
    for name, tensor in whole_weights(engine): ... one parameter at a time, whole, on every rank
    model = plain_model(engine)                    all of them at once

ZeRO-3 builds the model in pieces: no process ever holds more than one parameter whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.profiler import record_function

from oar_scale.config.deepspeed import deepspeed_config
from oar_scale.data.stream import Batch
from oar_scale.model import AnyOrderModel, check_prompts
from oar_scale.model.acceleration import accelerate
from oar_scale.model.weights import load_model, model_of, read_spec
from oar_scale.storage import fetch
from oar_scale.tokenizers.prompts import PromptEncoder, model_inputs
from oar_scale.training.job import TrainingJob
from oar_scale.training.optimizer import AVERAGE, SteadyAdamW

QUARTERS = 4


class Objective(nn.Module):
    """The training loss as a module: mean negative log-likelihood of a micro-batch, and of each quarter of the order, in nats per code."""

    def __init__(self, model: AnyOrderModel, prompts: PromptEncoder) -> None:
        super().__init__()
        self.model, self.prompts = model, prompts

    def forward(self, codes_bN: Tensor, order_bN: Tensor, prompts_b: Tensor, drop_b: Tensor) -> tuple[Tensor, Tensor]:
        condition_bTD = self.model.condition(model_inputs(self.prompts, prompts_b), drop_b)
        loss, nll_bN = self.model.loss(codes_bN, order_bN, condition_bTD)
        return loss, torch.stack([part.mean() for part in nll_bN.detach().tensor_split(QUARTERS, dim=1)])


@dataclass(frozen=True)
class StepDone:
    """One optimiser step, as this rank saw it."""

    loss: float
    quarters: Tensor
    """Mean loss of the first to the last quarter of the generation order [4]."""
    grad_norm: float
    """Before clipping, over all ranks and parameters; not finite where the step was left out."""

    @property
    def left_out(self) -> bool:
        return not math.isfinite(self.grad_norm)


def make_engine(job: TrainingJob, prompts: PromptEncoder, world: int) -> Any:
    """The DeepSpeed engine around the stage's model. Collective.

    Matrices decay, vectors and embeddings do not.
    """
    import deepspeed

    config = deepspeed_config(job.recipe.parallel, job.training, world)
    objective = Objective(_model(job, prompts, config), prompts)
    accelerate(objective.model, job.recipe.parallel)
    decaying = {id(m.weight) for m in objective.modules() if isinstance(m, nn.Linear)}
    trained = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in decaying], "weight_decay": job.training.weight_decay},
        {"params": [p for p in trained if id(p) not in decaying], "weight_decay": 0.0},
    ]
    clip_norm = None if job.recipe.parallel.zero_stage else job.training.clip_norm
    optimizer = SteadyAdamW(groups, lr=job.training.lr, betas=job.training.betas, ema_decay=job.training.ema_decay, clip_norm=clip_norm)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    optimizer.armed = True
    return engine


def _model(job: TrainingJob, prompts: PromptEncoder, config: dict[str, Any]) -> AnyOrderModel:
    """The stage's first weights; under ZeRO-3 each parameter is cut up as soon as it is made, and filled from the file by rank 0."""
    import deepspeed

    spec = read_spec(job.start_from)
    check_prompts(spec, prompts, job.start_from)
    if job.recipe.parallel.zero_stage < 3:
        return load_model(job.start_from)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = AnyOrderModel(spec)
    file = safe_open(fetch(job.start_from, job.cache), "pt") if dist.get_rank() == 0 else None
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if file is not None:
                parameter.copy_(file.get_tensor(name))  # type: ignore[no-untyped-call]
    return model


def train_step(engine: Any, batch: Batch, lr: float, micro_batch: int, device: torch.device) -> StepDone:
    """One optimiser step over this rank's share of the global batch."""
    engine.train()
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    losses, quarters, order_bN = [], [], batch.orders(device)
    for start in range(0, len(batch.codes_bN), micro_batch):
        part = slice(start, start + micro_batch)
        with record_function("oar::forward"):
            loss, quarters_4 = engine(*(t[part].to(device) for t in (batch.codes_bN, order_bN, batch.prompts_b, batch.drop_b)))
        with record_function("oar::backward, reduction"):
            engine.backward(loss)
        with record_function("oar::optimiser"):
            engine.step()
        losses.append(loss.detach().float())
        quarters.append(quarters_4.float())
    return StepDone(float(torch.stack(losses).mean()), torch.stack(quarters).mean(0), float(engine.get_global_grad_norm()))


@contextmanager
def averaged(engine: Any) -> Iterator[None]:
    """The moving average of the weights in their place, for evaluation and export. Collective; the weights come back bit for bit."""
    _swap(engine)
    try:
        yield
    finally:
        _swap(engine)


def _swap(engine: Any) -> None:
    """Exchange the float32 weights with their average, and make the weights that the model computes with from them."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    base = zero.optimizer if stage else zero
    if stage == 3:
        flats = zero.fp32_partitioned_groups_flat
    else:
        flats = zero.single_partition_of_fp32_groups if stage else list(base.state)
    with torch.no_grad():
        if stage == 3:
            zero._partition_all_parameters()  # what is whole at this moment would stay as it is
        # Before the first step there is no state yet, and the average is the weights.
        for flat in (flat for flat in flats if base.state.get(flat)):
            average = base.state[flat][AVERAGE]
            kept = flat.detach().clone()
            flat.copy_(average)
            average.copy_(kept)
        if stage == 3:
            for number in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(number)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        elif stage:
            zero.update_lp_params()


def whole_weights(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters by name, each whole while it is looked at. Collective: every rank walks through all of them."""
    import deepspeed

    partitioned = engine.zero_optimization_stage() == 3
    for name, parameter in engine.module.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]) if partitioned else nullcontext():
            yield name, parameter.detach()


def plain_model(engine: Any) -> AnyOrderModel:
    """The model as a plain one, in eval mode: itself, or under ZeRO-3 a whole copy on every rank. Collective."""
    model: AnyOrderModel = engine.module.model
    if engine.zero_optimization_stage() < 3:
        return model.eval()
    return model_of(model.spec, {name: tensor.clone() for name, tensor in whole_weights(engine)}, "the training's own weights")
