"""``oar serve``: a page to draw with, and an HTTP API."""

from __future__ import annotations

import argparse

from oar_scale.cli.common import Subparsers, count, model_name, port
from oar_scale.errors import UserError
from oar_scale.text import say

EXTRA = ("fastapi", "uvicorn", "python_multipart")


def add(verbs: Subparsers) -> None:
    """Add ``oar serve``."""
    text = "draw and edit in a browser, or by OpenAI's API for images"
    verb = verbs.add_parser("serve", help=text, description=text)
    verb.add_argument("model", metavar="MODEL", help="a run's folder, an exported one (recipes/weights/emoji), or hf://owner/name")
    verb.add_argument("--which", type=model_name, metavar="NAME", help="model of a run, also an arm's; default: ordered")
    verb.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback want a token; default: %(default)s")
    verb.add_argument("--port", type=port, default=8000, help="0: any that is free; default: %(default)s")
    verb.add_argument("--token", help="what clients send as Authorization: Bearer; better in OAR_SERVE_TOKEN, which nobody else sees")
    verb.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:NUMBER of this machine; default: a GPU where there is one")
    verb.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the model; default: %(default)s")
    verb.add_argument("--slots", type=count, metavar="N", help="images that share a pass; default: up to 64, as memory allows")
    verb.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise UserError(f"oar serve needs the package {error.name}: pip install 'oar_scale[serve]'") from error
    from oar_scale.serve.server import ServeRequest, serve

    serve(ServeRequest(**{name: value for name, value in vars(arguments).items() if name != "run"}), say)
