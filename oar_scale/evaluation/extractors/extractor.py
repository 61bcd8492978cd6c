"""What an extractor is: a network that turns images into features, and the weights that it was loaded with.

pooled     what Frechet distance, KID, precision, recall, density and coverage compare
spatial    what sFID compares: some channels of a layer that still has places
logits     of a classifier, for the Inception Score
captions   embeddings of the images' captions, for the CLIP score
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from oar_scale.errors import UserError
from oar_scale.tokenizers.peer_files import read_peer_file

Layer = Literal["pooled", "spatial", "logits", "captions"]
LAYERS: tuple[Layer, ...] = ("pooled", "spatial", "logits", "captions")
Layers = dict[Layer, Tensor]
"""float32 [B, F] on the CPU, for each layer that the extractor has."""


@dataclass(frozen=True)
class ExtractorSpec:
    """Which extractor, as a recipe or a command line says it."""

    name: str = "efflite0"
    """``efflite0``, ``inception``, ``openclip:MODEL`` or ``timm:MODEL``."""
    weights: str | None = None
    """A local file; None for the extractor that comes with its weights."""
    sha256: str | None = None
    """The hash that the weights are expected to have."""


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights that has been hashed."""

    path: str
    sha256: str


class Extractor(ABC):
    """A loaded network, on the CPU until it is moved. Made by :func:`oar_scale.evaluation.extractors.load_extractor`."""

    needs_weights: ClassVar[bool] = True
    takes_model: ClassVar[bool] = False
    """Whether its name goes on after a colon."""
    preprocessing: ClassVar[str]
    """What is done to an image before the network sees it, in words; part of the extractor's id."""
    label: str
    """Ends the names of figures: ``fd_LABEL``."""
    standard: bool = False
    """Whether distances on these features are what is published as FID and KID."""
    network: nn.Module
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def __init__(self, model: str, weights: WeightsFile | None) -> None:
        """Load it. Raises UserError without weights that it needs, or with those of another network."""

    def to(self, device: torch.device | str) -> None:
        """Move the network."""
        self.device = torch.device(device)
        self.network.to(self.device)

    @torch.inference_mode()
    def images(self, images_BHW3: Tensor) -> Layers:
        """Features of a batch of uint8 RGB images of one size."""
        with exact_convolutions():
            return self.layers(images_BHW3.to(self.device))

    @abstractmethod
    def layers(self, images_BHW3: Tensor) -> Layers:
        """The same, of images on the network's device; without gradients."""

    def captions(self, texts: Sequence[str]) -> Tensor | None:
        """Embeddings of captions, float32 [B, F] on the CPU; None for a network that reads no text."""
        return None


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions in float32, also on a GPU: PyTorch rounds theirs to 10 bits (TF32), and features differ in the third digit."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def hashed(path: str, expected: str | None) -> WeightsFile:
    """A weights file with the SHA-256 of its bytes.

    Raises:
        UserError: no such file, or another hash than ``expected``.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file of weights. Nothing is downloaded: fetch the file and name it (--weights FILE).")
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if expected is not None and digest != expected.lower():
        raise UserError(f"{path}: its SHA-256 is {digest}, and {expected} was asked for. Copy it again, or name the hash that it has.")
    return WeightsFile(path, digest)


def fill(network: nn.Module, file: WeightsFile, what: str, but: tuple[str, ...] = ()) -> None:
    """Give a network the weights of a file, all of them and no other; then it is frozen, in float32.

    Args:
        what: the network, for errors.
        but: beginnings of the names of tensors that the file may have beside those.

    Raises:
        UserError: a file that cannot be read without running code from it, or the first tensor that is absent, unknown, of another shape,
            or holds values that are no numbers.
    """
    tensors, where, _ = read_peer_file(file.path)
    wanted = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    stored = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked") and not name.startswith(but)}
    for name in [*wanted, *stored]:
        has, needs = (str(tuple(side[name].shape)) if name in side else "absent" for side in (stored, wanted))
        if has != needs:
            raise UserError(f"{where}: tensor {name} is {has} in the file and {needs} in {what}. These are the weights of another network.")
    broken = next((name for name, value in stored.items() if not torch.isfinite(value.float()).all()), None)
    if broken:
        raise UserError(f"{where}: tensor {broken} holds values that are no numbers (NaN or infinite): a damaged file. Copy it again.")
    network.load_state_dict({name: value.float() for name, value in stored.items()}, strict=False)
    network.eval().requires_grad_(False)
