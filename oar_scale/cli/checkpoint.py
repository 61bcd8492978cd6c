"""``oar checkpoint``: weights of other projects in, ours out."""

from __future__ import annotations

import argparse

from oar_scale.cli.common import MODELS, Subparsers

PEERS = ("randar", "llamagen-c2i", "llamagen-t2i", "llamagen-vq", "maskgit-vq")


def add(verbs: Subparsers) -> None:
    text = "weights of other projects in, ours out"
    actions = verbs.add_parser("checkpoint", help=text, description=text).add_subparsers(metavar="ACTION", required=True)

    text = "convert a checkpoint of another project"
    imports = actions.add_parser("import", help=text, description=text)
    imports.add_argument("kind", choices=PEERS)
    imports.add_argument("file", help=".safetensors, .pt, .pth or .bin; a path or s3://")
    imports.add_argument("--out", required=True, help="a new folder, or a new .safetensors file; for a tokenizer, the folder of its model")
    imports.add_argument("--heads", type=int, help="attention heads, where they are not those of the published sizes")
    imports.add_argument("--grid", type=int, help="cells per side; default: 16, or what the file says")
    imports.add_argument("--text-rows", type=int, help="condition rows of llamagen-t2i; default: 120, or what the file says")
    imports.add_argument("--image-size", type=int, help="pixels, of a tokenizer; default: what its model draws, or 256")
    imports.add_argument("--instructed", action="store_true", default=None, help="make a model of LlamaGen's that can learn any order")
    imports.set_defaults(run=_import)

    text = "write a model for use elsewhere"
    exports = actions.add_parser("export", help=text, description=text)
    exports.add_argument("source", help="a model file, an exported folder, a run's folder, or a training checkpoint (.../step-00000100)")
    exports.add_argument("--out", required=True, help="a new folder, or for a peer's format a new file (.safetensors, .pt, .pth, .bin)")
    exports.add_argument("--format", choices=("folder", *PEERS), default="folder")
    exports.add_argument("--model", choices=MODELS, help="which one of a run; default: ordered")
    exports.set_defaults(run=_export)


def _import(arguments: argparse.Namespace) -> None:
    from oar_scale.stages.checkpoint import ImportOptions, run_import

    options = ImportOptions(
        heads=arguments.heads,
        grid=arguments.grid,
        text_rows=arguments.text_rows,
        image_size=arguments.image_size,
        instructed=arguments.instructed,
    )
    print(run_import(arguments.kind, arguments.file, arguments.out, options))


def _export(arguments: argparse.Namespace) -> None:
    from oar_scale.stages.checkpoint import run_export

    print(run_export(arguments.source, arguments.out, arguments.format, arguments.model))
