"""Drawn held-out captions while training: a sheet of pictures and one of the orders they were placed in.

The ranks share the captions out; under ZeRO-3 each has the whole model while it draws.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from oar_scale.data.hashing import hash_words
from oar_scale.distributed.deepspeed_engine import plain_model
from oar_scale.evaluation.pictures import contact_sheet, decode_pictures, order_map, png, step_of_cell, upscale
from oar_scale.generation.sampling import SampleSettings, generate
from oar_scale.storage import join, open_storage
from oar_scale.tokenizers.prompts import model_inputs
from oar_scale.tokenizers.vq import load_vq
from oar_scale.training.callbacks import Callback
from oar_scale.training.inputs import Heldout
from oar_scale.training.loop import Loop

COLUMNS, PIXELS = 8, 96


class Sampling(Callback):
    """Every ``sample_every`` steps, ``sample.images`` captions. Collective."""

    def __init__(self, heldout: Heldout) -> None:
        self._heldout = heldout

    def after_step(self, loop: Loop) -> None:
        if loop.job.training.sample_every and loop.every(loop.job.training.sample_every):
            loop.process.beat(f"samples after step {loop.step}")
            self._draw(loop)

    def _draw(self, loop: Loop) -> None:
        world, rank = loop.process.world, loop.process.rank
        share = -(-loop.job.recipe.sample.images // world)
        model, cond_inputs = plain_model(loop.engine), self._heldout.cond_inputs[:share]
        noise = torch.Generator().manual_seed(int(hash_words("samples while training", loop.job.recipe.seed, rank)) >> 1)
        with torch.no_grad():
            condition_bTD = model.condition(model_inputs(self._heldout.prompts, cond_inputs))
        raster = self._heldout.orders["nll_random"][:share] if loop.spec.layout == "raster" else None
        drawn = generate(model, condition_bTD, SampleSettings.from_recipe(loop.job.recipe.sample), noise, raster)
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, (drawn.codes_BN.cpu(), drawn.order_BN.cpu()), group=loop.process.control)
        if loop.log:
            codes_SN, order_SN = (torch.cat([part[side] for part in parts]) for side in (0, 1))
            self._write(loop, codes_SN, order_SN)

    def _write(self, loop: Loop, codes_SN: torch.Tensor, order_SN: torch.Tensor) -> None:
        assert loop.log is not None
        vq = load_vq(join(loop.job.root, "tokenizers", "vq.safetensors"))
        sheets = {
            "image": [upscale(picture, max(1, PIXELS // len(picture))) for picture in decode_pictures(vq, codes_SN)],
            "orders": [upscale(order_map(steps), max(1, PIXELS // len(steps))) for steps in step_of_cell(order_SN)],
        }
        paths = {name: os.path.join("samples", f"{loop.job.stage}-{loop.step:08d}-{name}.png") for name in sheets}
        for name, pictures in sheets.items():
            uri = join(loop.job.local, paths[name])
            rows = [pictures[start : start + COLUMNS] for start in range(0, len(pictures), COLUMNS)]
            open_storage(uri).write(uri, png(contact_sheet(rows, gap=4)))
        # Rank r has every world-th caption from the r-th on.
        world, share = loop.process.world, len(codes_SN) // loop.process.world
        captions = [self._heldout.captions[at] for rank in range(world) for at in range(rank, len(self._heldout.captions), world)[:share]]
        loop.log.emit("samples", step=loop.step, captions=captions, **paths)
