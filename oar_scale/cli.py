"""``oar``: thin verbs over the pipeline. Help and errors come without importing torch.

oar run RECIPE [-o key=value ...] [--from STAGE | --only STAGE]
oar data|tokenizer|tokens|extract|evaluate|report RECIPE      one stage
oar train RECIPE [--stage pretrain|finetune|control]
oar sample RECIPE [--model ordered] [--out FILE.png] [CAPTION ...]
oar recipe RECIPE [--origin]
oar checkpoint import KIND FILE --out FOLDER_OR_FILE          weights of RandAR, LlamaGen, MaskGIT's tokenizer
oar checkpoint export SOURCE --out PATH [--format FORMAT]     a folder for oar_scale.load, or a peer's file
oar doctor [RECIPE] [--json]                                  is this machine fit for a run?
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from oar_scale import __version__
from oar_scale.errors import UserError

if TYPE_CHECKING:
    from oar_scale.config.schema import Recipe

STAGES = {
    "data": "captioned images into WebDataset shards",
    "tokenizer": "train or load the image and text tokenizers",
    "tokens": "images into codes",
    "extract": "one order for every training image",
    "evaluate": "likelihoods, samples, distances",
    "report": "write report/index.html again",
}
TRAINING = ("pretrain", "finetune", "control")
MODELS = ("base", "anyorder", "control", "ordered")
PEERS = ("randar", "llamagen-c2i", "llamagen-t2i", "llamagen-vq", "maskgit-vq")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 the doctor says FAIL, 2 something the user can mend, 130 interrupted)."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "captions") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.captions += rest  # argparse gives up on captions that come after an option
    # DeepSpeed looks for helpers (ninja) on the PATH; they lie beside this interpreter, whose folder need not be on it.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    try:
        return int(arguments.run(arguments) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="oar", description="Ordered autoregressive image generation, trained at scale.")
    parser.add_argument("--version", action="version", version=f"oar_scale {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    run = _verb(verbs, "run", "all stages of a recipe; finished ones are skipped", _run)
    which = run.add_mutually_exclusive_group()
    which.add_argument("--from", dest="start", metavar="STAGE", help="do this stage and all after it again")
    which.add_argument("--only", metavar="STAGE", help="do this one stage again")
    for name, text in STAGES.items():
        _verb(verbs, name, text, _stage).set_defaults(stage=name)
    train = _verb(verbs, "train", "one training stage", _stage)
    train.add_argument("--stage", choices=TRAINING, default="pretrain")
    sample = _verb(verbs, "sample", "draw images for captions", _sample)
    sample.add_argument("captions", nargs="*", metavar="CAPTION", help="default: held-out captions")
    sample.add_argument("--model", choices=MODELS, default="ordered")
    sample.add_argument("--out", default="samples.png")
    recipe = _verb(verbs, "recipe", "print the resolved recipe", _recipe)
    recipe.add_argument("--origin", action="store_true", help="say which file and line set each value")
    _checkpoint_verbs(verbs)
    doctor = _verb(verbs, "doctor", "check packages, devices, kernels and, with a recipe, its storage", _doctor, needs_recipe=False)
    doctor.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    return parser


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, function: object, *, needs_recipe: bool = True
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text)
    verb.add_argument("recipe", nargs=None if needs_recipe else "?", help="a YAML file, e.g. recipes/quickstart.yaml")
    verb.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change a field of the recipe")
    verb.set_defaults(run=function)
    return verb


def _checkpoint_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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


def _load(arguments: argparse.Namespace) -> Recipe:
    """The recipe, before torch is imported: a typing error is answered at once."""
    from oar_scale.config.loading import load_recipe

    return load_recipe(arguments.recipe, arguments.overrides)


def _run(arguments: argparse.Namespace) -> None:
    recipe = _load(arguments)
    from oar_scale.pipeline import run_pipeline
    from oar_scale.stages.run import Run

    run_pipeline(Run(recipe), start=arguments.start, only=arguments.only)


def _stage(arguments: argparse.Namespace) -> None:
    """A stage on its own goes on where it was interrupted; ``oar run --only`` does it again. A report is always written anew."""
    recipe = _load(arguments)
    from oar_scale.pipeline import run_pipeline, run_stage
    from oar_scale.stages.run import Run

    if arguments.stage == "report":
        run_pipeline(Run(recipe), only="report")
    else:
        run_stage(Run(recipe), arguments.stage)


def _sample(arguments: argparse.Namespace) -> None:
    recipe = _load(arguments)
    from oar_scale.stages.run import Run
    from oar_scale.stages.sample import run_sample

    print(run_sample(Run(recipe), arguments.captions or None, arguments.model, arguments.out))


def _recipe(arguments: argparse.Namespace) -> None:
    from oar_scale.config.loading import dump_recipe, recipe_origins

    recipe = _load(arguments)
    if not arguments.origin:
        print(dump_recipe(recipe), end="")
        return
    for key, origin in recipe_origins(arguments.recipe, arguments.overrides).items():
        print(f"{key:45} {origin}")


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


def _doctor(arguments: argparse.Namespace) -> int:
    from oar_scale.doctor import run_doctor

    return run_doctor(arguments.recipe, arguments.overrides, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
