"""``oar sample``: generates pictures for captions and writes them as one contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch

from oar_scale.data.hashing import derived_seed
from oar_scale.errors import UserError
from oar_scale.evaluation.pictures import contact_sheet, decode_pictures, png, upscale
from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import load_model
from oar_scale.orders.order_files import run_files
from oar_scale.orders.policies import OrderRequest, sampling_order
from oar_scale.registry import MODELS, ModelName, current_name
from oar_scale.run.artifacts import prompt_encoder, read_tokens, require, require_model
from oar_scale.run.context import Run
from oar_scale.run.gpu_node import chosen_device, on_gpu_node, threads_here
from oar_scale.storage import open_storage
from oar_scale.text import shown
from oar_scale.tokenizers.prompts import Prompt, conditioning_inputs
from oar_scale.tokenizers.vq import load_vq

Precision = Literal["bf16", "fp32"]
DRAWINGS = 4
"""Of each caption, side by side."""
SHEET_PIXELS = 128
"""Side of a picture on the sheet, about: images are scaled by a whole factor."""


def sample_images(
    run: Run,
    captions: list[str] | None,
    model: str,
    out: str,
    order: str | None = None,
    device: str | None = None,
    precision: Precision | None = None,
) -> str:
    """Draw four images for each caption (None: the first held-out ones), a row a caption, and write them as a PNG.

    Args:
        model: one of the run's models (``oar_scale.registry``).
        out: a path or an object URI.
        order: an order policy; default: the recipe's.
        device: of this machine. Default: a GPU where it has one; else, for a recipe that trains on GPUs, one of the Ray cluster's; else
            the CPU.
        precision: of the model; default: the recipe's.

    Returns:
        ``out``.

    Raises:
        UserError: no such model or device, an empty caption, or a stage that has not finished.
    """
    chosen = next((name for name in MODELS if name == current_name(model)), None)
    if chosen is None:
        raise UserError(f"no model {model!r}; a run has: {', '.join(MODELS)}")
    work = partial(_sheet, captions=captions, name=chosen, order=order, device=device, precision=precision)
    gpus = min(1, run.recipe.parallel.gpus_per_worker) if device is None else 0
    sheet, shown = on_gpu_node(run, work, gpus=gpus, or_cpu=True)
    open_storage(out).write(out, sheet)
    for number, caption in enumerate(shown, 1):
        run.console.say(f"  row {number}: {caption}")
    return out


def _sheet(
    run: Run, captions: list[str] | None, name: ModelName, order: str | None, device: str | None, precision: Precision | None
) -> tuple[bytes, list[str]]:
    """The contact sheet as PNG, and a text about each of its rows; drawn on this machine."""
    place = chosen_device(device)
    prompts = prompt_encoder(run, new=True)
    given: Sequence[Prompt] = (
        captions if captions is not None else read_tokens(run, "heldout", run.recipe.sample.images, prompts.field).prompts
    )
    if prompts.field != "features" and any(not str(caption).strip() for caption in given):
        raise UserError('a caption is empty: put quotation marks around each caption, e.g. oar sample RECIPE "a smiling cat"')
    parallel = run.recipe.parallel
    torch.set_num_threads(threads_here(parallel.cpu_threads * parallel.max_workers))
    vq = load_vq(require(run, run.vq_uri, "tokenizer"))
    vq.to(place)
    half = (precision or parallel.precision) == "bf16"
    network = load_model(require_model(run, name)).to(place, torch.bfloat16 if half else torch.float32)
    encoded_prompts = prompts.encode(given)
    unknown = [caption for caption, ids in zip(given, encoded_prompts, strict=True) if prompts.field == "txt" and not ids.any()]
    if unknown:
        raise UserError(f"caption {shown(unknown[0])} has no token in {run.text_uri}")
    seed = derived_seed("sample", run.recipe.seed)
    with torch.no_grad():
        cond_inputs = conditioning_inputs(prompts, encoded_prompts.to(place), network.dtype)
        condition = network.condition(cond_inputs.repeat_interleave(DRAWINGS, dim=0))
    request = OrderRequest(network, torch.arange(len(condition)), seed, run_files(run.at()), run.model_uri(name))
    order_BN = sampling_order(order or run.recipe.sample.order, request, "--order" if order else "sample.order")
    drawn = generate(network, condition, SampleSettings.from_recipe(run.recipe.sample), seed, order_BN)
    pictures = [upscale(picture, max(1, SHEET_PIXELS // len(picture))) for picture in decode_pictures(vq, drawn.codes_BN)]
    rows = [pictures[start : start + DRAWINGS] for start in range(0, len(pictures), DRAWINGS)]
    return png(contact_sheet(rows, gap=8)), [str(each) if prompts.field != "features" else "a held-out image" for each in given]
