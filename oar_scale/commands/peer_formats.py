"""The formats of other projects that ``oar checkpoint import`` reads and ``export`` writes, and the files that both of them make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from oar_scale import __version__
from oar_scale.config.schema import FeaturesConfig, LabelsConfig, TextConfig
from oar_scale.errors import UserError
from oar_scale.generation.model_bundle import (
    CONFIG,
    FolderConfig,
    TokenizerNote,
)
from oar_scale.model import ModelSpec
from oar_scale.model.peer_weights import Family
from oar_scale.model.spec import ClassSpec, FeatureSpec
from oar_scale.storage import join, open_storage, write_json
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.maskgit_vq import MaskGITVQ
from oar_scale.tokenizers.peer_files import Wrapping
from oar_scale.tokenizers.peer_vq import export_llamagen_vq, export_maskgit_vq, import_llamagen_vq, import_maskgit_vq
from oar_scale.tokenizers.vq import VQTokenizer, vq_id


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


def implied_prompts(spec: ModelSpec) -> TextConfig | None:
    """The prompt settings that follow from the model alone; None where its prompts need an encoder that has to be named."""
    if isinstance(spec.condition, ClassSpec):
        return LabelsConfig(type="labels", classes=spec.condition.classes)
    if isinstance(spec.condition, FeatureSpec) and spec.condition.tower is None:
        return FeaturesConfig(type="features", width=spec.condition.width, rows=spec.condition.rows)
    return None


def tokenizer_note(vq: ImageTokenizer) -> TokenizerNote:
    """The entry about the image tokenizer in the configuration of an exported folder."""
    return TokenizerNote(kind=vq.kind, id=vq_id(vq), spec=vq.spec.model_dump(mode="json"))


def write_config(folder: str, config: FolderConfig) -> None:
    """Write the configuration of an exported folder, a path or ``s3://``."""
    write_json(join(folder, CONFIG), config.model_dump(mode="json"))


def library_version() -> str:
    """Name and version of this library, for the configuration of an exported folder."""
    return f"oar_scale {__version__}"
