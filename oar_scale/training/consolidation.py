"""A training checkpoint's shards into one model, without the workers that wrote them.

Every rank's shard holds its part of the float32 weights that the optimiser works on; DeepSpeed's own converter puts them
together. A run in bf16 computes with those weights rounded, which is what the stage itself exports at its end.
"""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout

from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel, ModelSpec
from oar_scale.model.weights import model_of
from oar_scale.training.checkpoints import local_checkpoint

_WRAPPER = "model."
"""What the training objective puts before the model's names."""


def consolidate(uri: str) -> AnyOrderModel:
    """The model of a committed checkpoint (a folder or ``s3://``), float32, on the CPU.

    Raises:
        UserError: the checkpoint is not whole, or does not say which model it is of.
    """
    with local_checkpoint(uri) as found:
        spec = found.manifest.get("model_spec")
        if spec is None:
            raise UserError(
                f"{uri}: does not say which model it is of; a version of oar_scale before model_spec wrote it. "
                "Continue the training to its next checkpoint, and export that one."
            )
        tensors = _weights(found.uri)
    ours = {name.removeprefix(_WRAPPER): tensor.float() for name, tensor in tensors.items()}
    return model_of(ModelSpec.model_validate(spec), ours, uri)


def _weights(folder: str) -> dict[str, Tensor]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it chats, and draws bars
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        at, tag = os.path.split(os.path.abspath(folder))
        weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(at, tag=tag)
    return weights
