"""The engine with DeepSpeed ZeRO: optimizer state, gradients and parameters sharded over the workers, as ``parallel.zero_stage`` says.

ZeRO-3 builds the model sharded: no process ever holds more than one parameter whole, but for :meth:`DeepSpeedEngine.plain_model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.profiler import record_function

from oar_scale.config.deepspeed import deepspeed_config
from oar_scale.data.stream import Batch
from oar_scale.distributed.checkpoints.deepspeed_types import ShardedEngine
from oar_scale.distributed.deepspeed_optimizer import DeepSpeedAdamW
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.model import AnyOrderModel, ModelSpec, check_prompts
from oar_scale.model.acceleration import accelerate
from oar_scale.model.weights import load_model, model_of, open_model, read_spec
from oar_scale.storage import fetch
from oar_scale.tokenizers.prompts import PromptEncoder
from oar_scale.tokenizers.safetensors_file import file_damage
from oar_scale.training.engine import Objective, StepResult, Stopwatch, micro_batches
from oar_scale.training.job import TrainingJob
from oar_scale.training.optimizer import AVERAGE, parameter_groups
from oar_scale.training.process import TrainingProcess


class DeepSpeedEngine:
    """Implements :class:`~oar_scale.training.engine.Engine`. Making one is collective.

    Attributes:
        deepspeed: DeepSpeed's own engine, for what it alone can do: saving and loading its shards.
    """

    def __init__(self, job: TrainingJob, prompts: PromptEncoder, process: TrainingProcess) -> None:
        """Load the job's first weights. Raises UserError where their prompts are not those of ``prompts``."""
        import deepspeed

        config = deepspeed_config(job.recipe.parallel, job.training, process.world)
        objective = Objective(_initial_model(job, prompts, config, process), prompts, job.training.group_steps)
        accelerate(objective.model, job.recipe.parallel)
        optimizer = DeepSpeedAdamW(
            parameter_groups(objective, job.training.weight_decay),
            lr=job.training.lr,
            betas=job.training.betas,
            ema_decay=job.training.ema_decay,
            clip_norm=None if job.recipe.parallel.zero_stage else job.training.clip_norm,  # ZeRO clips by itself
        )
        self.deepspeed: ShardedEngine
        self.deepspeed, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
        optimizer.armed = True
        self.model: AnyOrderModel = objective.model
        self._zero_stage: int = job.recipe.parallel.zero_stage
        self._micro_batch, self._device = job.recipe.parallel.micro_batch, process.device

    @property
    def spec(self) -> ModelSpec:
        """The model's sizes."""
        return self.model.spec

    @property
    def parameters(self) -> int:
        """The model's number of parameters, over all ranks."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())

    def train_step(self, batch: Batch, lr: float, seeds: Sequence[int] = ()) -> StepResult:
        """Take one optimizer step; see :meth:`Engine.train_step`. DeepSpeed steps at the last micro-batch."""
        engine = self.deepspeed
        engine.train()
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        losses, quarters, watch = [], [], Stopwatch(self._device)
        for inputs in micro_batches(batch, self._micro_batch, self._device, seeds):
            with record_function("oar::forward"), watch.running():
                loss, quarters_4 = engine(*inputs)
            with record_function("oar::backward, reduction"):
                engine.backward(loss)
            with record_function("oar::optimizer"):
                engine.step()
            losses.append(loss.detach().float())
            quarters.append(quarters_4.float())
        return StepResult.of(losses, quarters, engine.get_global_grad_norm(), watch)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the weights' moving average in their place; see :meth:`Engine.averaged`."""
        _swap(self.deepspeed)
        try:
            yield
        finally:
            _swap(self.deepspeed)

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's parameters by name, each gathered while it is looked at."""
        import deepspeed

        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]) if self._zero_stage == 3 else nullcontext():
                yield name, parameter.detach()

    def plain_model(self) -> AnyOrderModel:
        """Return the model in eval mode: itself, or under ZeRO-3 a whole copy on every rank."""
        if self._zero_stage < 3:
            return self.model.eval()
        return model_of(self.spec, {name: tensor.clone() for name, tensor in self.whole_weights()}, "the training's own weights")

    def destroy(self) -> None:
        """Give back DeepSpeed's buffers and hooks."""
        self.deepspeed.destroy()


def _initial_model(job: TrainingJob, prompts: PromptEncoder, config: JsonObject, process: TrainingProcess) -> AnyOrderModel:
    """The stage's first weights; under ZeRO-3 each parameter is sharded as soon as it is made, and filled from the file by rank 0."""
    import deepspeed

    spec = read_spec(job.start_from)
    check_prompts(spec, prompts, job.start_from)
    if job.recipe.parallel.zero_stage < 3:
        return load_model(job.start_from)
    path = fetch(job.start_from, job.cache) if process.rank == 0 else None
    damage = process.gather(file_damage(path) if path else None)[0]
    if damage:
        raise UserError(damage)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = AnyOrderModel(spec)
    stored = open_model(path)[1] if path else None
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if stored is not None:
                parameter.copy_(stored.read(name))
    return model


@torch.no_grad()
def _swap(engine: ShardedEngine) -> None:
    """Exchange the float32 weights with their average, and make the weights that the model computes with from them."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    base = zero.optimizer if stage else zero
    if stage == 3:
        flats = zero.fp32_partitioned_groups_flat
        zero._partition_all_parameters()  # a parameter that is gathered at this moment would keep its old values
    else:
        flats = zero.single_partition_of_fp32_groups if stage else list(base.state)
    # Before the first step there is no state yet, and the average is the weights.
    for flat in (flat for flat in flats if base.state.get(flat)):
        average = base.state[flat][AVERAGE]
        kept = flat.detach().clone()
        flat.copy_(average)
        average.copy_(kept)
    if stage == 3:
        for number in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.invalidate_secondary_tensor()  # hpZ gathers from copies within the node, which are of the weights before
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif stage:
        zero.update_lp_params()
