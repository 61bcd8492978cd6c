"""The formats of other projects that ``oar checkpoint import`` reads and ``export`` writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.model.peer_weights import Family
from oar_scale.storage import open_storage
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.maskgit_vq import MaskGITVQ
from oar_scale.tokenizers.peer_files import Wrapping
from oar_scale.tokenizers.peer_vq import export_llamagen_vq, export_maskgit_vq, import_llamagen_vq, import_maskgit_vq
from oar_scale.tokenizers.vq import VQTokenizer


@dataclass(frozen=True)
class PeerTokenizer:
    """How the image tokenizer of another project is read and written."""

    stored: str
    """The kind under which our own files store it."""
    read: Callable[[dict[str, Tensor], int, str], ImageTokenizer]
    write: Callable[[Any], dict[str, Tensor]]
    wrapping: Wrapping


TRUNKS: tuple[Family, ...] = get_args(Family)
TOKENIZERS = {
    "llamagen-vq": PeerTokenizer(VQTokenizer.kind, import_llamagen_vq, export_llamagen_vq, "model"),
    "maskgit-vq": PeerTokenizer(MaskGITVQ.kind, import_maskgit_vq, export_maskgit_vq, "bare"),
}


def model_family(kind: str) -> Family:
    """The model family of a name on the command line, one of ``TRUNKS``."""
    return next(family for family in TRUNKS if family == kind)


def require_unused(uri: str) -> str:
    """``uri`` itself. Raises UserError where something exists there already."""
    if open_storage(uri).exists(uri):
        raise UserError(f"{uri}: there is a file of this name. Delete it, or choose another name.")
    return uri
