"""Read DeepSpeed's shards as whole parameters: their float32 weights and moments, one tensor at a time.

Each ZeRO stage partitions them in its own way:

    0       rank 0 has every parameter whole; the optimizer's state numbers them in the order of its groups
    1, 2    the parameters of a group are flattened and concatenated, and that vector is split evenly over the ranks
    3       each parameter is flattened and split evenly over the ranks; the last parts are padded

    shards = read_shards(checkpoint.folder, names)      # opens the files; tensors stay on the disk
    shards.whole("model.head.weight", "exp_avg")        # concatenated on access

``weights`` is the name of the float32 weights here; the moments have the optimizer's own names.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from oar_scale.distributed.checkpoints.deepspeed_types import StateDict
from oar_scale.distributed.checkpoints.layout import SHARD
from oar_scale.distributed.checkpoints.shard_keys import COUNTERS, GROUPS, WEIGHTS
from oar_scale.errors import UserError

_NAME = re.compile(r"\w+(?:\.\w+)*", re.ASCII)


@dataclass(frozen=True)
class _Slice:
    """A range of a parameter's values, at the same position in its weights and in each moment."""

    flat: Mapping[str, Tensor]
    start: int
    count: int

    def values(self, what: str) -> Tensor:
        return self.flat[what].detach().view(-1).narrow(0, self.start, self.count)


@dataclass
class Shards:
    """Everything that a checkpoint holds of a model and its optimizer; tensors stay on the disk until they are accessed."""

    step: float = 0.0
    """The optimizer's own step count, which does not include skipped steps."""
    counters: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    moments: tuple[str, ...] = ()
    untrained: dict[str, Tensor] = field(default_factory=dict)
    """Buffers, and parameters that are not trained."""
    _slices: dict[str, list[_Slice]] = field(default_factory=dict)

    def whole(self, name: str, what: str) -> Tensor:
        """A parameter's ``weights`` or one of its moments: float32, on the CPU."""
        slices = [part.values(what) for part in self._slices[name]]
        return (torch.cat(slices) if len(slices) > 1 else slices[0]).view(self.shapes[name])

    def _add(self, name: str, flat: Mapping[str, Tensor], start: int, count: int) -> None:
        if count > 0:
            self._slices.setdefault(name, []).append(_Slice(flat, start, count))

    def _take_state(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        state = states[0]
        self.step = float(state["step"])
        self.moments = tuple(sorted(name for name, value in state.items() if name != "step" and torch.is_tensor(value)))


def read_shards(folder: str, names: Iterable[str]) -> Shards:
    """Open the files ``names`` of a checkpoint in a local folder, whose checksums have been verified.

    Raises:
        UserError: a file asks for code to be run, or the files do not make up whole parameters.
    """
    from oar_scale.distributed.checkpoints.deepspeed_files import load_shard

    names = list(names)
    models, optimizers = (
        [load_shard(os.path.join(folder, name), mmap=True) for name in _by_rank(names, kind)] for kind in ("model", "optim")
    )
    try:
        shards = _read(models, optimizers)
        _check(shards)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{folder}: these are not the files of a checkpoint ({error!r}). Use another checkpoint.") from error
    return shards


def _read(models: list[StateDict], optimizers: list[StateDict]) -> Shards:
    states = [optimizer["optimizer_state_dict"] for optimizer in optimizers]
    shards = Shards(counters={name: int(models[0][name]) for name in COUNTERS})
    if not states:
        _read_zero_0(shards, models[0])
    elif int(states[0]["zero_stage"]) < 3:
        _read_zero_1_2(shards, models[0], states)
    else:
        _read_zero_3(shards, models, states)
    return shards


def _check(shards: Shards) -> None:
    """Raise ValueError where parameters are not whole, or a name could not be that of a file: ``convert`` makes files of them."""
    for name in (*shards.shapes, *shards._slices, *shards.untrained, *shards.moments):
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ValueError(f"{name!r} is not the name of a parameter")
    for name, shape in shards.shapes.items():
        count = sum(part.count for part in shards._slices.get(name, ()))
        if count != shape.numel():
            raise ValueError(f"the shards hold {count} values of {name}, which has {shape.numel()}")
        for part in shards._slices.get(name, ()):
            for what in (WEIGHTS, *shards.moments):
                part.values(what)  # raises where the tensor is too short; nothing is copied


def _read_zero_0(shards: Shards, model: StateDict) -> None:
    """ZeRO 0: rank 0 has everything."""
    states = model["optimizer"]["state"]
    shards._take_state(states)
    for number, name in enumerate(name for group in model[GROUPS] for name in group):
        weights = model["module"][name]
        state = states.get(number) or dict.fromkeys(shards.moments, torch.zeros_like(weights))  # it has never had a gradient
        shards.shapes[name] = weights.shape
        shards._add(name, {WEIGHTS: weights, **state}, 0, weights.numel())
    shards.untrained = {name: tensor for name, tensor in model["module"].items() if name not in shards.shapes}


def _read_zero_1_2(shards: Shards, model: StateDict, ranks: list[StateDict]) -> None:
    """ZeRO 1 and 2: each rank has a part of each group's concatenated parameters."""
    shards.shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    for rank in ranks:
        states = rank["base_optimizer_state"]["state"]
        shards._take_state(states)
        groups = zip(rank["single_partition_of_fp32_groups"], rank["param_slice_mappings"], strict=True)
        for group, (weights, slices) in enumerate(groups):
            for name, address in slices.items():
                shards._add(name, {WEIGHTS: weights, **states[group]}, address.start, address.numel)
    shards.untrained = {name: tensor for name, tensor in model["module"].items() if name not in shards.shapes}


def _read_zero_3(shards: Shards, models: list[StateDict], ranks: list[StateDict]) -> None:
    """ZeRO 3: each rank has a part of each parameter."""
    model = models[0]
    shards.shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    for number, rank in enumerate(ranks):
        states = rank["optimizer_state_dict"]["state"]
        shards._take_state(states)
        for group, (weights, shapes) in enumerate(zip(rank["fp32_flat_groups"], model["param_shapes"], strict=True)):
            start = 0
            for name, shape in shapes.items():
                part = math.ceil(shape.numel() / len(ranks))
                shards._add(name, {WEIGHTS: weights, **states[group]}, start, min(part, shape.numel() - number * part))
                start += part
    shards.untrained = {name: model["module"][name] for name in model["buffer_names"]}
    for name, shape in (model["frozen_param_shapes"] or {}).items():
        fragments = torch.cat([each["frozen_param_fragments"][name].view(-1) for each in models])
        shards.untrained[name] = fragments[: shape.numel()].view(shape)


def _by_rank(names: Iterable[str], kind: str) -> list[str]:
    """The files of a kind (``model`` or ``optim``), in the order of the ranks that wrote them."""
    matches = [match for name in names if (match := SHARD.fullmatch(name)) and match["kind"] == kind]
    return [match[0] for match in sorted(matches, key=lambda match: int(match["rank"] or 0))]
