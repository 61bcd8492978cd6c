"""``oar extract``: one order for every training image, by Ray actors or by the tasks of a job array."""

from __future__ import annotations

import argparse
import os

from oar_scale.cli.common import Subparsers, add_verb, check_stage, count, load, refuse_unused

SLURM = "SLURM_ARRAY_TASK_ID"


def add(verbs: Subparsers) -> None:
    """Add ``oar extract``."""
    verb = add_verb(verbs, "extract", "one order for every training image; resumes where it was interrupted", _extract)
    verb.add_argument("--stage", default="extract", metavar="STAGE", help="extract_ARM: the extraction of an arm; default: %(default)s")
    instead = verb.add_mutually_exclusive_group()
    instead.add_argument(
        "--status", action="store_true", help="how far it is, from any machine: rate, time left, cost, slow actors, poison"
    )
    instead.add_argument("--verify", action="store_true", help="read every table; those lost or damaged are made again by the next extract")
    instead.add_argument("--compare", action="store_true", help="measure the cheaper methods against the exact one")
    instead.add_argument(
        "--array",
        nargs="?",
        const="",
        metavar="I/N",
        help=f"be one of N processes that share the work without Ray (I from 0); without I/N: as {SLURM} and SLURM_ARRAY_TASK_COUNT say",
    )
    compare = verb.add_argument_group("with --compare")
    compare.add_argument("--images", type=count, default=64, metavar="N", help="training images to take; default: %(default)s")
    compare.add_argument("--finetune", type=count, default=0, metavar="STEPS", help="also train on the orders of each method; default: no")
    compare.add_argument("--out", metavar="FILE.json", help="write the figures as well")
    verb.set_defaults(verb=verb)


def _extract(arguments: argparse.Namespace) -> int:
    if arguments.compare:
        refuse_unused(arguments.verb, arguments, ("stage",), "with --compare, which takes the settings of the recipe")
    else:
        refuse_unused(arguments.verb, arguments, ("images", "finetune", "out"), "without --compare")
    recipe = load(arguments)
    check_stage(recipe, arguments.stage, "extract")
    task = None if arguments.array is None else _array_task(arguments.array)
    from oar_scale.run.context import Run

    if arguments.status:
        from oar_scale.commands.extraction_status import show_extraction_status

        show_extraction_status(Run(recipe), arguments.stage)
    elif arguments.verify:
        from oar_scale.commands.extraction_verify import verify_order_tables

        return verify_order_tables(Run(recipe), arguments.stage)
    elif arguments.compare:
        from oar_scale.studies.compare_extraction import run_compare

        run_compare(Run(recipe), images=arguments.images, out=arguments.out, finetune=arguments.finetune)
    else:
        from oar_scale.pipeline import run_stage
        from oar_scale.shard_pool.pool_types import ArrayTask

        run_stage(Run(recipe, array=ArrayTask(*task) if task else None), arguments.stage)
    return 0


def _array_task(given: str) -> tuple[int, int]:
    """The index of this process and the number of processes.

    Raises:
        UserError: not I/N, or not in a job array.
    """
    from oar_scale.errors import UserError

    if not given:
        task, count, first = (os.environ.get(name, "") for name in (SLURM, "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"))
        if not task or not count:
            raise UserError(f"--array: {SLURM} and SLURM_ARRAY_TASK_COUNT are not set: say which process this is, e.g. --array 0/4")
        return (int(task) - int(first or 0)) % int(count), int(count)
    index, _, of = given.partition("/")
    if not (index.isdecimal() and of.isdecimal() and int(index) < int(of)):
        raise UserError(f"--array {given}: I/N is needed, with I from 0 to N - 1, e.g. --array 0/4")
    return int(index), int(of)
