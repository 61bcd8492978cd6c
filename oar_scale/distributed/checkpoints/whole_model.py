"""Read the shards of a training checkpoint as one model, in a single process.

Its weights are the float32 weights that the optimizer updates, or their moving average. A run in bf16 computes with them rounded, and the
model that the stage writes at its end is rounded as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError
from torch import Tensor

from oar_scale.distributed.checkpoints.fetch import local_checkpoint
from oar_scale.distributed.checkpoints.shard_keys import WEIGHTS
from oar_scale.distributed.checkpoints.shard_tensors import Shards, read_shards
from oar_scale.errors import UserError, first_line
from oar_scale.model import AnyOrderModel, ModelSpec
from oar_scale.model.weights import model_of
from oar_scale.training.optimizer import AVERAGE

_WRAPPER = "model."
"""Prefix of the model's parameter names in the training objective."""


@contextmanager
def checkpoint_weights(uri: str, *, average: bool = False) -> Iterator[tuple[ModelSpec, Iterator[tuple[str, Tensor]]]]:
    """The model of a committed checkpoint (``.../step-00000100``, a folder or ``s3://``), while the block lasts: its spec, and its
    tensors, float32, on the CPU. They come one after the other, and stay on the disk until then.

    Args:
        average: its moving average instead of the weights themselves.

    Raises:
        UserError: the checkpoint is damaged or not committed, or has no average.
    """
    with local_checkpoint(uri) as (checkpoint, folder):
        shards = read_shards(folder, checkpoint.files)
        if average and AVERAGE not in shards.moments:
            raise UserError(f"{uri}: keeps no moving average of the weights; ema_decay was not set. Leave --ema out.")
        try:
            spec = ModelSpec.model_validate(checkpoint.manifest["model_spec"])
        except ValidationError as error:
            why = first_line(str(error.errors()[0]["msg"]))
            raise UserError(f"{uri}: the sizes of this model are not understood ({why}). Use another checkpoint.") from error
        yield spec, _tensors(shards, AVERAGE if average else WEIGHTS)


def whole_model(uri: str, *, average: bool = False) -> AnyOrderModel:
    """All of it in memory. Arguments and errors as :func:`checkpoint_weights`."""
    with checkpoint_weights(uri, average=average) as (spec, tensors):
        return model_of(spec, {name: tensor.clone() for name, tensor in tensors}, uri)


def _tensors(shards: Shards, what: str) -> Iterator[tuple[str, Tensor]]:
    for name in shards.shapes:
        yield name.removeprefix(_WRAPPER), shards.whole(name, what)
    for name, tensor in shards.untrained.items():
        yield name.removeprefix(_WRAPPER), tensor.float()
