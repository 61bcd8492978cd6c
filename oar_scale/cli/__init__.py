"""``oar``: thin verbs over the pipeline. Help and errors come without importing torch.

oar run RECIPE [-o key=value ...] [--from STAGE | --only STAGE | --undo] [--yes]
oar prepare|tokenizer|tokens|evaluate|report RECIPE           one stage
oar evaluate --flexibility MODEL ... --out FOLDER             models in orders they were, and were not, trained for
oar extract RECIPE [--status|--verify|--compare|--array I/N]  an order for every training image
oar train RECIPE [--stage pretrain|finetune|control]
oar sample MODEL [CAPTION ... | --prompts FILE] [--out FILE.png | --out FOLDER]
oar edit IMAGE ... --mask FILE | --keep FILE | --box L,T,R,B | --expand SIDE=N --prompt TEXT
oar serve MODEL [--host HOST] [--port PORT]                   draw and edit in a browser, or by OpenAI's API for images
oar study build|serve|results ...                             which of two pictures do people prefer?
oar compare RUN ... [--json FILE] [--anyway]                  arms and seeds of runs side by side
oar orders RECIPE [--against FOLDER] [--train-head]             what the orders look like; a head that predicts them
oar recipe RECIPE [--origin]
oar status RUN                                                one screen about a run: its folder, recipe or s3://
oar tail RUN [-n N] [-f] [--kind K]                           its events as lines
oar distance SAMPLES REFERENCE [--features NAME]              FID, KID, precision, recall ... of two sets of images
oar data index|verify|stats URL                               shards in a folder or an S3 prefix, of any origin
oar data tokenize URL --out URL --tokenizer FILE              image shards into token shards
oar checkpoint list|verify|prune WHERE                        what trainings have saved; WHERE is a recipe, a run, a folder
oar checkpoint diff A B                                       settings, weights and moments of two checkpoints
oar checkpoint convert CHECKPOINT --out FOLDER                DeepSpeed's universal format
oar checkpoint import KIND FILE --out FOLDER_OR_FILE          weights of RandAR, LlamaGen, ARPG, LPD; their tokenizers, MaskGIT's
oar checkpoint export SOURCE --out PATH [--format FORMAT]     a folder for oar_scale.load, or a peer's file
oar checkpoint push SOURCE hf://OWNER/NAME                    the same folder on the Hugging Face hub
oar plan RECIPE --gpu h200 --nodes 8 [--simulate ranks=1024]   memory, time, cost and failures, before a GPU is touched
oar submit RECIPE --cluster PROFILE [--stages A,B] [--dry-run]  to a Slurm or a Ray cluster
oar jobs|logs|cancel|resubmit RUN                             its jobs there; oar jobs RUN ... --metrics for Prometheus
oar doctor [RECIPE] [--cluster PROFILE] [--json]              is this machine, or that cluster, fit for a run?
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import NoReturn

from oar_scale import __version__
from oar_scale.cli import (
    checkpoint,
    compare,
    data,
    distance,
    edit,
    evaluate,
    extract,
    observe,
    orders,
    plan,
    run,
    sample,
    serve,
    study,
    submit,
)
from oar_scale.cli.common import REQUEUE
from oar_scale.errors import Requeue, UserError
from oar_scale.runtime.gpu_settings import gpu_settings
from oar_scale.runtime.program import program_exit, say_user_error

NOBODY_READS = 141
"""The exit code that a shell gives a command that SIGPIPE ended: ``oar plan ... | head``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 done, 1 the doctor says FAIL, shards, order tables or checkpoints have faults, a recipe does not fit as written,
        2 something the user can fix, 75 stopped by a signal with its progress saved (run it again), 130 interrupted, 141 nobody reads on.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "captions") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.captions += rest  # argparse gives up on captions that come after an option
    # DeepSpeed looks for helpers (ninja) on the PATH; they lie beside this interpreter, whose folder need not be on it.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    os.environ.update(gpu_settings(os.environ))
    try:
        code = int(arguments.run(arguments) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return NOBODY_READS
    except UserError as error:
        return say_user_error(error)
    except Requeue as stop:
        print(f"stopped ({stop.reason}) with {stop.state}; run the same command again to resume", file=sys.stderr)
        return REQUEUE
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130


def command() -> NoReturn:
    """The program ``oar``. What the terminal cannot show of people's text and names is escaped."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with program_exit():
        sys.exit(main())


def _nobody_reads() -> bool:
    """Whether it is our output whose reader has gone; if so, what is left of it goes nowhere, or Python would complain at its exit."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # no file: somebody captures it
        return False
    door = select.poll()
    door.register(output, 0)  # POLLERR, which a pipe without a reader gives, needs no asking
    if not door.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="oar", description="Ordered autoregressive image generation, trained at scale.")
    parser.add_argument("--version", action="version", version=f"oar_scale {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for module in (run, sample, edit, serve, study, plan, submit, extract, evaluate, compare, observe, data, checkpoint, distance, orders):
        module.add(verbs)
    return parser
