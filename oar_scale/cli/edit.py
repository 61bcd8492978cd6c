"""``oar edit``: parts of pictures are drawn anew."""

from __future__ import annotations

import argparse
import os

from oar_scale.cli.common import Subparsers, count, model_name, seed, share
from oar_scale.errors import UserError

SHIPPED = "recipes/weights/emoji"
"""The model where none is given, of a copy of the repository that the command is run in."""


def add(verbs: Subparsers) -> None:
    """Add ``oar edit``."""
    text = "draw a part of pictures anew; the rest stays as it is"
    verb = verbs.add_parser("edit", help=text, description=text)
    verb.add_argument("images", nargs="+", metavar="IMAGE", help="PNG, JPEG or WebP, of any size")
    what = verb.add_mutually_exclusive_group()
    what.add_argument("--mask", action="append", metavar="FILE", help="white is drawn, black kept; one for all pictures, or one for each")
    what.add_argument("--keep", action="append", metavar="FILE", help="the other way round: white is kept, black drawn")
    what.add_argument("--box", type=_box, metavar="L,T,R,B", help="left, top, right, bottom in pixels: what is inside is drawn")
    what.add_argument("--expand", type=_margins, metavar="SIDE=N,...", help="the picture grows by so many pixels: left=64,top=0")
    text = "a mask and the prompt that its white part is drawn from; several are drawn one after the other"
    what.add_argument("--region", action="append", nargs=2, metavar=("FILE", "PROMPT"), help=text)
    verb.add_argument("--prompt", help="what the pictures show; of a model of classes, the label")
    text = f"a run, an exported folder or hf://owner/name; default: {SHIPPED}"
    verb.add_argument("--model", metavar="PATH", help=text)
    verb.add_argument("--which", type=model_name, metavar="NAME", help="model of a run, also an arm's; default: ordered")
    verb.add_argument("--variations", type=count, default=1, metavar="N", help="drawings of each picture; default: %(default)s")
    verb.add_argument("--strength", type=share, default=1.0, metavar="S", help="share of what is marked that is drawn; default: all")
    text = "draw pictures larger than the model's square at their own resolution, by overlapping windows; default: only with --expand"
    verb.add_argument("--windows", action=argparse.BooleanOptionalAction, help=text)
    verb.add_argument(
        "--feather", type=float, metavar="P", help="width of the seam, in the model's pixels; default: hard, of windows a cell"
    )
    verb.add_argument("--seed", type=seed, default=0, help="another one draws others; default: %(default)s")
    text = "how it is drawn: sample.steps=16, sample.order=halton; default: as the model's recipe says"
    verb.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=text)
    verb.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:NUMBER of this machine; default: a GPU where there is one")
    verb.add_argument("--out", default="edited", metavar="PATH", help="a folder, or a PNG file for a single drawing; default: %(default)s")
    verb.set_defaults(run=_edit)


def _edit(arguments: argparse.Namespace) -> None:
    from oar_scale.commands.edit import EditRequest, edit_files
    from oar_scale.generation.canvas import Margins

    if not (arguments.mask or arguments.keep or arguments.box or arguments.expand or arguments.region) and arguments.strength == 1:
        raise UserError(
            "nothing says what is drawn: one of --mask, --keep, --box, --expand and --region is required, "
            "or --strength below 1, which varies the whole picture"
        )
    if (arguments.prompt is None) != bool(arguments.region):
        raise UserError("--prompt is required, but with --region FILE PROMPT, where each region has its own")
    if arguments.expand and arguments.strength < 1:
        raise UserError(f"--strength {arguments.strength:g} means nothing with --expand, whose margins are drawn as a whole: leave it out")
    if arguments.model is None and not os.path.isdir(SHIPPED):
        raise UserError(f"--model is required here: {SHIPPED}, the model without it, is not in this folder ({os.getcwd()})")
    arguments.model = arguments.model or SHIPPED
    chosen = {name: value for name, value in vars(arguments).items() if name != "run"}
    chosen["expand"] = arguments.expand and Margins(**arguments.expand)
    edit_files(EditRequest(**chosen), say=print)


def _margins(text: str) -> dict[str, int]:
    pairs = [side.partition("=") for side in text.split(",")]
    margins = {side.strip(): int(pixels) for side, _, pixels in pairs if pixels.strip().isdecimal()}
    if len(margins) != len(pairs) or not margins.keys() <= {"left", "top", "right", "bottom"}:
        raise argparse.ArgumentTypeError(f"{text!r} names no sides and pixels, as in left=64,top=0 (left, top, right, bottom)")
    return margins


def _box(text: str) -> tuple[int, int, int, int]:
    sides = text.split(",")
    if len(sides) != 4 or not all(side.strip().lstrip("-").isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} are no four whole numbers with commas between: left,top,right,bottom")
    left, top, right, bottom = map(int, sides)
    return left, top, right, bottom
