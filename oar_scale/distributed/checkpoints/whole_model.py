"""Read the shards of a training checkpoint as one model, in a single process.

Its weights are the float32 weights that the optimizer updates, or their moving average. A run in bf16 computes with them rounded, and the
model that the stage writes at its end is rounded as well.
"""

from __future__ import annotations

from oar_scale.distributed.checkpoints.fetch import local_checkpoint
from oar_scale.distributed.checkpoints.shard_keys import WEIGHTS
from oar_scale.distributed.checkpoints.shard_tensors import read_shards
from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel, ModelSpec
from oar_scale.model.weights import model_of
from oar_scale.training.optimizer import AVERAGE

_WRAPPER = "model."
"""Prefix of the model's parameter names in the training objective."""


def whole_model(uri: str, *, average: bool = False) -> AnyOrderModel:
    """The model of a committed checkpoint (``.../step-00000100``, a folder or ``s3://``), float32, on the CPU.

    Args:
        average: its moving average instead of the weights themselves.

    Raises:
        UserError: the checkpoint is damaged or not committed, or has no average.
    """
    with local_checkpoint(uri) as (checkpoint, folder):
        shards = read_shards(folder, checkpoint.files)
        if average and AVERAGE not in shards.moments:
            raise UserError(f"{uri}: keeps no moving average of the weights; ema_decay was not set. Leave --ema out.")
        tensors = {name: shards.whole(name, AVERAGE if average else WEIGHTS).clone() for name in shards.shapes}
        tensors |= {name: tensor.float().clone() for name, tensor in shards.untrained.items()}
    spec = ModelSpec.model_validate(checkpoint.manifest["model_spec"])
    return model_of(spec, {name.removeprefix(_WRAPPER): tensor for name, tensor in tensors.items()}, uri)
