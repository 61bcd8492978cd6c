"""Stage ``tokenizer``: the image tokenizer and the text tokenizer, trained here or taken from a file."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oar_scale.data.manifest import read_manifest
from oar_scale.data.shards import read_shard
from oar_scale.errors import UserError
from oar_scale.stages.run import Run
from oar_scale.storage import join
from oar_scale.tokenizers.text import TextTokenizer, train_text_tokenizer
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, load_vq, save_vq
from oar_scale.tokenizers.vq_training import VQProgress, assess_vq, train_vq

EXPECTED = "seconds with given weights, else about 10 ms an image and training step"


def run_tokenizer(run: Run) -> dict[str, Any]:
    """Write ``tokenizers/vq.safetensors`` and ``tokenizers/text.model``; returns PSNR and codebook use on the held-out images."""
    recipe = run.recipe
    torch.set_num_threads(recipe.parallel.cpu_threads * recipe.parallel.workers)
    pixels, captions = read_images(run, "train")
    held_pixels, _ = read_images(run, "heldout")
    text = _text_tokenizer(run, captions)
    text.save(run.text_uri)
    vq = _image_tokenizer(run, pixels)
    save_vq(run.vq_uri, vq, half=True)
    vq = load_vq(run.vq_uri)  # what the other stages will use: rounded as stored
    psnr, use = assess_vq(vq, held_pixels)
    run.console.say(f"  held-out PSNR {psnr:.2f} dB, codebook use {use:.0%}, {text.vocab_size} text pieces")
    return {"psnr_db": psnr, "codebook_use": use, "trained": recipe.tokenizer.image.weights is None, "text_pieces": text.vocab_size}


def read_images(run: Run, split: str) -> tuple[Tensor, list[str]]:
    """All images of a split, uint8 [S, H, W, 3], and their captions."""
    folder = run.at("images", split)
    pixels, captions = [], []
    for shard in read_manifest(folder).shards:
        for sample in read_shard(join(folder, shard.name), run.cache, shard):
            pixels.append(np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB")))
            captions.append(sample["txt"].decode())
    return torch.from_numpy(np.stack(pixels)), captions


def _text_tokenizer(run: Run, captions: list[str]) -> TextTokenizer:
    config = run.recipe.tokenizer.text
    if config.weights is not None:
        return TextTokenizer.load(config.weights, config.max_tokens)
    return train_text_tokenizer(captions, config.vocab_size, config.max_tokens)


def _image_tokenizer(run: Run, pixels: Tensor) -> VQTokenizer:
    config, size = run.recipe.tokenizer.image, run.recipe.data.image_size
    if config.weights is not None:
        vq = load_vq(config.weights)
        if vq.spec.image_size != size or vq.spec.grid != run.recipe.grid:
            raise UserError(
                f"tokenizer.image.weights {config.weights}: made for {vq.spec.image_size} px and {vq.spec.grid} x {vq.spec.grid} codes; "
                f"the recipe asks for {size} px and {run.recipe.grid} x {run.recipe.grid}.\n"
                f"Set data.image_size: {vq.spec.image_size} and {len(vq.spec.multipliers)} tokenizer.image.multipliers, "
                "or train a tokenizer (tokenizer.image.weights: null)."
            )
        return vq
    spec = VQSpec(
        image_size=size,
        channels=config.channels,
        multipliers=config.multipliers,
        res_blocks=config.res_blocks,
        latent_channels=config.channels * config.multipliers[-1],
        codebook_size=config.codebook_size,
        codebook_dim=config.codebook_dim,
    )
    started = time.monotonic()
    with run.log("tokenizer") as log, run.console.progress(config.training.steps, "tokenizer steps") as tally:

        def report(at: VQProgress) -> None:
            log.emit("vq", step=at.step, loss=at.loss, psnr=at.psnr, codebook_use=at.codebook_use)
            tally.update(at.step)

        vq = train_vq(spec, config.training, pixels, run.recipe.seed, report)
        log.emit("end", seconds=time.monotonic() - started)
    return vq
