"""``oar orders``: what the extracted orders look like, and a head that predicts them."""

from __future__ import annotations

import argparse

from oar_scale.cli.common import Subparsers, add_model, add_verb, count, load, refuse_unused


def add(verbs: Subparsers) -> None:
    """Add ``oar orders``."""
    verb = add_verb(verbs, "orders", "what the extracted orders look like: maps, caption words, an animation, one page", _orders)
    verb.add_argument("--out", metavar="DIR", help="the folder that is written; default: report/orders in the run's folder")
    verb.add_argument("--images", type=count, default=4096, metavar="N", help="training images to look at, about; default: 4096")
    verb.add_argument(
        "--against", action="append", default=[], metavar="FOLDER", help="other order tables of the same images, to compare with"
    )
    verb.add_argument("--train-head", action="store_true", help="instead: train an order head on the orders, and say what it is worth")
    add_model(verb, "whose rows the head reads; default: %(default)s", default="any_order")
    verb.add_argument("--predict", action="store_true", help="instead, or after --train-head: write the head's orders of all images")
    verb.set_defaults(verb=verb)


def _orders(arguments: argparse.Namespace) -> None:
    if arguments.train_head or arguments.predict:
        refuse_unused(arguments.verb, arguments, ("images", "against", "out"), "with --train-head and --predict")
    if arguments.predict:
        refuse_unused(arguments.verb, arguments, ("model",), "with --predict, which takes the any-order model's head")
    if not arguments.train_head:
        refuse_unused(arguments.verb, arguments, ("model",), "without --train-head")
    recipe = load(arguments)
    from oar_scale.run.context import Run

    run = Run(recipe)
    if arguments.train_head:
        from oar_scale.studies.order_head import run_train_head

        run_train_head(run, arguments.model)
    if arguments.predict:
        from oar_scale.studies.order_head import run_predict

        run_predict(run)
    if not (arguments.train_head or arguments.predict):
        from oar_scale.studies.order_analysis import run_orders

        run_orders(run, images=arguments.images, against=arguments.against, out=arguments.out)
