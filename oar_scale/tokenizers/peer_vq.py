"""Image tokenizers of the peers: their tensors into ours and back, bit for bit.

Tensor names are the peers' own (LlamaGen's ``vq_ds16_c2i.pt``, the PyTorch port of MaskGIT's VQGAN), so nothing is renamed.
What a checkpoint does not say is its shape as a *spec*: it is read off the tensors. Several tensors determine each width, and the
value that most of them have counts, so that an error names the one wrong tensor and not those it contradicts.
"""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.tokenizers.maskgit_vq import MaskGITSpec, MaskGITVQ
from oar_scale.tokenizers.vq import CODEBOOK_USED, CODEBOOK_USED_SHAPE, VQSpec, VQTokenizer
from oar_scale.tokenizers.without_values import without_values

NORM_GROUPS = 32


def import_llamagen_vq(tensors: dict[str, Tensor], image_size: int, where: str) -> VQTokenizer:
    """A tokenizer of LlamaGen (the content of the checkpoint's entry ``model``).

    Args:
        tensors: its state dict; taken over as float32.
        image_size: side in pixels of the images it is to be used on; the weights fit any.
        where: names the file in errors.

    Raises:
        UserError: a tensor is missing, unexpected or of the wrong shape; names ``where``, the tensor and both shapes.
    """
    shapes = _Shapes(tensors, where)
    levels = shapes.count("encoder.conv_blocks.")
    widths = shapes.widths(levels, "encoder.conv_blocks.{}.res.")
    spec = VQSpec(
        image_size=image_size,
        channels=shapes.channels(),
        multipliers=shapes.multipliers(widths),
        res_blocks=max(shapes.count(f"encoder.conv_blocks.{level}.res.") for level in range(levels)),
        latent_channels=shapes.vote(
            "encoder.conv_out.weight:0",
            "encoder.conv_out.bias:0",
            "quant_conv.weight:1",
            "post_quant_conv.weight:0",
            "post_quant_conv.bias:0",
            "decoder.conv_in.weight:1",
        ),
        codebook_size=shapes.vote("quantize.embedding.weight:0"),
        codebook_dim=shapes.vote("quantize.embedding.weight:1", "quant_conv.weight:0", "quant_conv.bias:0", "post_quant_conv.weight:1"),
    )
    shapes.check_size(image_size, spec.multipliers)
    with without_values():
        vq = VQTokenizer(spec)
    return vq.load_tensors(tensors, where)


def export_llamagen_vq(vq: VQTokenizer) -> dict[str, Tensor]:
    """The state dict that LlamaGen's ``VQModel`` of the same spec loads.

    LlamaGen insists on its record of recently used codes. A tokenizer that was imported gives back the one it came with, one
    that was trained here an empty one.
    """
    return {CODEBOOK_USED: torch.zeros(CODEBOOK_USED_SHAPE), **vq.state_dict()}


def import_maskgit_vq(tensors: dict[str, Tensor], image_size: int, where: str) -> MaskGITVQ:
    """MaskGIT's tokenizer from the state dict of its PyTorch port. Arguments and errors as :func:`import_llamagen_vq`."""
    shapes = _Shapes(tensors, where)
    levels = shapes.count("encoder.down.")
    widths = shapes.widths(levels, "encoder.down.{}.block.")
    spec = MaskGITSpec(
        image_size=image_size,
        channels=shapes.channels(),
        multipliers=shapes.multipliers(widths),
        res_blocks=max(shapes.count(f"encoder.down.{level}.block.") for level in range(levels)),
        latent_channels=shapes.vote(
            "encoder.conv_out.weight:0", "encoder.conv_out.bias:0", "quantize.embedding.weight:1", "decoder.conv_in.weight:1"
        ),
        codebook_size=shapes.vote("quantize.embedding.weight:0"),
    )
    shapes.check_size(image_size, spec.multipliers)
    with without_values():
        vq = MaskGITVQ(spec)
    return vq.load_tensors(tensors, where)


def export_maskgit_vq(vq: MaskGITVQ) -> dict[str, Tensor]:
    """The state dict that the port's ``PretrainedTokenizer`` of the same spec loads."""
    return dict(vq.state_dict())


class _Shapes:
    """Reads a spec off the shapes of a state dict."""

    def __init__(self, tensors: dict[str, Tensor], where: str) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.where = where

    def count(self, prefix: str) -> int:
        """How many numbered modules there are below ``prefix``."""
        numbered = re.compile(re.escape(prefix) + r"(\d+)\.")
        numbers = {int(match[1]) for match in map(numbered.match, self.shapes) if match}
        if not numbers:
            raise UserError(f"{self.where}: no tensor {prefix}0.*; these are not the weights of such a tokenizer.")
        return max(numbers) + 1

    def vote(self, *dimensions: str) -> int:
        """The size that most of the ``tensor:dimension`` agree on, the first one where there is a tie."""
        sizes: list[int] = []
        for name, _, axis in (dimension.partition(":") for dimension in dimensions):
            sizes += self.shapes.get(name, ())[int(axis) : int(axis) + 1]
        return self._most_common(sizes, dimensions[0].partition(":")[0])

    def widths(self, levels: int, blocks: str) -> list[int]:
        """Channels of each level, by a vote of all its residual blocks; ``blocks`` is their prefix with ``{}`` for the level."""
        widths = []
        for prefix in map(blocks.format, range(levels)):
            member = re.compile(re.escape(prefix) + r"\d+\.(conv1|norm2|conv2)\.(weight|bias)$")
            sizes = [shape[0] for name, shape in self.shapes.items() if member.match(name) and shape]
            widths.append(self._most_common(sizes, f"{prefix}0.conv1.weight"))
        return widths

    def channels(self) -> int:
        """The channels of the first convolution; the names of its neighbours are of one family or the other."""
        firsts = [f"encoder.{blocks}.0" for blocks in ("conv_blocks.0.res", "down.0.block")]
        neighbours = [f"{first}.{name}" for first in firsts for name in ("norm1.weight:0", "norm1.bias:0", "conv1.weight:1")]
        return self.vote("encoder.conv_in.weight:0", "encoder.conv_in.bias:0", *neighbours)

    def multipliers(self, widths: list[int]) -> tuple[int, ...]:
        channels = self.channels()
        if channels % NORM_GROUPS or any(width % channels for width in widths):
            raise UserError(
                f"{self.where}: the levels of encoder have {', '.join(map(str, widths))} channels and encoder.conv_in has {channels}; "
                f"expected a multiple of {NORM_GROUPS} there and multiples of it in the levels."
            )
        return tuple(width // channels for width in widths)

    def check_size(self, image_size: int, multipliers: tuple[int, ...]) -> None:
        factor = 2 ** (len(multipliers) - 1)
        if image_size < factor or image_size % factor:
            raise UserError(f"{self.where}: this tokenizer takes images of a multiple of {factor} pixels, not of {image_size}.")

    def _most_common(self, sizes: list[int], name: str) -> int:
        if not sizes:
            raise UserError(f"{self.where}: tensor {name} is absent.")
        return Counter(sizes).most_common(1)[0][0]
