"""``oar sample``: pictures for prompts."""

from __future__ import annotations

import argparse
from functools import partial

from oar_scale.cli.common import Subparsers, add_model, count, refuse_unused, seed


def add(verbs: Subparsers) -> None:
    """Add ``oar sample``."""
    text = "draw pictures for prompts"
    verb = verbs.add_parser("sample", help=text, description=text)
    verb.add_argument("target", metavar="MODEL", help="a recipe, the folder of a run, an exported folder, or hf://owner/name")
    verb.add_argument(
        "captions", nargs="*", metavar="CAPTION", help="of a model of classes, a label; default: held-out captions of the run"
    )
    verb.add_argument(
        "--prompts", metavar="FILE", help=".txt with a prompt a line; .csv or .jsonl with prompt, and number or seed if wanted"
    )
    verb.add_argument("--labels", choices=["balanced"], help="of a model of classes: every label equally often, --images pictures in all")
    verb.add_argument("--images", type=count, metavar="N", help="with --labels: 50000 for published distances (docs/evaluation.md)")
    add_model(verb, "which one of the run; default: ordered")
    verb.add_argument(
        "--out", metavar="PATH", help="a .png: one contact sheet; else a folder (or s3://): a file each; default: by the number"
    )
    verb.add_argument("--grid", action="store_true", help="a contact sheet, however many prompts there are")
    verb.add_argument("--frames", metavar="FILE", help="also a .gif or .webp in which the pictures appear cell by cell, in their order")
    verb.add_argument("--count", type=count, metavar="N", help="drawings of each prompt; default: 4 on a contact sheet, else 1")
    verb.add_argument("--seed", type=seed, default=0, help="another one draws others; default: %(default)s")
    verb.add_argument("--order", metavar="POLICY", help="the way through the cells, e.g. halton; default: sample.order")
    verb.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="another setting: sample.top_p=0.9")
    verb.add_argument("--batch", type=count, default=32, metavar="N", help="pictures drawn at once; default: %(default)s")
    verb.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:NUMBER of this machine; default: a GPU where there is one")
    verb.add_argument("--precision", choices=["bf16", "fp32"], help="of the model; default: parallel.precision of the run, else fp32")
    verb.add_argument("--again", metavar="FILE.png", help="draw the picture of this file once more, as it says how it was drawn")
    pool = verb.add_argument_group("for very many prompts")
    pool.add_argument("--actors", type=count, metavar="N", help="draw in a pool of N Ray actors; --out gets tars (png, txt, json); resumes")
    pool.add_argument("--gpus-per-actor", type=float, default=0, metavar="G", help="0.5: two share a GPU; default: 0, the CPU")
    pool.add_argument("--per-shard", type=count, default=1000, metavar="N", help="pictures of a tar, about; default: %(default)s")
    pool.add_argument("--status", action="store_true", help="how far the pool is that writes into --out, from any machine")
    verb.set_defaults(run=partial(_sample, verb))


def _sample(verb: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    _refuse_unused(verb, arguments)
    if arguments.target.lower().endswith((".yaml", ".yml")):  # a typing error is answered at once, before torch is imported
        from oar_scale.config.loading import load_recipe

        load_recipe(arguments.target, arguments.overrides)
    from oar_scale.commands.sample import SampleRequest, draw_again, sample_pictures
    from oar_scale.text import say

    others = ("run", "again", "actors", "gpus_per_actor", "per_shard", "status", "labels")
    request = SampleRequest(**{name: value for name, value in vars(arguments).items() if name not in others})
    if arguments.actors or arguments.status:
        from oar_scale.commands.sample_pool import sample_with_actors, show_sampling_status

        if not arguments.status:
            return sample_with_actors(request, arguments.actors, arguments.gpus_per_actor, arguments.per_shard, say)
        show_sampling_status(request, say)
        return 0
    if arguments.again:
        say(draw_again(arguments.again, request))
    else:
        sample_pictures(request, say)
    return 0


_OF_DRAWING = ("captions", "prompts", "labels", "images", "count", "seed", "order", "batch", "precision")
_OF_SHEETS, _OF_POOLS = ("grid", "frames", "device"), ("gpus_per_actor", "per_shard")


def _refuse_unused(verb: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Raise UserError for an option that would do nothing."""
    from oar_scale.errors import UserError

    if (arguments.labels is None) != (arguments.images is None):
        raise UserError("--labels balanced and --images N belong together: so many pictures, every label equally often")
    if arguments.labels and arguments.count:
        raise UserError("--count means nothing with --labels, which says how many pictures are drawn in all: leave it out")
    unused: tuple[str, ...]
    if arguments.again:
        way, unused = "with --again, the file says what is drawn", (*_OF_DRAWING, "grid", "frames", *_OF_POOLS, "actors", "status")
    elif arguments.actors:
        way, unused = "with --actors, a pool draws into tars", _OF_SHEETS
    elif arguments.status:
        way, unused = "with --status, nothing is drawn", _OF_SHEETS
    else:
        way, unused = "without --actors", _OF_POOLS
    refuse_unused(verb, arguments, unused, way)
    changed = next((each for each in arguments.overrides if each.startswith("sample.")), None)
    if arguments.again and changed:
        raise UserError(f"-o {changed} means nothing {way}: leave it out")
