"""``oar extract --compare``: what the cheaper methods of finding orders cost, and what they lose.

On the first training images, with the run's any-order model: rows, images/s, Kendall's tau and regret against exact orders
(``studies/extraction_methods.py``); an order head is judged by those of them that it did not learn from. With fine-tuning also what a
model is worth that was trained on the orders of each method, on the same images and for the same few steps: likelihood of held-out images,
the same for every method, and the distance of its drawings to them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.data.hashing import image_numbers
from oar_scale.data.manifest import ShardInfo, read_manifest
from oar_scale.data.shards import read_token_shard
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.model import AnyOrderModel, load_model, model_id
from oar_scale.orders.head import OrderHead, load_head, tables_id
from oar_scale.orders.order_files import head_file, run_files
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.run.artifacts import Tokens, prompt_encoder, read_tokens, require, require_any_order
from oar_scale.run.context import Run
from oar_scale.run.gpu_node import on_gpu_node
from oar_scale.runtime.tables import text_table
from oar_scale.storage import fetch, join, open_storage
from oar_scale.studies.extraction_methods import EXACT, ROUNDS, MethodResult, compare, extraction_methods, head_methods
from oar_scale.studies.order_head_training import kept_out
from oar_scale.studies.short_training import ShortTraining
from oar_scale.tokenizers.prompts import cond_inputs_of


def run_compare(run: Run, *, images: int = 64, out: str | None = None, finetune: int = 0) -> JsonObject:
    """Measure all methods, print a table, and write it as JSON.

    Args:
        images: training images to take; with ``finetune`` all of the shards they lie in.
        out: a path or an object URI for the JSON; None: nowhere.
        finetune: steps of training on the orders of each method; 0: none. With it every method is timed once only.

    Returns:
        What is written: the settings, and the figures of each method.

    Raises:
        UserError: fewer than 2 images, a stage before this one has not finished, a training failed, or there is an order head that
            learned from other orders than the run has now, or from all of these images.
    """
    if images < 2:
        raise UserError(f"--images {images}: figures have standard errors over images, which need at least 2")
    require_any_order(run)
    report = on_gpu_node(run, partial(_compared, images=images, finetune=finetune), gpus=run.recipe.extract.gpus_per_actor > 0)
    if out is not None:
        open_storage(out).write(out, json.dumps(report, indent=1).encode())
    return report


def _compared(run: Run, images: int, finetune: int) -> JsonObject:
    """The figures, which are printed as a table; computed on this machine."""
    config, parallel = run.recipe.extract, run.recipe.parallel
    model_file = fetch(require(run, run.model_uri("any_order"), "pretrain"), run.cache)
    shards = _shards(run, images)
    tokens = read_tokens(run, "train", sum(shard.samples for shard in shards) if finetune else images, prompt_encoder(run).field)
    device = "cuda" if config.gpus_per_actor > 0 else "cpu"
    if device == "cpu":
        torch.set_num_threads(parallel.cpu_threads)
    where: JsonObject = {"images": len(tokens.keys), "batch": config.batch, "score": config.score, "guidance": config.guidance}
    where |= {"precision": parallel.precision, "device": device, "threads": torch.get_num_threads()}
    run.console.say("  " + ", ".join(f"{name} {value}" for name, value in where.items()))
    results = _measured(run, model_file, shards, tokens, device, 1 if finetune else ROUNDS)
    rows = [_row(each, results[EXACT]) for each in results.values()]
    if finetune:
        with tempfile.TemporaryDirectory(prefix="oar-compare-") as folder, run.console.progress(len(results), "short trainings") as tally:
            training, exact = ShortTraining(run, model_file, shards, tokens.keys, finetune, folder), None
            for row, each in zip(rows, results.values(), strict=True):
                outcome = training(each.order_SN)
                exact = exact or outcome
                row.update(outcome.figures(exact))
                tally.advance()
    for line in table(rows):
        run.console.say(f"  {line}")
    return {**where, "finetune_steps": finetune, "ways": rows}


def table(rows: Sequence[JsonObject]) -> list[str]:
    """The figures as lines of columns."""
    heads = ["method", "rows", "of exact", "images/s", "speed", "tau", "regret, nats per code", "images", "families"]
    lines = [
        [
            row["way"],
            f"{row['rows']:,}",
            f"{row['share_of_exact_rows']:.1%}",
            f"{row['images_per_s']:.1f}",
            f"x {row['speed_of_exact']:.1f}",
            f"{row['kendall_tau']['mean']:.3f}",
            _with_error(row["regret"]),
            str(row["judged_by_images"]),
            str(row["judged_by_families"]),
        ]
        for row in rows
    ]
    if "kid_efflite0" in rows[0]:
        heads += ["held-out NLL, own max_prob", "above exact", "random orders", "above exact", "kid_efflite0 +- deviation"]
        for line, row in zip(lines, rows, strict=True):
            for name in ("heldout_nll_own_max_prob", "heldout_nll_random"):
                line += [f"{row[name]['mean']:.4f}", _with_error(row[f"{name}_above_exact"])]
            line.append(_with_error({"mean": row["kid_efflite0"], "standard_error": row["kid_efflite0_std"]}))
    return text_table([heads, *lines])


def _measured(run: Run, model_file: str, shards: Sequence[ShardInfo], tokens: Tokens, device: str, rounds: int) -> dict[str, MethodResult]:
    config, prompts = run.recipe.extract, prompt_encoder(run)
    judge = load_model(model_file).to(device)
    model = load_model(model_file).to(device, torch.bfloat16 if run.recipe.parallel.precision == "bf16" else torch.float32)
    settings = ExtractionSettings.from_recipe(config)
    head = _head(run, model, model_id(model_file))
    methods = extraction_methods(settings, model.spec.grid, head)
    judged = {} if head is None else dict.fromkeys(head_methods(head), _unseen(run, head, shards, len(tokens.keys)))
    cond_inputs_S = cond_inputs_of(prompts, tokens.prompts, torch.device(device)).to(device)
    codes_SN, images_S = torch.from_numpy(tokens.codes_SN).to(device), image_numbers(tokens.keys)
    with run.console.progress(rounds * len(methods), "methods of finding orders") as tally:
        return compare(
            model,
            judge,
            codes_SN,
            cond_inputs_S,
            settings,
            methods,
            config.batch,
            images_S,
            tokens.families_S,
            judged=judged,
            rounds=rounds,
            on_done=tally.advance,
        )


def _head(run: Run, model: AnyOrderModel, own_id: str) -> OrderHead | None:
    """The order head of the any-order model, where there is one."""
    uri = head_file(run.model_uri("any_order"))
    return load_head(uri, model, own_id, tables_id(run_files(run.at()))) if open_storage(uri).exists(uri) else None


def _unseen(run: Run, head: OrderHead, shards: Sequence[ShardInfo], images: int) -> NDArray[np.bool_]:
    """Which of the first images [S] of these shards the head did not learn from."""
    folder, cache_bytes = run.at("tokens", "train"), run.recipe.storage.cache_bytes
    opened = [read_token_shard(join(folder, info.name), run.cache, info, cache_bytes=cache_bytes) for info in shards]
    unseen_S = np.concatenate([kept_out(shard, head.spec.heldout_fraction) for shard in opened])[:images]
    if unseen_S.sum() < 2:
        raise UserError(
            f"{head_file(run.model_uri('any_order'))}: this order head learned from all but {unseen_S.sum()} of these {images} images, "
            "and cannot be judged by what it has seen. Take more (--images), or train it with a larger order_head.heldout_fraction."
        )
    return unseen_S


def _shards(run: Run, images: int) -> list[ShardInfo]:
    """The shards that the first images lie in."""
    folder = run.at("tokens", "train")
    require(run, join(folder, "manifest.json"), "tokens")
    taken: list[ShardInfo] = []
    for shard in read_manifest(folder).shards:
        if sum(each.samples for each in taken) < images:
            taken.append(shard)
    return taken


def _row(each: MethodResult, exact: MethodResult) -> JsonObject:
    return {
        "way": each.name,
        "rows": each.rows,
        "share_of_exact_rows": each.rows / exact.rows,
        "images_per_s": each.images_per_s,
        "speed_of_exact": each.speed,
        "kendall_tau": asdict(each.tau),
        "regret": asdict(each.regret),
        "judged_by_images": each.judged,
        "judged_by_families": each.families,
    }


def _with_error(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.4f} +- {estimate['standard_error']:.4f}"
