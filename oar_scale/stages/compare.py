"""``oar extract --compare``: what the cheaper ways of finding orders cost, and what they lose.

On the first training images, with the run's any-order model: rows, images/s, Kendall's tau and regret against exact orders
(``orders/comparison.py``). With fine-tuning also what a model is worth that was trained on the orders of each way, on the same
images and for the same few steps: likelihood of held-out images, and the distance of its drawings to them.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from oar_scale.data.manifest import ShardInfo, read_manifest
from oar_scale.model import load_model
from oar_scale.orders.comparison import EXACT, ROUNDS, Measured, compare, ways
from oar_scale.orders.extraction import ExtractionSettings
from oar_scale.stages.compare_training import ShortTraining
from oar_scale.stages.inputs import Tokens, prompt_encoder, read_tokens, require, require_any_order
from oar_scale.stages.run import Run
from oar_scale.storage import fetch, join, open_storage
from oar_scale.tokenizers.prompts import model_inputs


def run_compare(run: Run, *, images: int = 64, out: str | None = None, finetune: int = 0) -> dict[str, Any]:
    """Measure all ways, print a table, and write it as JSON.

    Args:
        images: training images to take; with ``finetune`` all of the shards they lie in.
        out: a path or an object URI for the JSON; None: nowhere.
        finetune: steps of training on the orders of each way; 0: none. With it every way is timed once only.

    Returns:
        What is written: the settings, and the figures of each way.

    Raises:
        UserError: a stage before this one has not finished, or a training failed.
    """
    require_any_order(run)
    config, parallel = run.recipe.extract, run.recipe.parallel
    model_file = fetch(require(run, run.model_uri("anyorder"), "pretrain"), run.cache)
    shards = _shards(run, images)
    tokens = read_tokens(run, "train", sum(shard.samples for shard in shards) if finetune else images, prompt_encoder(run).field)
    device = "cuda" if config.gpus_per_actor > 0 else "cpu"
    if device == "cpu":
        torch.set_num_threads(parallel.cpu_threads)
    where: dict[str, Any] = {"images": len(tokens.keys), "batch": config.batch, "score": config.score, "guidance": config.guidance}
    where |= {"precision": parallel.precision, "device": device, "threads": torch.get_num_threads()}
    run.console.say("  " + ", ".join(f"{name} {value}" for name, value in where.items()))
    found = _measured(run, model_file, tokens, device, 1 if finetune else ROUNDS)
    rows = [_row(each, found[EXACT]) for each in found.values()]
    if finetune:
        with tempfile.TemporaryDirectory(prefix="oar-compare-") as folder, run.console.progress(len(found), "short trainings") as tally:
            training = ShortTraining(run, model_file, shards, tokens.keys, finetune, folder)
            for row, each in zip(rows, found.values(), strict=True):
                row.update(training(each.order_SN))
                tally.advance()
    for line in table(rows):
        run.console.say(f"  {line}")
    told = {**where, "finetune_steps": finetune, "ways": rows}
    if out is not None:
        open_storage(out).write(out, json.dumps(told, indent=1).encode())
    return told


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The figures as lines of columns."""
    heads = ["way", "rows", "of exact", "images/s", "speed", "tau", "regret, nats per code"]
    lines = [
        [
            row["way"],
            f"{row['rows']:,}",
            f"{row['share_of_exact_rows']:.1%}",
            f"{row['images_per_s']:.1f}",
            f"x {row['speed_of_exact']:.1f}",
            f"{row['kendall_tau']['mean']:.3f}",
            _with_error(row["regret"]),
        ]
        for row in rows
    ]
    if "kid_efflite0" in rows[0]:
        heads += ["held-out NLL, own order", "random orders", "kid_efflite0"]
        for line, row in zip(lines, rows, strict=True):
            line += [_with_error(row["heldout_nll_own"]), _with_error(row["heldout_nll_random"]), f"{row['kid_efflite0']:.4f}"]
    widths = [max(len(line[column]) for line in [heads, *lines]) for column in range(len(heads))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in [heads, *lines]]


def _measured(run: Run, model_file: str, tokens: Tokens, device: str, rounds: int) -> dict[str, Measured]:
    config, prompts = run.recipe.extract, prompt_encoder(run)
    judge = load_model(model_file).to(device)
    model = load_model(model_file).to(device, torch.bfloat16 if run.recipe.parallel.precision == "bf16" else torch.float32)
    settings = ExtractionSettings.from_recipe(config)
    methods = ways(settings, model.spec.grid, run.model_uri("anyorder"))
    told_S = model_inputs(prompts, prompts.encode(tokens.prompts)).to(device)
    codes_SN, images_S = torch.from_numpy(tokens.codes_SN).to(device), np.array([zlib.crc32(key.encode()) for key in tokens.keys], np.int64)
    with run.console.progress(rounds * len(methods), "ways of finding orders") as tally:
        return compare(model, judge, codes_SN, told_S, settings, methods, config.batch, images_S, rounds=rounds, on_done=tally.advance)


def _shards(run: Run, images: int) -> list[ShardInfo]:
    """The shards that the first images lie in."""
    folder = run.at("tokens", "train")
    require(run, join(folder, "manifest.json"), "tokens")
    found: list[ShardInfo] = []
    for shard in read_manifest(folder).shards:
        if sum(each.samples for each in found) < images:
            found.append(shard)
    return found


def _row(each: Measured, exact: Measured) -> dict[str, Any]:
    return {
        "way": each.name,
        "rows": each.rows,
        "share_of_exact_rows": each.rows / exact.rows,
        "images_per_s": each.images_per_s,
        "speed_of_exact": each.speed,
        "kendall_tau": asdict(each.tau),
        "regret": asdict(each.regret),
    }


def _with_error(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.4f} +- {estimate['standard_error']:.4f}"
