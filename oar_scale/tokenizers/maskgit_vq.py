"""MaskGIT's image tokenizer (arXiv 2202.04200), the second one that RandAR's models are trained on.

    image in [0, 1]  --encoder-->  latent [256, G, G]  --nearest of 1024 entries-->  G*G codes  --decoder-->  image in [0, 1]

Against LlamaGen's VQ: no attention, most convolutions without bias, average pooling instead of strided convolutions, entries
compared by plain (not cosine) distance. Module names equal the state-dict keys of the PyTorch port of the ImageNet weights
(``maskgit-vqgan-imagenet-f16-256.bin``). The defaults of :class:`MaskGITSpec` are that tokenizer.

The port lives on [0, 1]; here ``latent`` takes and ``decode`` gives images in [-1, 1], as every tokenizer of the toolkit.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from oar_scale.tokenizers.image import ImageTokenizer, TokenizerSpec, group_norm


class MaskGITSpec(TokenizerSpec):
    """A tokenizer of MaskGIT's kind; the defaults are the ImageNet one."""

    codebook_size: int = 1024

    @property
    def codebook_dim(self) -> int:
        """Codebook vectors are latents: nothing is projected in between."""
        return self.latent_channels


class MaskGITVQ(ImageTokenizer):
    """Encoder, codebook and decoder. Weights are imported (``peer_vq.import_maskgit_vq``), not trained here."""

    kind = "maskgit vq"
    spec: MaskGITSpec
    quantize: EuclideanQuantizer

    def __init__(self, spec: MaskGITSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = MaskGITEncoder(spec)
        self.decoder = MaskGITDecoder(spec)
        self.quantize = EuclideanQuantizer(spec.codebook_size, spec.latent_channels)

    def latent(self, images_B3HW: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.latent`; the port's encoder takes images in [0, 1]."""
        latent_BCGG: Tensor = self.encoder((images_B3HW + 1) / 2)
        return latent_BCGG

    def pixels(self, latent_BCGG: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.pixels`; the port's decoder gives images in [0, 1]."""
        images: Tensor = self.decoder(latent_BCGG) * 2 - 1
        return images


class EuclideanQuantizer(nn.Module):
    """Nearest codebook entry by squared distance."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)

    def codes(self, latent_BCGG: Tensor) -> Tensor:
        """Codes [B, N] in raster order."""
        rows_BNC = latent_BCGG.float().flatten(2).transpose(1, 2)
        entries = self.embedding.weight.float()
        # |z - e|^2 without |z|^2, which is the same for every entry
        codes_BN: Tensor = (entries.square().sum(1) - 2 * rows_BNC @ entries.t()).argmin(-1)
        return codes_BN

    def lookup(self, codes_BN: Tensor) -> Tensor:
        """Codebook vectors [B, C, G, G] of codes in raster order."""
        grid = round(codes_BN.shape[1] ** 0.5)
        vectors_BCGG: Tensor = self.embedding(codes_BN).transpose(1, 2).unflatten(2, (grid, grid))
        return vectors_BCGG


class MaskGITEncoder(nn.Module):
    """``conv_in``, levels that halve the side, a middle of residual blocks, ``conv_out``."""

    def __init__(self, spec: MaskGITSpec) -> None:
        super().__init__()
        widths = [spec.channels * m for m in spec.multipliers]
        self.conv_in = convolution(3, spec.channels)
        self.down = nn.ModuleList(
            MaskGITBlocks(before, out, spec.res_blocks) for before, out in zip([spec.channels, *widths], widths, strict=False)
        )
        self.mid = residual_blocks(widths[-1], widths[-1], spec.res_blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], spec.latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to features [B, latent_channels, G, G]."""
        x = self.conv_in(x)
        for level, blocks in enumerate(self.down):
            x = blocks(x)
            if level < len(self.down) - 1:
                x = F.avg_pool2d(x, 2)
        for block in self.mid:
            x = block(x)
        output: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return output


class MaskGITDecoder(nn.Module):
    """The encoder's mirror image. ``up[l]`` belongs to the encoder's ``down[l]``, so the last one comes first."""

    def __init__(self, spec: MaskGITSpec) -> None:
        super().__init__()
        widths = [spec.channels * m for m in spec.multipliers]
        self.conv_in = nn.Conv2d(spec.latent_channels, widths[-1], 3, padding=1)
        self.mid = residual_blocks(widths[-1], widths[-1], spec.res_blocks)
        befores = [*widths[1:], widths[-1]]
        levels = enumerate(zip(befores, widths, strict=True))
        self.up = nn.ModuleList(MaskGITBlocks(before, out, spec.res_blocks, upsampled=level > 0) for level, (before, out) in levels)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, latent_channels, G, G] to images [B, 3, H, W], nominally in [0, 1]."""
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for blocks in reversed(self.up):
            x = blocks(x)
        output: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return output


class MaskGITBlocks(nn.Module):
    """The residual blocks of one resolution, then twice the side where requested."""

    def __init__(self, width: int, out: int, count: int, *, upsampled: bool = False) -> None:
        super().__init__()
        self.block = residual_blocks(width, out, count)
        self.upsample_conv = nn.Conv2d(out, out, 3, padding=1) if upsampled else None

    def forward(self, x: Tensor) -> Tensor:
        """Features of one resolution to those of the next one."""
        for block in self.block:
            x = block(x)
        if self.upsample_conv is not None:
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class MaskGITResBlock(nn.Module):
    """A residual block. Where the width changes, the shortcut starts from the *new* hidden state, and the input is lost.

    A quirk of the port, kept because its weights are used as they are.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(width), convolution(width, out)
        self.norm2, self.conv2 = group_norm(out), convolution(out, out)
        self.nin_shortcut = nn.Conv2d(out, out, 1, bias=False) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, width, H, W] to [B, out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        output: Tensor = h + (x if self.nin_shortcut is None else self.nin_shortcut(h))
        return output


def residual_blocks(width: int, out: int, count: int) -> nn.ModuleList:
    """Residual blocks in a row; the first one changes the width."""
    return nn.ModuleList(MaskGITResBlock(width if index == 0 else out, out) for index in range(count))


def convolution(width: int, out: int) -> nn.Conv2d:
    """A 3 x 3 convolution without bias."""
    return nn.Conv2d(width, out, 3, padding=1, bias=False)
