"""``oar distance``: two sets of images compared by their features."""

from __future__ import annotations

import argparse

from oar_scale.cli.common import Subparsers, count, seed


def add(verbs: Subparsers) -> None:
    """Add ``oar distance``."""
    text = "compare two sets of images: FID, KID, precision, recall and others"
    verb = verbs.add_parser("distance", help=text, description=text)
    verb.add_argument("samples", metavar="SAMPLES", help="a folder of images or of shards, s3://bucket/prefix, or an .npz of ADM's format")
    verb.add_argument("reference", metavar="REFERENCE", nargs="?", help="the same; also an .npz with statistics alone")
    verb.add_argument(
        "--features", default="efflite0", metavar="NAME", help="efflite0, inception, openclip:MODEL or timm:MODEL; default: %(default)s"
    )
    verb.add_argument("--weights", metavar="FILE", help="of the network; nothing is downloaded")
    verb.add_argument("--sha256", metavar="HASH", help="that the weights have, where they are not the published ones")
    verb.add_argument(
        "--metrics", metavar="A,B", help="fd (fid), sfd (sfid), kid, precision, recall, density, coverage, is, clip; default: all"
    )
    verb.add_argument(
        "--paired",
        choices=("caption", "name"),
        help="samples were drawn for the captions of the reference: kid leaves out pairs of one caption, or of one name",
    )
    verb.add_argument("--size", type=count, metavar="N", help="bring every image to its middle square of N x N first")
    verb.add_argument("--out", metavar="FILE.json", help="write the figures there as well")
    verb.add_argument("--cache", default="", metavar="FOLDER", help="of features (or s3://); default: ~/.cache/oar_scale/features")
    verb.add_argument(
        "--batch", type=count, default=64, metavar="N", help="images that go through the network at once; default: %(default)s"
    )
    verb.add_argument(
        "--kept",
        type=count,
        default=50_000,
        metavar="N",
        help="images a side, at most, for KID, precision ...; default: %(default)s",
    )
    verb.add_argument("--seed", type=seed, default=0, help="of random choices among images; default: %(default)s")
    verb.add_argument("--actors", type=count, metavar="N", help="a pool of N Ray actors; default: one process of this machine")
    verb.add_argument("--gpus-per-actor", type=float, default=0, metavar="G", help="0.5: two share a GPU; default: 0, the CPU")
    verb.add_argument("--export-npz", metavar="FILE", help="write the samples as ADM's evaluation reads them (arr_0)")
    verb.add_argument("--export-statistics", metavar="FILE", help="write mean and covariance of the samples' features (mu, sigma ...)")
    verb.set_defaults(run=_distance)


def _distance(arguments: argparse.Namespace) -> None:
    from oar_scale.commands.distance import DistanceRequest, measure_distance
    from oar_scale.evaluation.extractors import ExtractorSpec
    from oar_scale.text import say

    fields = ("samples", "reference", "size", "cache", "actors", "gpus_per_actor", "batch", "kept", "seed", "paired", "out")
    given = {name: getattr(arguments, name) for name in (*fields, "export_npz", "export_statistics")}
    metrics = tuple(name.strip() for name in arguments.metrics.split(",")) if arguments.metrics else ()
    extractor = ExtractorSpec(arguments.features, arguments.weights, arguments.sha256)
    measure_distance(DistanceRequest(extractor=extractor, metrics=metrics, **given), say)
