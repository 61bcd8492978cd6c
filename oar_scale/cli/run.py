"""The verbs that take a recipe: the whole run, its stages, the recipe itself, the machine it would run on."""

from __future__ import annotations

import argparse
import os

from oar_scale.cli.common import Subparsers, add_verb, check_stage, count, load, minutes
from oar_scale.errors import UserError
from oar_scale.registry import STAGES


def add(verbs: Subparsers) -> None:
    """Add ``oar run``, the stages, ``recipe`` and ``doctor``."""
    run = add_verb(verbs, "run", "all stages of a recipe; finished ones are skipped", _run)
    which = run.add_mutually_exclusive_group()
    which.add_argument("--from", dest="start", metavar="STAGE", help="do this stage and all after it again; earlier results are set aside")
    which.add_argument("--only", metavar="STAGE", help="do this one stage again, and leave all others as they are")
    which.add_argument(
        "--undo", action="store_true", help="put back the results that a --from or --only has set aside and not replaced yet"
    )
    run.add_argument("--yes", action="store_true", help="with --from, --only and --undo: do not ask")
    run.add_argument(
        "--minutes",
        type=minutes,
        metavar="M",
        help="begin no stage after M minutes; trainings and pools save and leave; code 75: stages are left",
    )
    for stage in STAGES.values():
        if not stage.training and not stage.own_options:
            add_verb(verbs, stage.verb or stage.name, stage.title, _stage).set_defaults(stage=stage.name)
    train = add_verb(verbs, "train", "one training stage", _stage)
    stages = ", ".join(stage.name for stage in STAGES.values() if stage.training)
    train.add_argument("--stage", default="pretrain", metavar="STAGE", help=f"{stages}, or one of an arm or a seed; default: %(default)s")
    train.set_defaults(verb="train")
    train.add_argument("--profile", type=count, default=0, metavar="N", help="where do N of the first steps go? A trace and a table")
    recipe = add_verb(verbs, "recipe", "print the resolved recipe", _recipe)
    recipe.add_argument("--origin", action="store_true", help="say which file and line set each value")
    doctor = add_verb(verbs, "doctor", "check packages, devices, kernels and, with a recipe, its storage", _doctor, needs_recipe=False)
    doctor.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    doctor.add_argument("--cluster", metavar="PROFILE", help="the nodes of a cluster instead of this machine: cluster/slurm or cluster/ray")
    doctor.add_argument("-p", dest="profile", action="append", default=[], metavar="KEY=VALUE", help="change a field of the profile")


def _run(arguments: argparse.Namespace) -> int:
    recipe = load(arguments)
    from oar_scale.pipeline import run_pipeline, undo_again
    from oar_scale.run.context import Run

    if arguments.undo and arguments.minutes:
        raise UserError("--minutes means nothing with --undo: leave it out")
    if arguments.undo:
        undo_again(Run(recipe), yes=arguments.yes)
        return 0
    run_pipeline(Run(recipe), start=arguments.start, only=arguments.only, yes=arguments.yes, minutes=arguments.minutes)
    return 0


def _stage(arguments: argparse.Namespace) -> None:
    """Run one stage, which resumes where it was interrupted; ``oar run --only`` does it again. A report is always written anew."""
    recipe = load(arguments)
    if "verb" in arguments:
        check_stage(recipe, arguments.stage, arguments.verb)
    from oar_scale.observe.console import Console
    from oar_scale.pipeline import run_pipeline, run_stage
    from oar_scale.run.context import Run

    if arguments.stage == "report":
        run_pipeline(Run(recipe), only=arguments.stage)
        return
    # Under torchrun each worker runs this command; the first one writes the console.
    rank = int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0
    console = Console() if rank == 0 else Console(open(os.devnull, "w"))  # noqa: SIM115 (as long as the process)
    run_stage(Run(recipe, console, getattr(arguments, "profile", 0), rank), arguments.stage)


def _recipe(arguments: argparse.Namespace) -> None:
    from oar_scale.config.loading import dump_recipe, recipe_origins

    recipe = load(arguments)
    if not arguments.origin:
        print(dump_recipe(recipe), end="")
        return
    for key, origin in recipe_origins(arguments.recipe, arguments.overrides).items():
        print(f"{key:45} {origin}")


def _doctor(arguments: argparse.Namespace) -> int:
    from oar_scale.doctor import report, run_doctor

    if arguments.profile and not arguments.cluster:
        raise UserError(f"-p {arguments.profile[0]} means nothing without --cluster, whose profile it changes: leave it out")
    if arguments.cluster:
        from oar_scale.launch.cluster_doctor import examine_cluster

        findings = examine_cluster(arguments.cluster, arguments.profile, arguments.recipe, arguments.overrides)
        return report(findings, as_json=arguments.json)
    return run_doctor(arguments.recipe, arguments.overrides, as_json=arguments.json)
