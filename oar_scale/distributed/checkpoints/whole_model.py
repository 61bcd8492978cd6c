"""A training checkpoint's shards as one model, without the workers that wrote them.

Its weights are the float32 ones that the optimiser works on, or their moving average. A run in bf16 computes with them rounded, which is
what the stage itself leaves at its end.
"""

from __future__ import annotations

from oar_scale.distributed.checkpoints.fetch import local_checkpoint
from oar_scale.distributed.checkpoints.shard_tensors import WEIGHTS, read_shards
from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel, ModelSpec
from oar_scale.model.weights import model_of
from oar_scale.training.optimizer import AVERAGE

_WRAPPER = "model."
"""What the training objective puts before the model's names."""


def whole_model(uri: str, *, average: bool = False) -> AnyOrderModel:
    """The model of a committed checkpoint (``.../step-00000100``, a folder or ``s3://``), float32, on the CPU.

    Args:
        average: its moving average instead of the weights themselves.

    Raises:
        UserError: the checkpoint is not whole, or has no average.
    """
    with local_checkpoint(uri) as (checkpoint, folder):
        shards = read_shards(folder, checkpoint.files)
        if average and AVERAGE not in shards.moments:
            raise UserError(f"{uri}: keeps no moving average of the weights; ema_decay was not set. Leave --ema out.")
        tensors = {name: shards.whole(name, AVERAGE if average else WEIGHTS).clone() for name in shards.shapes}
        tensors |= {name: tensor.float().clone() for name, tensor in shards.untrained.items()}
    spec = ModelSpec.model_validate(checkpoint.manifest["model_spec"])
    return model_of(spec, {name.removeprefix(_WRAPPER): tensor for name, tensor in tensors.items()}, uri)
