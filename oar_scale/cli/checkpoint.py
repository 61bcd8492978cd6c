"""``oar checkpoint``: what trainings have saved, and weights of other projects in, ours out."""

from __future__ import annotations

import argparse

from oar_scale.cli.common import Subparsers, add_model, count
from oar_scale.text import say

PEERS = ("randar", "llamagen-c2i", "llamagen-t2i", "arpg", "lpd", "llamagen-vq", "maskgit-vq")


def add(verbs: Subparsers) -> None:
    """Add ``oar checkpoint`` and its actions."""
    text = "what trainings have saved: list, verify, prune, compare; weights of other projects in, ours out"
    actions = verbs.add_parser("checkpoint", help=text, description=text).add_subparsers(metavar="ACTION", required=True)
    _add_management(actions)
    _add_content(actions)
    _add_exchange(actions)


def _add_management(actions: Subparsers) -> None:
    where = "a recipe, a run's folder, a folder or s3:// prefix above checkpoints, or one checkpoint (.../step-00000100)"
    text = "all checkpoints of a run"
    lists = actions.add_parser("list", help=text, description=text)
    lists.add_argument("where", help=where)
    lists.set_defaults(run=_list)

    text = "read every byte and compare it with the checksums; exit code 1 when something is wrong"
    verify = actions.add_parser("verify", help=text, description=text)
    verify.add_argument("where", help=where)
    verify.set_defaults(run=_verify)

    text = "remove checkpoints that are not kept, and what interrupted saves have left"
    prune = actions.add_parser("prune", help=text, description=f"{text}; never the newest committed one")
    prune.add_argument("where", help=where)
    prune.add_argument("--keep", type=count, metavar="N", help="the newest N; default: as the run's recipe says")
    prune.add_argument("--keep-every", type=count, metavar="M", help="with --keep: also the steps that are multiples of M")
    prune.add_argument("--keep-best", type=count, metavar="N", help="with --keep: also the N with the best held-out likelihood")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    prune.set_defaults(run=_prune)


def _add_content(actions: Subparsers) -> None:
    text = "compare two checkpoints: manifests, weights, moments"
    diff = actions.add_parser("diff", help=text, description=text)
    diff.add_argument("first", help="a checkpoint (.../step-00000100), local or s3://")
    diff.add_argument("second", help="another one; any ZeRO stage and number of workers")
    diff.set_defaults(run=_diff)

    text = "write a checkpoint in DeepSpeed's universal format, and compare it"
    convert = actions.add_parser("convert", help=text, description=f"{text}. To continue a run none is needed: oar converts by itself")
    convert.add_argument("checkpoint", help="a checkpoint (.../step-00000100), local or s3://")
    convert.add_argument("--out", required=True, help="a new folder")
    convert.set_defaults(run=_convert)


def _add_exchange(actions: Subparsers) -> None:
    text = "convert a checkpoint of another project"
    imports = actions.add_parser("import", help=text, description=text)
    imports.add_argument("kind", choices=PEERS)
    imports.add_argument("file", help=".safetensors, .pt, .pth or .bin; a path or s3://")
    imports.add_argument("--out", required=True, help="a new folder, or a new .safetensors file; for a tokenizer, the folder of its model")
    imports.add_argument("--heads", type=int, help="attention heads, where they are not those of the published sizes")
    imports.add_argument(
        "--grid", type=int, help="cells per side; default: 16, or what the file says, but lpd models can take another grid"
    )
    imports.add_argument("--text-rows", type=int, help="condition rows of llamagen-t2i; default: 120, or what the file says")
    imports.add_argument("--image-size", type=int, help="pixels, of a tokenizer; default: what its model draws, or 256")
    imports.add_argument("--instructed", action="store_true", default=None, help="make a model of LlamaGen's that can learn any order")
    imports.set_defaults(run=_import)

    text = "write a model for use elsewhere"
    exports = actions.add_parser("export", help=text, description=text)
    exports.add_argument("source", help="a model file, an exported folder, a run's folder, or a training checkpoint (.../step-00000100)")
    exports.add_argument("--out", required=True, help="a new folder, or for a peer's format a new file (.safetensors, .pt, .pth, .bin)")
    exports.add_argument("--format", choices=("folder", *PEERS), default="folder")
    _add_what(exports)
    exports.set_defaults(run=_export)

    text = "publish a model on the Hugging Face hub, in one commit"
    push = actions.add_parser("push", help=text, description=f"{text}; needs `hf auth login` or HF_TOKEN")
    push.add_argument("source", help="as of export")
    push.add_argument("target", metavar="hf://OWNER/NAME[@BRANCH][/FOLDER]", help="made where there is none")
    _add_what(push)
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private; default: as the account says")
    push.set_defaults(run=_push)


def _add_what(verb: argparse.ArgumentParser) -> None:
    add_model(verb, "which one of a run; default: ordered")
    verb.add_argument("--ema", action="store_true", help="of a training checkpoint: the moving average of the weights")
    verb.add_argument("--license", metavar="ID", help="of the weights, for the model card: cc-by-sa-4.0; default: as it is known")


def _import(arguments: argparse.Namespace) -> None:
    from oar_scale.commands.checkpoint_import import ImportOptions, import_checkpoint

    options = ImportOptions(
        heads=arguments.heads,
        grid=arguments.grid,
        text_rows=arguments.text_rows,
        image_size=arguments.image_size,
        instructed=arguments.instructed,
    )
    print(import_checkpoint(arguments.kind, arguments.file, arguments.out, options))


def _export(arguments: argparse.Namespace) -> None:
    from oar_scale.commands.checkpoint_export import export_checkpoint

    chosen = {"average": arguments.ema, "license_id": arguments.license}
    print(export_checkpoint(arguments.source, arguments.out, arguments.format, arguments.model, **chosen))


def _push(arguments: argparse.Namespace) -> None:
    from oar_scale.commands.checkpoint_export import push_checkpoint

    chosen = {"average": arguments.ema, "private": arguments.private, "license_id": arguments.license}
    print(push_checkpoint(arguments.source, arguments.target, arguments.model, **chosen))


def _list(arguments: argparse.Namespace) -> None:
    from oar_scale.commands.checkpoint_management import list_checkpoints

    say(list_checkpoints(arguments.where))


def _verify(arguments: argparse.Namespace) -> int:
    from oar_scale.commands.checkpoint_management import verify_checkpoints

    faults = 0
    for checkpoint, fault in verify_checkpoints(arguments.where):
        say(checkpoint if fault is None else f"{checkpoint}: {fault}")
        faults += fault is not None
    return int(faults > 0)


def _prune(arguments: argparse.Namespace) -> None:
    from oar_scale.commands.checkpoint_management import prune_checkpoints
    from oar_scale.distributed.checkpoints.retention import Keep
    from oar_scale.errors import UserError

    if arguments.keep is None and (arguments.keep_every or arguments.keep_best):
        raise UserError("--keep-every and --keep-best go with --keep: say how many of the newest are kept.")
    keep = Keep(arguments.keep, arguments.keep_every or 0, arguments.keep_best or 0) if arguments.keep else None
    say("\n".join(prune_checkpoints(arguments.where, keep, dry_run=arguments.dry_run)) or "nothing to remove")


def _diff(arguments: argparse.Namespace) -> None:
    from oar_scale.commands.checkpoint_content import diff_checkpoints

    say(diff_checkpoints(arguments.first, arguments.second))


def _convert(arguments: argparse.Namespace) -> None:
    from oar_scale.commands.checkpoint_content import convert_checkpoint

    print(convert_checkpoint(arguments.checkpoint, arguments.out))
