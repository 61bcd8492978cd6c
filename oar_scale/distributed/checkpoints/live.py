"""Read and replace a running engine's weights and moments by parameter, whatever the ZeRO stage.

    live = LiveState(engine)
    live.put("model.head.weight", "exp_avg", whole)     # each rank keeps its part
    live.get("model.head.weight", "exp_avg")            # collective: every rank has the whole

The float32 weights are authoritative; ``refresh`` recomputes the weights in the model's precision from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from oar_scale.distributed.checkpoints.deepspeed_types import ShardedEngine
from oar_scale.distributed.checkpoints.shard_keys import COUNTERS, WEIGHTS


class LiveState:
    """Weights and optimizer state of a running engine. Every rank makes one, of its part of the same engine."""

    def __init__(self, engine: ShardedEngine) -> None:
        self.stage = int(engine.zero_optimization_stage())
        self.parameters: dict[str, Any] = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self._engine, self._zero = engine, engine.optimizer
        self._base: torch.optim.Optimizer = engine.optimizer.optimizer if self.stage else engine.optimizer
        relink(engine)

    def shape(self, name: str) -> torch.Size:
        """The shape of the whole parameter, also where this rank has only a part."""
        parameter = self.parameters[name]
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def prepare(self, moments: tuple[str, ...], step: float) -> None:
        """Create the optimizer's state where it has made no step yet, to be filled by :meth:`put`, and set its step count."""
        if self.stage == 3:
            self._zero.checkpoint_event_prologue()  # so that no parameter stays gathered
        for flat in self._optimized():
            state = self._base.state[flat]
            for name in moments:
                state.setdefault(name, torch.zeros_like(flat))
            state["step"] = torch.tensor(step, dtype=torch.float32, device=flat.device)
        relink(self._engine)

    @torch.no_grad()
    def put(self, name: str, what: str, whole: Tensor) -> None:
        """Replace a parameter's float32 weights, or one of its moments; each rank keeps its part of ``whole``."""
        parameter = self.parameters[name]
        if self.stage == 0:
            (parameter if what == WEIGHTS else self._base.state[parameter][what]).copy_(whole)
        elif self.stage == 3:
            part = _my_part(parameter, whole)
            if what == WEIGHTS:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, what)
        elif what == WEIGHTS:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, what)

    @torch.no_grad()
    def get(self, name: str, what: str) -> Tensor:
        """A parameter's whole float32 weights, or one of its moments, on every rank. Collective."""
        parameter = self.parameters[name]
        if self.stage == 0:
            tensor: Tensor = parameter.detach() if what == WEIGHTS else self._base.state[parameter][what]
            return tensor
        gathered: Tensor = safe_get_full_fp32_param(parameter) if what == WEIGHTS else safe_get_full_optimizer_state(parameter, what)
        return gathered

    def steps(self) -> set[float]:
        """The optimizer's step counts on this rank."""
        return {float(self._base.state[flat]["step"]) for flat in self._optimized()}

    @torch.no_grad()
    def refresh(self, counters: dict[str, int]) -> None:
        """Recompute the weights in the model's precision from the float32 ones, and set DeepSpeed's counters. Collective."""
        for name in COUNTERS:
            setattr(self._engine, name, counters[name])
        if self.stage in (1, 2):
            self._zero.update_lp_params()
        elif self.stage == 3:
            for parameter in self.parameters.values():
                parameter.ds_tensor.copy_(safe_get_local_fp32_param(parameter))
            self._zero.checkpoint_event_epilogue()

    @torch.no_grad()
    def computes_with(self, name: str, whole: Tensor) -> bool:
        """Whether this rank's part of the weights in the model's precision equals the float32 weights ``whole``, rounded."""
        parameter = self.parameters[name]
        if self.stage < 3:
            return torch.equal(parameter, whole.to(parameter.dtype))
        held = parameter.ds_tensor
        return torch.equal(held, _my_part(parameter, whole).to(held.device, held.dtype))

    def _optimized(self) -> Iterator[Tensor]:
        """The tensors that the optimizer steps: parameters under ZeRO 0, otherwise this rank's flat part of each group."""
        if self.stage == 0:
            yield from self.parameters.values()
        else:
            yield from self._zero.fp32_partitioned_groups_flat if self.stage == 3 else self._zero.single_partition_of_fp32_groups


def relink(engine: ShardedEngine) -> None:
    """Let ``deepspeed.utils.safe_get_full_optimizer_state`` find the moments of ZeRO-1 and 2.

    DeepSpeed itself does so once, after the first step of the first parameter group, when the others have no moments yet; and not
    again after a checkpoint was loaded.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _my_part(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's share of a parameter under ZeRO-3, padded as DeepSpeed does."""
    count = parameter.ds_tensor.numel()
    start = min(whole.numel(), count * torch.distributed.get_rank(parameter.ds_process_group))
    mine = whole.reshape(-1)[start : start + count]
    return torch.nn.functional.pad(mine, (0, count - mine.numel()))
