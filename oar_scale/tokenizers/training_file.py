"""The state of a tokenizer's training in one safetensors file: written while it trains, read where it resumes.

Optimizer states are flattened: ``vq optimizer.3.exp_avg`` is the first moment of the fourth parameter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from oar_scale.errors import Unreachable, UserError
from oar_scale.storage import Missing
from oar_scale.tokenizers.safetensors_file import read_weights, save_weights

KIND = "tokenizer-training"


def save_training(uri: str, tensors: Mapping[str, Tensor], identity: str) -> None:
    """Write the state of the training that ``identity`` stands for; it takes the place of the one before as a whole."""
    save_weights(uri, {name: tensor.contiguous() for name, tensor in tensors.items()}, {"kind": KIND, "spec": identity})


def read_training(uri: str, identity: str) -> dict[str, Tensor] | None:
    """The state of that training; None where there is none that is whole and of this training: it then starts from the beginning."""
    try:
        saved = read_weights(uri, KIND)
    except Unreachable:
        raise
    except (Missing, UserError):
        return None
    return saved.tensors if saved.spec == identity else None


def optimizer_tensors(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by names that begin with ``name``."""
    state = optimizer.state_dict()["state"]
    return {f"{name}.{index}.{key}": tensor for index, of_parameter in state.items() for key, tensor in of_parameter.items()}


def restore_optimizer(name: str, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state that :func:`optimizer_tensors` has returned of another one."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for path, tensor in saved.items():
        if path.startswith(f"{name}."):
            index, key = path.removeprefix(f"{name}.").split(".")
            like = parameters[int(index)]
            # Moments must lie in memory as their parameters do: a fused optimizer goes through both in the order of their addresses.
            state.setdefault(int(index), {})[key] = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
