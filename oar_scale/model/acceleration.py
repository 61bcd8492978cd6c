"""Less memory for more computation, and compiled blocks: how the same model is run, chosen by a recipe's ``parallel`` section.

activation_checkpointing   kept of each block for the backward pass
none                       its rows between matrix products, but for what ``memory_efficient.py`` computes again
selective                  its input, and the outputs of its matrix products and of attention; the rest is computed again
full                       its input; the block runs twice
"""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from oar_scale.config.schema import ParallelConfig
from oar_scale.model.blocks import TrunkBlock
from oar_scale.model.transformer import AnyOrderModel

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def accelerate(model: AnyOrderModel, parallel: ParallelConfig) -> None:
    """Let the trunk's blocks run as ``parallel.activation_checkpointing`` and ``parallel.compile`` say; names and values stay.

    Blocks are compiled one by one, so that all of a kind but the last share one compilation, with their recomputation inside.
    Compiled blocks draw their dropout from another sequence than eager ones.
    """
    for block in model.layers:
        assert isinstance(block, TrunkBlock)
        if parallel.activation_checkpointing == "selective":
            contexts = partial(create_selective_checkpoint_contexts, _policy)
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts, respect_saved_tensors_hooks=True)
        elif parallel.activation_checkpointing == "full":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if parallel.compile:
            block.forward = torch.compile(block.forward)


def _policy(_context: object, operation: object, *_inputs: object, **_options: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
