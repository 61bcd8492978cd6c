"""``oar evaluate``: the models of a run on held-out images; with ``--flexibility`` any models, in any orders."""

from __future__ import annotations

import argparse

from oar_scale.cli.common import REQUEUE, Subparsers, add_verb, count, load, minutes, refuse_unused
from oar_scale.registry import STAGES


def add(verbs: Subparsers) -> None:
    """Add ``oar evaluate``."""
    text = f"{STAGES['evaluate'].title} of a run's models; with --flexibility: any models, in any orders"
    verb = add_verb(verbs, "evaluate", text, _evaluate, needs_recipe=False)
    group = verb.add_argument_group("any models, in orders they were and were not trained for (docs/flexibility.md)")
    group.add_argument(
        "--flexibility",
        nargs="+",
        metavar="MODEL",
        help="RUN:NAME, an exported folder, or a model file; LABEL=MODEL,MODEL,...: an arm, the models of its seeds; RUN:all: all of a run",
    )
    group.add_argument("--out", metavar="FOLDER", help="is written: index.html, flexibility.json; what is in it is not measured again")
    group.add_argument(
        "--run", dest="of_run", metavar="RUN", help="whose images; a recipe or a run's folder; default: the first MODEL's run"
    )
    group.add_argument("--split", default="heldout", help="which images; default: %(default)s")
    group.add_argument("--images", type=count, default=256, metavar="N", help="how many; default: %(default)s")
    group.add_argument("--against", metavar="LABEL", help="whom the others are compared with; default: control, else the first MODEL")
    group.add_argument("--chapters", default="likelihood,samples,edits", metavar="A,B", help="what is measured; default: %(default)s")
    group.add_argument(
        "--sweep", metavar="GRID", help='"temperature=0.8,1;guidance=1,2,4": each arm also at its best, chosen on other images'
    )
    group.add_argument("--features", default="efflite0", metavar="NAME", help="as of oar distance; default: %(default)s")
    group.add_argument("--weights", metavar="FILE", help="of that network")
    group.add_argument("--sha256", metavar="HASH", help="that the weights have, where they are not the published ones")
    group.add_argument("--minutes", type=minutes, metavar="M", help="begin nothing after M minutes; the same command goes on from there")
    verb.set_defaults(verb=verb)


def _evaluate(arguments: argparse.Namespace) -> int:
    from oar_scale.errors import UserError

    if not arguments.flexibility:
        refuse_unused(arguments.verb, arguments, _OPTIONS, "without --flexibility")
        if arguments.recipe is None:
            raise UserError("oar evaluate: which run? oar evaluate RECIPE, or oar evaluate --flexibility MODEL ... --out FOLDER")
        recipe = load(arguments)
        from oar_scale.pipeline import run_stage
        from oar_scale.run.context import Run

        run_stage(Run(recipe), "evaluate")
        return 0
    if arguments.recipe is not None or arguments.overrides:
        raise UserError("--flexibility takes no recipe and no -o: --run says whose images are measured")
    if arguments.out is None:
        raise UserError("--flexibility wants --out FOLDER, which is written")
    from oar_scale.evaluation.extractors import ExtractorSpec
    from oar_scale.studies.flexibility import FlexibilityRequest, run_flexibility

    done = run_flexibility(
        FlexibilityRequest(
            models=tuple(arguments.flexibility),
            out=arguments.out,
            run=arguments.of_run,
            split=arguments.split,
            images=arguments.images,
            against=arguments.against,
            chapters=tuple(arguments.chapters.split(",")),
            sweep=arguments.sweep,
            extractor=ExtractorSpec(arguments.features, arguments.weights, arguments.sha256),
            minutes=arguments.minutes,
        )
    )
    return 0 if done else REQUEUE


_OPTIONS = ("out", "of_run", "split", "images", "against", "chapters", "sweep", "features", "weights", "sha256", "minutes")
