"""What every image tokenizer can do: images in [-1, 1] to codes in raster order, and back.

    image [3, H, W] in [-1, 1]  --latent-->  [C, G, G]  --codes-->  G*G codes  --decode-->  image

The two kinds are :class:`oar_scale.tokenizers.vq.VQTokenizer` (LlamaGen's family, trained here or imported) and
:class:`oar_scale.tokenizers.maskgit_vq.MaskGITVQ` (imported). ``vq.load_vq`` opens a file of either.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from oar_scale.errors import UserError


class TokenizerSpec(BaseModel):
    """The settings that fix the shape of a tokenizer; stored with its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    latent_channels: int = 256
    codebook_size: int

    @property
    def grid(self) -> int:
        """Cells per side."""
        return int(self.image_size // 2 ** (len(self.multipliers) - 1))


class Codebook(Protocol):
    """The bottleneck: from latent vectors to indices of codebook entries, and back."""

    def codes(self, latent_BCGG: Tensor) -> Tensor:
        """Codes [B, N] in raster order."""

    def lookup(self, codes_BN: Tensor) -> Tensor:
        """Codebook vectors [B, C, G, G] of codes in raster order."""


class ImageTokenizer(nn.Module, ABC):
    """``encode`` and ``decode`` are what the rest of the toolkit uses; a kind of tokenizer implements what lies between."""

    kind: ClassVar[str]
    """Names the kind in a weights file."""
    spec: TokenizerSpec
    quantize: Codebook

    @abstractmethod
    def latent(self, images_B3HW: Tensor) -> Tensor:
        """The encoder's output before the codebook, [B, C, G, G], of images in [-1, 1]."""

    @abstractmethod
    def pixels(self, latent_BCGG: Tensor) -> Tensor:
        """Images [B, 3, H, W], nominally in [-1, 1] (not clamped), of codebook vectors."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Codes [B, N] (long, raster order) of images in [-1, 1].

        Raises:
            ValueError: images of another shape than the tokenizer was made for; names both.
        """
        size = self.spec.image_size
        if images_B3HW.shape[1:] != (3, size, size):
            raise ValueError(f"images are {tuple(images_B3HW.shape[1:])}, the tokenizer takes (3, {size}, {size})")
        codes_BN: Tensor = self.quantize.codes(self.latent(images_B3HW))
        return codes_BN

    def decode(self, codes_BN: Tensor) -> Tensor:
        """Images [B, 3, H, W], nominally in [-1, 1] (not clamped), of codes in raster order.

        Any square grid will do, also a larger one than that of the images the tokenizer was trained on.

        Raises:
            ValueError: the codes are not those of a square grid.
        """
        side = math.isqrt(codes_BN.shape[-1])
        if codes_BN.ndim != 2 or side * side != codes_BN.shape[1] or side == 0:
            grid = self.spec.grid
            raise ValueError(
                f"codes are {tuple(codes_BN.shape)}, expected (B, N) with N a square number: a {grid} x {grid} grid is (B, {grid * grid})"
            )
        return self.pixels(self.quantize.lookup(codes_BN))

    def load_tensors(self, tensors: dict[str, Tensor], where: str) -> Self:
        """Take over these weights as float32, in eval mode and without gradients.

        Raises:
            UserError: a tensor is missing, unexpected or of another shape; names ``where``, the tensor and both shapes.
        """
        check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}, where)
        self.load_state_dict({name: tensor.detach().float() for name, tensor in tensors.items()}, assign=True)
        return self.eval().requires_grad_(False)


NAMED_FAULTS = 3


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], where: str) -> None:
    """Raise one UserError that names the first tensors that are missing, unexpected or of another shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    faults = [
        f"tensor {name} is {shapes.get(name, 'absent')}, expected {expected.get(name, 'absent')}"
        for name in sorted(shapes.keys() | expected.keys())
        if shapes.get(name) != expected.get(name)
    ]
    if faults:
        more = f"\n  and {len(faults) - NAMED_FAULTS} more" if len(faults) > NAMED_FAULTS else ""
        raise UserError(f"{where}: not the weights of this tokenizer.\n  " + "\n  ".join(faults[:NAMED_FAULTS]) + more)


def group_norm(width: int) -> nn.GroupNorm:
    """Group normalisation as both kinds of tokenizer use it: 32 groups."""
    return nn.GroupNorm(32, width, eps=1e-6)
