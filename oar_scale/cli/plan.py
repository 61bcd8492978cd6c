"""``oar plan``: will it fit, how long, what does it cost, what happens when a node dies? Imports no torch unless it is to trace."""

from __future__ import annotations

import argparse
import math

from oar_scale.cli.common import Subparsers, add_verb, count, seed


def add(verbs: Subparsers) -> None:
    """Add ``oar plan``."""
    verb = add_verb(verbs, "plan", "memory, time, cost and failures of a recipe on a cluster, before a GPU is touched", _plan)
    verb.add_argument("--gpu", help="h200, h100, a100, b200, l40s or cpu; default: h200, or cpu for a recipe that trains on CPUs")
    verb.add_argument("--nodes", type=count, metavar="N", help="default: as many as the recipe's workers fill")
    verb.add_argument("--gpus-per-node", type=count, metavar="N", help="default: 8, or fewer where the recipe has fewer workers")
    verb.add_argument(
        "--images", type=_whole, metavar="N", help="training images (1e9 will do); default: as the run's shards say, or the data set"
    )
    verb.add_argument("--mfu", type=float, metavar="SHARE", help="of the peak while computing; default: published shares by model size")
    verb.add_argument("--price", type=float, metavar="X", help="of a GPU for an hour")
    verb.add_argument("--failures-per-gpu-year", type=float, metavar="X", help="that stop a training job")
    verb.add_argument(
        "--assume", action="append", default=[], metavar="KEY=VALUE", help="replace any other assumption; the plan prints them"
    )
    verb.add_argument(
        "--activations", action="store_true", help="trace the real model's activations on fake tensors instead of by formula (needs torch)"
    )
    verb.add_argument("--simulate", metavar="ranks=N[,failures=X]", help="act out the stream, failures and the extraction's stragglers")
    verb.add_argument("--seed", type=seed, default=0, help="of the failures, and of all that --simulate does; default: %(default)s")
    verb.add_argument("--json", action="store_true", help="print everything as JSON")


def _plan(arguments: argparse.Namespace) -> int:
    """1: training or extraction do not fit as the recipe is written, and were planned with other settings."""
    from oar_scale.planning.plan import PlanOptions, make_plan
    from oar_scale.planning.plan_report import as_json, as_text

    options = PlanOptions(
        gpu=arguments.gpu,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        images=arguments.images,
        mfu=arguments.mfu,
        price=arguments.price,
        failures_per_gpu_year=arguments.failures_per_gpu_year,
        assume=arguments.assume,
        activations=arguments.activations,
        simulate=arguments.simulate,
        seed=arguments.seed,
    )
    plan = make_plan(arguments.recipe, arguments.overrides, options)
    print(as_json(plan) if arguments.json else as_text(plan))
    return 0 if plan.fits else 1


def _whole(text: str) -> int:
    """Parse a number of images, which may be written as 1e9."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < math.inf or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1, e.g. 1281167 or 1e9")
    return int(value)
