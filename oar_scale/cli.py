"""``oar``: thin verbs over the pipeline. Help and errors come without importing torch.

oar run RECIPE [-o key=value ...] [--from STAGE | --only STAGE]
oar prepare|tokenizer|tokens|extract|evaluate|report RECIPE   one stage
oar train RECIPE [--stage pretrain|finetune|control]
oar sample RECIPE [--model ordered] [--out FILE.png] [CAPTION ...]
oar recipe RECIPE [--origin]
oar data index|verify|stats URL                               shards in a folder or an S3 prefix, whoever wrote them
oar data tokenize URL --out URL --tokenizer FILE              image shards into token shards
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
    "prepare": "captioned images into WebDataset shards",
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
    """Run the command line.

    Returns:
        The exit code: 0 done, 1 the doctor says FAIL or shards have faults, 2 something the user can mend, 130 interrupted.
    """
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
        _verb(verbs, name, text, _stage).set_defaults(stage="data" if name == "prepare" else name)
    train = _verb(verbs, "train", "one training stage", _stage)
    train.add_argument("--stage", choices=TRAINING, default="pretrain")
    sample = _verb(verbs, "sample", "draw images for captions", _sample)
    sample.add_argument("captions", nargs="*", metavar="CAPTION", help="default: held-out captions")
    sample.add_argument("--model", choices=MODELS, default="ordered")
    sample.add_argument("--out", default="samples.png")
    recipe = _verb(verbs, "recipe", "print the resolved recipe", _recipe)
    recipe.add_argument("--origin", action="store_true", help="say which file and line set each value")
    _data_verbs(verbs)
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


def _data_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "look after shards (a recipe's own images: oar prepare)"
    actions = verbs.add_parser("data", help=text, description=text).add_subparsers(metavar="ACTION", required=True)

    text = "write the manifest of shards that another program wrote"
    index = actions.add_parser("index", help=text, description=text)
    index.add_argument("url", help="a folder or s3://bucket/prefix")
    index.add_argument("--out", metavar="FILE", help="default: manifest.json beside the shards, where training looks for it")
    index.add_argument("--pattern", default="*.tar", help="which objects are shards; default: %(default)s")
    index.add_argument("--workers", type=_count, default=8, help="shards read at the same time; default: %(default)s")
    index.add_argument("--grid", type=_count, help="token shards: cells per side; default: the root of the number of codes")
    index.add_argument("--vocab-size", type=_count, help="token shards: codes of the tokenizer; default: the largest code found, plus one")
    index.add_argument("--views", metavar="A,B", help="token shards: names of the views")
    index.add_argument("--tokenizer-id", help="token shards: which tokenizer made them")
    index.add_argument("--force", action="store_true", help="replace another manifest")
    index.set_defaults(run=_index)

    text = "compare every byte of a folder of shards with its manifest"
    verify = actions.add_parser("verify", help=text, description=text)
    verify.add_argument("url", help="a folder or s3://bucket/prefix")
    verify.add_argument("--manifest", metavar="FILE", help="default: manifest.json beside the shards")
    verify.add_argument("--workers", type=_count, default=8, help="shards read at the same time; default: %(default)s")
    verify.set_defaults(run=_verify)

    text = "counts, captions, image sizes, codes and labels of a folder of shards, with or without a manifest"
    stats = actions.add_parser("stats", help=text, description=text)
    stats.add_argument("url", help="a folder or s3://bucket/prefix")
    how_many = stats.add_mutually_exclusive_group()
    how_many.add_argument("--shards", type=_count, default=4, help="how many of the first shards are read; default: %(default)s")
    how_many.add_argument("--all", action="store_true", help="read all shards")
    stats.add_argument("--pattern", default="*.tar", help="which objects are shards, where there is no manifest; default: %(default)s")
    stats.add_argument("--grid", metavar="FILE.png", help="draw some samples into this file")
    stats.add_argument("--tokenizer", metavar="FILE", help="image tokenizer that decodes the codes of token shards for --grid")
    stats.add_argument("--json", action="store_true", help="print JSON instead of lines")
    stats.set_defaults(run=_stats)

    text = "image shards into token shards, by a pool of Ray actors; goes on where it was interrupted"
    tokenize = actions.add_parser("tokenize", help=text, description=text)
    tokenize.add_argument("url", help="image shards with a manifest: a folder or s3://bucket/prefix")
    tokenize.add_argument("--out", required=True, metavar="URL", help="where the token shards go")
    tokenize.add_argument("--tokenizer", required=True, metavar="FILE", help="weights of the image tokenizer (.safetensors)")
    tokenize.add_argument("--views", default="center", metavar="A,B", help="variants of each image; default: %(default)s")
    tokenize.add_argument("--actors", type=_count, default=2, help="processes that tokenise; default: %(default)s")
    tokenize.set_defaults(run=_tokenize)


def _count(text: str) -> int:
    """A number of things, at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


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


def _index(arguments: argparse.Namespace) -> None:
    from oar_scale.data.commands import run_index
    from oar_scale.data.index import IndexJob

    options = {name: getattr(arguments, name) for name in ("out", "pattern", "workers", "grid", "vocab_size", "tokenizer_id", "force")}
    run_index(IndexJob(arguments.url, views=tuple(arguments.views.split(",")) if arguments.views else None, **options))


def _verify(arguments: argparse.Namespace) -> int:
    from oar_scale.data.commands import run_verify

    return run_verify(arguments.url, arguments.manifest, arguments.workers)


def _stats(arguments: argparse.Namespace) -> None:
    from oar_scale.data.commands import run_stats

    run_stats(
        arguments.url, arguments.pattern, None if arguments.all else arguments.shards, arguments.grid, arguments.tokenizer, arguments.json
    )


def _tokenize(arguments: argparse.Namespace) -> None:
    from oar_scale.data.commands import run_tokenize

    run_tokenize(arguments.url, arguments.out, arguments.tokenizer, arguments.views, arguments.actors)


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
