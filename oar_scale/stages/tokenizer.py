"""Stage ``tokenizer``: the image tokenizer and the text tokenizer, trained here or taken from a file."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from oar_scale.config.schema import SentencePieceConfig
from oar_scale.data.images import decode_image
from oar_scale.data.manifest import read_manifest
from oar_scale.data.shards import ShardSample, read_shard
from oar_scale.errors import UserError
from oar_scale.evaluation.distances import frechet
from oar_scale.evaluation.features import picture_features
from oar_scale.json_object import JsonObject
from oar_scale.run.context import Run
from oar_scale.run.gpu_node import device_here, on_gpu_node, threads_here
from oar_scale.runtime.stop_signals import StopSignals
from oar_scale.storage import join, open_storage
from oar_scale.text import decode_text
from oar_scale.tokenizers.clip_text import ClipText
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.prompts import PromptEncoder, for_new_prompts, load_prompts, write_features_note
from oar_scale.tokenizers.text import TextTokenizer, train_text_tokenizer
from oar_scale.tokenizers.vq import VQSpec, load_vq, save_vq
from oar_scale.tokenizers.vq_training import VQProgress, assess_vq, train_vq

ASSESSED = 4096
"""Held-out images that the image tokenizer is judged by, at most."""


def run_tokenizer(run: Run) -> JsonObject:
    """Write ``tokenizers/vq.safetensors`` and ``tokenizers/text.model``; returns what the image tokenizer is worth on held-out images."""
    recipe = run.recipe
    torch.set_num_threads(threads_here(recipe.parallel.cpu_threads * recipe.parallel.max_workers))
    prompts = _prompts(run)
    vq = _image_tokenizer(run)
    trained = recipe.tokenizer.image.weights is None
    save_vq(run.vq_uri, vq, half=trained)  # weights that came from elsewhere keep every bit, or their codes would change
    quality = on_gpu_node(run, _assess, gpus=min(1, recipe.parallel.gpus_per_worker), or_cpu=True)
    if trained:  # not before: a stage that is interrupted while it is assessed would train again from the beginning
        open_storage(run.vq_training_uri).delete(run.vq_training_uri)
    run.console.say(f"  {prompts.vocab_size} text pieces")
    return {**quality, "trained": trained, "text_pieces": prompts.vocab_size}


def _assess(run: Run) -> JsonObject:
    """What the image tokenizer is worth on held-out images, as the other stages use it: as stored; on a GPU where the recipe has some."""
    vq = load_vq(run.vq_uri)  # rounded as stored
    vq.to(device_here(run.recipe.parallel.gpus_per_worker > 0))
    held_pixels, _ = read_images(run, "heldout", ASSESSED)
    quality = assess_vq(vq, held_pixels)
    run.console.say(f"  held-out PSNR {quality.psnr_db:.2f} dB, codebook use {quality.codebook_use:.0%}")
    return {
        "psnr_db": quality.psnr_db,
        "codebook_use": quality.codebook_use,
        "codebook_size": vq.spec.codebook_size,
        "reconstruction_fd_efflite0": _distance(run, held_pixels, quality.decoded_SHW3),
        "heldout_images": len(held_pixels),
    }


def _distance(run: Run, held_SHW3: Tensor, decoded_SHW3: Tensor) -> float | None:
    """Frechet distance (``fd_efflite0``) between held-out images and what is left of them, printed; None, with the reason, if not measured.

    Both sets are the same S images, so that it is 0 where nothing is lost. It still grows as S falls: compare it between
    tokenizers on the same images only.
    """
    try:
        distance = frechet(picture_features(held_SHW3.numpy()), picture_features(decoded_SHW3.numpy()))
    except (UserError, ValueError) as fault:
        run.console.say(f"  reconstruction fd_efflite0 not measured: {fault}")
        return None
    run.console.say(f"  reconstruction fd_efflite0 {distance:.2f} on {len(held_SHW3)} held-out images (EfficientNet-Lite0, not rFID)")
    return distance


def read_images(run: Run, split: str, limit: int | None = None) -> tuple[Tensor, list[str]]:
    """The first images of a split (default: all), uint8 [S, H, W, 3], and their captions."""
    pixels, captions, where = [], [], run.at("images", split)
    for sample in itertools.islice(_samples(run, split), limit):
        pixels.append(np.asarray(decode_image(sample["png"], f"{where}: image of sample {sample['__key__']!r}")))
        captions.append(decode_text(sample["txt"]))
    return torch.from_numpy(np.stack(pixels)), captions


def _samples(run: Run, split: str) -> Iterator[ShardSample]:
    folder = run.at("images", split)
    for shard in read_manifest(folder).shards:
        yield from read_shard(join(folder, shard.name), run.cache, shard)


def _prompts(run: Run) -> PromptEncoder:
    """The prompt encoder, opened once to find faults now; a SentencePiece model is written for the other stages."""
    config = run.recipe.tokenizer.text
    if isinstance(config, SentencePieceConfig):
        if config.weights is not None:
            text = TextTokenizer.load(config.weights, config.max_tokens)
        else:
            captions = [decode_text(sample["txt"]) for sample in _samples(run, "train")]
            text = train_text_tokenizer(captions, config.vocab_size, config.max_tokens)
        text.save(run.text_uri)
    prompts = load_prompts(for_new_prompts(config), run.at("tokenizers"))
    if isinstance(prompts, ClipText):
        write_features_note(prompts, run.at("tokenizers"))
    return prompts


def _image_tokenizer(run: Run) -> ImageTokenizer:
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
    pixels, _ = read_images(run, "train")
    started = time.monotonic()
    with run.log("tokenizer") as log, run.console.progress(config.training.steps, "tokenizer steps") as tally, StopSignals() as signals:

        def report(at: VQProgress) -> None:
            log.emit("vq", step=at.step, loss=at.loss, psnr=at.psnr, codebook_use=at.codebook_use, **at.extra_losses)
            tally.update(at.step)

        def stop(step: int) -> str | None:
            if signals.reason is not None:
                log.emit("stopping", step=step, reason=signals.reason)
                tally.note(f"step {step}: stopping: {signals.reason}")
            return signals.reason

        def resumed(step: int, seconds: float) -> None:
            log.emit("resumed", step=step, uri=saved, seconds=seconds)
            tally.note(f"resumes from step {step}")

        saved = run.vq_training_uri
        vq = train_vq(spec, config.training, pixels, run.recipe.seed, report, checkpoint=saved, stop=stop, resumed=resumed)
        log.emit("end", seconds=time.monotonic() - started)
    return vq
