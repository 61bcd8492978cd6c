"""What is a drawing worth in one order or another? A run's model draws held-out captions under every order policy.

    python tools/benchmarks/drawing_orders.py recipes/quickstart.yaml --model ordered --images 256

The same captions and the same seed for all; distances to as many held-out images (docs/order-policies.md).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from oar_scale.config.loading import load_recipe
from oar_scale.errors import UserError
from oar_scale.evaluation.distances import frechet, kid
from oar_scale.evaluation.eval_tasks import EvalTarget, SamplingTask
from oar_scale.evaluation.features import picture_features
from oar_scale.generation.settings import SampleSettings
from oar_scale.orders.order_files import run_files
from oar_scale.orders.policies import known
from oar_scale.run.artifacts import prompt_encoder, read_pictures, read_tokens
from oar_scale.run.context import Run
from oar_scale.run.gpu_node import threads_here
from oar_scale.tokenizers.prompts import cond_inputs_of

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--model", default="ordered")
    parser.add_argument("--images", type=int, default=256)
    arguments = parser.parse_args()
    run = Run(load_recipe(arguments.recipe, arguments.overrides))
    torch.set_num_threads(threads_here(run.recipe.parallel.cpu_threads * run.recipe.parallel.max_workers))
    prompts = prompt_encoder(run)
    tokens = read_tokens(run, "heldout", arguments.images, prompts.field)
    cond_inputs_S = cond_inputs_of(prompts, tokens.prompts, torch.device("cpu")).numpy()
    heldout = picture_features(read_pictures(run, "heldout", tokens.keys))
    print(f"{len(heldout)} captions, model {arguments.model}, guidance {run.recipe.sample.guidance:g}")
    print(f"{'order':14} {'kid_efflite0':>12} {'between subsets':>16} {'fd_efflite0':>12} {'seconds':>8}")
    for name in known():
        started = time.monotonic()
        try:
            drawn = draw(run, arguments.model, cond_inputs_S, name)
        except UserError as error:
            print(f"{name:14} {error}")
            continue
        spread = kid(drawn, heldout, paired=True, seed=run.recipe.seed)
        distances = f"{spread.mean:12.4f} {spread.std:16.4f} {frechet(drawn, heldout):12.2f}"
        print(f"{name:14} {distances} {time.monotonic() - started:8.0f}", flush=True)


def draw(run: Run, model: str, cond_inputs_S: np.ndarray, order: str) -> np.ndarray:
    """Features of the drawings."""
    uri, settings = run.model_uri(model), SampleSettings.from_recipe(run.recipe.sample)
    tasks = [
        SamplingTask(
            EvalTarget("ordered", uri, cond_inputs_S[start : start + BATCH], start),
            run.vq_uri,
            settings,
            run.recipe.seed,
            run.recipe.parallel.precision,
            order,
            run_files(run.at()),
            uri,
        )
        for start in range(0, len(cond_inputs_S), BATCH)
    ]
    return np.concatenate([task.run().features_SF for task in tasks])


if __name__ == "__main__":
    main()
