"""Pictures of held-out captions while training: a sheet of them, and one of the orders that their cells were placed in.

The ranks share the captions; under ZeRO-3 each has the whole model while it samples.
"""

from __future__ import annotations

import logging
import os

import numpy as np
import torch

from oar_scale.data.hashing import derived_seed
from oar_scale.errors import UserError
from oar_scale.evaluation.pictures import contact_sheet, decode_pictures, order_map, png, step_of_cell, upscale
from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.storage import join, open_storage
from oar_scale.tokenizers.prompts import conditioning_inputs
from oar_scale.tokenizers.vq import load_vq
from oar_scale.training.heldout_images import HeldoutImages
from oar_scale.training.loop import Callback, Loop
from oar_scale.training.process import EventSink

COLUMNS, PIXELS = 8, 96
_log = logging.getLogger(__name__)


class SampleSheet(Callback):
    """Draws ``sample.images`` captions every ``sample_every`` steps. Collective."""

    def __init__(self, heldout: HeldoutImages) -> None:
        self._heldout = heldout

    def after_step(self, loop: Loop) -> None:
        """Draw where it is due."""
        if loop.job.training.sample_every and loop.every(loop.job.training.sample_every):
            loop.process.heartbeat(f"samples after step {loop.step}")
            self._draw(loop)

    def _draw(self, loop: Loop) -> None:
        world, rank = loop.process.world, loop.process.rank
        share = -(-loop.job.recipe.sample.images // world)
        model, encoded_prompts = loop.engine.plain_model(), self._heldout.encoded_prompts[:share]
        seed = derived_seed("samples while training", loop.job.recipe.seed)
        with torch.no_grad():
            condition_bTD = model.condition(conditioning_inputs(self._heldout.prompts, encoded_prompts, model.dtype))
        raster = self._heldout.orders["nll_random"][:share] if loop.engine.spec.layout == "raster" else None
        settings = SampleSettings.from_recipe(loop.job.recipe.sample)
        images_b = rank + world * np.arange(len(condition_bTD))  # the numbers of the captions: see _write
        drawn = generate(model, condition_bTD, settings, seed, raster, images_B=images_b)
        shares = loop.process.gather((drawn.codes_BN.cpu(), drawn.order_BN.cpu()))
        if loop.events:
            codes_SN, order_SN = (torch.cat([share[side] for share in shares]) for side in (0, 1))
            # Rank r has every world-th caption from the r-th on; one without captions has drawn another rank's.
            count = len(self._heldout.captions)
            numbers = [(each + world * at) % count for each, (codes, _) in enumerate(shares) for at in range(len(codes))]
            try:
                self._write(loop, loop.events, codes_SN, order_SN, [self._heldout.captions[number] for number in numbers])
            except UserError as error:  # a full disk, a storage that is away: pictures are not worth the training
                _log.warning("the pictures of step %s are left out: %s", loop.step, error)

    def _write(self, loop: Loop, events: EventSink, codes_SN: torch.Tensor, order_SN: torch.Tensor, captions: list[str]) -> None:
        device = loop.process.device
        vq = load_vq(join(loop.job.root, "tokenizers", "vq.safetensors")).to(device)
        sheets = {
            "image": [upscale(picture, max(1, PIXELS // len(picture))) for picture in decode_pictures(vq, codes_SN.to(device))],
            "orders": [upscale(order_map(steps), max(1, PIXELS // len(steps))) for steps in step_of_cell(order_SN)],
        }
        paths = {name: os.path.join("samples", f"{loop.job.stage}-{loop.step:08d}-{name}.png") for name in sheets}
        for name, pictures in sheets.items():
            uri = join(loop.job.local, paths[name])
            rows = [pictures[start : start + COLUMNS] for start in range(0, len(pictures), COLUMNS)]
            open_storage(uri).write(uri, png(contact_sheet(rows, gap=4)))
        events.emit("samples", step=loop.step, captions=captions, **paths)
