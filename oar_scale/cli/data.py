"""``oar data``: shards in a folder or an S3 prefix, of any origin."""

from __future__ import annotations

import argparse

from oar_scale.cli.common import Subparsers, count, refuse_unused, share


def add(verbs: Subparsers) -> None:
    """Add ``oar data`` and its actions."""
    text = "index, verify, describe and tokenize shards (a recipe's own images: oar prepare)"
    actions = verbs.add_parser("data", help=text, description=text).add_subparsers(metavar="ACTION", required=True)

    text = "write the manifest of shards that another program wrote"
    index = actions.add_parser("index", help=text, description=text)
    index.add_argument("url", help="a folder or s3://bucket/prefix")
    index.add_argument("--out", metavar="FILE", help="default: manifest.json beside the shards, where training looks for it")
    index.add_argument("--pattern", default="*.tar", help="which objects are shards; default: %(default)s")
    index.add_argument("--workers", type=count, default=8, help="shards read at the same time; default: %(default)s")
    index.add_argument("--grid", type=count, help="token shards: cells per side; default: the root of the number of codes")
    index.add_argument("--vocab-size", type=count, help="token shards: codes of the tokenizer; default: the largest code found, plus one")
    index.add_argument("--views", metavar="A,B", help="token shards: names of the views")
    index.add_argument("--tokenizer-id", help="token shards: which tokenizer made them")
    index.add_argument("--force", action="store_true", help="replace another manifest")
    index.set_defaults(run=_index)

    text = "compare every byte of a folder of shards with its manifest"
    verify = actions.add_parser("verify", help=text, description=text)
    verify.add_argument("url", help="a folder or s3://bucket/prefix")
    verify.add_argument("--manifest", metavar="FILE", help="default: manifest.json beside the shards")
    verify.add_argument("--workers", type=count, default=8, help="shards read at the same time; default: %(default)s")
    verify.add_argument("--decode", action="store_true", help="decode every picture as well, as tokenizing does; takes much longer")
    verify.set_defaults(run=_verify)

    text = "counts, captions, image sizes, codes and labels of a folder of shards, with or without a manifest"
    stats = actions.add_parser("stats", help=text, description=text)
    stats.add_argument("url", help="a folder or s3://bucket/prefix")
    how_many = stats.add_mutually_exclusive_group()
    how_many.add_argument("--shards", type=count, default=4, help="how many of the first shards are read; default: %(default)s")
    how_many.add_argument("--all", action="store_true", help="read all shards")
    stats.add_argument("--pattern", default="*.tar", help="which objects are shards, where there is no manifest; default: %(default)s")
    stats.add_argument("--grid", metavar="FILE.png", help="draw some samples into this file")
    stats.add_argument("--tokenizer", metavar="FILE", help="image tokenizer that decodes the codes of token shards for --grid")
    stats.add_argument("--json", action="store_true", help="print JSON instead of lines")
    stats.set_defaults(run=_stats, verb=stats)

    text = "image shards into token shards, by a pool of Ray actors; resumes where it was interrupted"
    tokenize = actions.add_parser("tokenize", help=text, description=text)
    tokenize.add_argument("url", help="image shards with a manifest: a folder or s3://bucket/prefix")
    tokenize.add_argument("--out", required=True, metavar="URL", help="where the token shards go")
    tokenize.add_argument("--tokenizer", required=True, metavar="FILE", help="weights of the image tokenizer (.safetensors)")
    tokenize.add_argument("--views", default="center", metavar="A,B", help="variants of each image; default: %(default)s")
    tokenize.add_argument("--actors", type=count, default=2, help="processes that tokenize; default: %(default)s")
    tokenize.add_argument("--max-bad-fraction", type=share, default=0.01, help="share of bad samples that stops; default: %(default)s")
    tokenize.set_defaults(run=_tokenize)


def _index(arguments: argparse.Namespace) -> None:
    from oar_scale.commands.shard_commands import index_shards
    from oar_scale.data.index import IndexJob

    options = {name: getattr(arguments, name) for name in ("out", "pattern", "workers", "grid", "vocab_size", "tokenizer_id", "force")}
    index_shards(IndexJob(arguments.url, views=tuple(arguments.views.split(",")) if arguments.views else None, **options))


def _verify(arguments: argparse.Namespace) -> int:
    from oar_scale.commands.shard_commands import verify_shards

    return verify_shards(arguments.url, arguments.manifest, arguments.workers, arguments.decode)


def _stats(arguments: argparse.Namespace) -> None:
    if not arguments.grid:
        refuse_unused(arguments.verb, arguments, ("tokenizer",), "without --grid")
    from oar_scale.commands.shard_commands import show_shard_statistics

    show_shard_statistics(
        arguments.url, arguments.pattern, None if arguments.all else arguments.shards, arguments.grid, arguments.tokenizer, arguments.json
    )


def _tokenize(arguments: argparse.Namespace) -> None:
    from oar_scale.commands.shard_commands import tokenize_shards

    tokenize_shards(arguments.url, arguments.out, arguments.tokenizer, arguments.views, arguments.actors, arguments.max_bad_fraction)
