"""The networks whose features sets of images are compared by. Another one is a class in a file of its own and an entry here."""

from __future__ import annotations

from oar_scale.errors import UserError
from oar_scale.evaluation.extractors.efflite0 import EffLite0
from oar_scale.evaluation.extractors.extractor import LAYERS, Extractor, ExtractorSpec, Layer, Layers, WeightsFile, hashed
from oar_scale.evaluation.extractors.inception import KNOWN, Inception
from oar_scale.evaluation.extractors.open_clip_tower import OpenClipTower
from oar_scale.evaluation.extractors.timm_model import TimmModel

EXTRACTORS: dict[str, type[Extractor]] = {
    "efflite0": EffLite0,
    "inception": Inception,
    "openclip": OpenClipTower,
    "timm": TimmModel,
}


def load_extractor(spec: ExtractorSpec) -> Extractor:
    """The network of a spec, on the CPU.

    Raises:
        UserError: no such extractor, no weights, or weights of another network or with another hash.
    """
    kind, model, weights = _opened(spec)
    return kind(model, weights)


def extractor_id(spec: ExtractorSpec) -> str:
    """Names all that decides about the features of an image, without loading the network. Raises UserError as :func:`load_extractor`."""
    kind, _, weights = _opened(spec)
    return f"{spec.name}, weights {weights.sha256 if weights else 'shipped'}, {kind.preprocessing}"


def _opened(spec: ExtractorSpec) -> tuple[type[Extractor], str, WeightsFile | None]:
    name, _, model = spec.name.partition(":")
    kind = EXTRACTORS.get(name)
    if kind is None or kind.takes_model != bool(model):
        forms = ", ".join(f"{name}:MODEL" if kind.takes_model else name for name, kind in EXTRACTORS.items())
        raise UserError(f"features {spec.name}: there is no such extractor. There are: {forms}.")
    if not kind.needs_weights:
        if spec.weights or spec.sha256:
            raise UserError(f"features {spec.name}: these come with their weights. Leave out --weights and --sha256.")
        return kind, model, None
    if spec.weights is None:
        return kind, model, None
    weights = hashed(spec.weights, spec.sha256)
    if kind is Inception and weights.sha256 != KNOWN and spec.sha256 is None:
        raise UserError(
            f"{weights.path}: these are not the weights that FID is defined with: their SHA-256 is\n  {weights.sha256}, that of\n"
            f"  pt_inception-2015-12-05-6726825d.pth is {KNOWN}.\n"
            f"Copy that file again. To use this one all the same (distances then are no FID): --sha256 {weights.sha256}"
        )
    return kind, model, weights


__all__ = ["EXTRACTORS", "LAYERS", "Extractor", "ExtractorSpec", "Layer", "Layers", "extractor_id", "load_extractor"]
