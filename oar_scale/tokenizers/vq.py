"""The image tokenizer: a convolutional autoencoder whose bottleneck is a codebook.

    image [3, H, W] in [-1, 1]  --encoder-->  latent [C, G, G]  --nearest entry-->  G*G codes  --decoder-->  image

Each cell of the G x G grid becomes the index of the codebook entry that is nearest on the unit sphere (both sides are
L2-normalised, as in LlamaGen's VQ, arXiv 2406.06525). Module names equal LlamaGen's state-dict keys, so that its
tokenizers fit this class: ``channels=128, multipliers=(1, 1, 2, 2, 4), res_blocks=2, codebook 16384 x 8`` is its VQ-16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oar_scale.errors import UserError
from oar_scale.text import shown
from oar_scale.tokenizers.image import ImageTokenizer, TokenizerSpec, check_tensors, group_norm
from oar_scale.tokenizers.maskgit_vq import MaskGITSpec, MaskGITVQ
from oar_scale.tokenizers.safetensors_file import read_weights, save_weights
from oar_scale.tokenizers.without_values import without_values

CODEBOOK_USED = "quantize.codebook_used"
CODEBOOK_USED_SHAPE = (65536,)
"""Of every tokenizer of LlamaGen, whatever the size of its codebook."""


class VQSpec(TokenizerSpec):
    """A tokenizer of LlamaGen's family; the defaults are its VQ-16."""

    codebook_size: int = 16384
    codebook_dim: int = 8


class Quantized(NamedTuple):
    """One pass through the codebook."""

    latent_BCGG: Tensor
    """Codebook vectors, with the gradient passed straight through to the encoder."""
    codes_BN: Tensor
    loss: Tensor
    """Codebook loss + commitment x commitment loss."""


class CosineQuantizer(nn.Module):
    """Nearest codebook entry by cosine similarity."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        if not self.embedding.weight.is_meta:  # which has no values, and whose operations are slow to import
            with torch.no_grad():
                self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        self.codebook_used: Tensor | None
        self.register_buffer("codebook_used", None)  # LlamaGen's record of recent codes: carried from import to export, never read

    def codes(self, latent_BCGG: Tensor) -> Tensor:
        """Codes [B, N] in raster order."""
        rows = F.normalize(latent_BCGG.float().flatten(2).transpose(1, 2), dim=-1)
        entries = F.normalize(self.embedding.weight.float(), dim=-1)
        codes_BN: Tensor = torch.matmul(rows, entries.t()).argmax(-1)
        return codes_BN

    def lookup(self, codes_BN: Tensor) -> Tensor:
        """Codebook vectors [B, C, G, G] of codes in raster order."""
        grid = round(codes_BN.shape[1] ** 0.5)
        vectors_BNC = F.normalize(self.embedding(codes_BN).float(), dim=-1).to(self.embedding.weight.dtype)
        vectors_BCGG: Tensor = vectors_BNC.transpose(1, 2).unflatten(2, (grid, grid))
        return vectors_BCGG

    def forward(self, latent_BCGG: Tensor, commitment: float) -> Quantized:
        """Quantise an encoder's output [B, C, G, G] for training: straight-through gradient, codebook and commitment loss."""
        codes_BN = self.codes(latent_BCGG)
        chosen = self.lookup(codes_BN)
        latent = F.normalize(latent_BCGG, dim=1)
        loss = F.mse_loss(chosen, latent.detach()) + commitment * F.mse_loss(latent, chosen.detach())
        return Quantized(latent + (chosen - latent).detach(), codes_BN, loss)


class VQTokenizer(ImageTokenizer):
    """VQEncoder, codebook and decoder."""

    kind = "vq"
    spec: VQSpec
    quantize: CosineQuantizer

    def __init__(self, spec: VQSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = VQEncoder(spec)
        self.quantize = CosineQuantizer(spec.codebook_size, spec.codebook_dim)
        self.quant_conv = nn.Conv2d(spec.latent_channels, spec.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(spec.codebook_dim, spec.latent_channels, 1)
        self.decoder = VQDecoder(spec)

    def latent(self, images_B3HW: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.latent`; C is ``codebook_dim``."""
        latent_BCGG: Tensor = self.quant_conv(self.encoder(images_B3HW))
        return latent_BCGG

    def pixels(self, latent_BCGG: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.pixels`."""
        images_B3HW: Tensor = self.decoder(self.post_quant_conv(latent_BCGG))
        return images_B3HW

    def forward(self, images_B3HW: Tensor, commitment: float = 0.25) -> tuple[Tensor, Quantized]:
        """Reconstruction and the codebook pass, for training."""
        quantized = self.quantize(self.latent(images_B3HW), commitment)
        return self.pixels(quantized.latent_BCGG), quantized

    def load_tensors(self, tensors: dict[str, Tensor], where: str) -> Self:
        """See :meth:`ImageTokenizer.load_tensors`; LlamaGen's record of used codes is optional and is carried along."""
        self.quantize.codebook_used = None
        super().load_tensors({name: tensor for name, tensor in tensors.items() if name != CODEBOOK_USED}, where)
        if CODEBOOK_USED in tensors:
            check_tensors({CODEBOOK_USED: tensors[CODEBOOK_USED]}, {CODEBOOK_USED: CODEBOOK_USED_SHAPE}, where)
            self.quantize.codebook_used = tensors[CODEBOOK_USED].detach()
        return self


class VQEncoder(nn.Module):
    """``conv_in``, levels of residual blocks that halve the side, a middle with attention, ``conv_out``."""

    def __init__(self, spec: VQSpec) -> None:
        super().__init__()
        widths = [spec.channels * m for m in spec.multipliers]
        self.conv_in = nn.Conv2d(3, spec.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        width = spec.channels
        for level, out in enumerate(widths):
            last = level == len(widths) - 1
            self.conv_blocks.append(ResolutionLevel(width, out, spec.res_blocks, attention=last, resample=None if last else "down"))
            width = out
        self.mid = middle(width)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, spec.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features [B, latent_channels, G, G]."""
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        for block in self.mid:
            x = block(x)
        output: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return output


class VQDecoder(nn.Module):
    """The encoder's mirror image, one residual block more a level."""

    def __init__(self, spec: VQSpec) -> None:
        super().__init__()
        widths = [spec.channels * m for m in reversed(spec.multipliers)]
        self.conv_in = nn.Conv2d(spec.latent_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        width = widths[0]
        for level, out in enumerate(widths):
            last = level == len(widths) - 1
            self.conv_blocks.append(ResolutionLevel(width, out, spec.res_blocks + 1, attention=level == 0, resample=None if last else "up"))
            width = out
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, latent_channels, G, G] to images [B, 3, H, W]."""
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in self.conv_blocks:
            x = level(x)
        output: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return output


class ResolutionLevel(nn.Module):
    """Residual blocks of one resolution, attention after each where requested, then the change of resolution."""

    def __init__(self, width: int, out: int, blocks: int, *, attention: bool, resample: str | None) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(width if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(CellAttention(out) for _ in range(blocks if attention else 0))
        if resample == "down":
            self.downsample = Downsample(out)
        if resample == "up":
            self.upsample = Upsample(out)

    def forward(self, x: Tensor) -> Tensor:
        """Features of one resolution to those of the next one."""
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class ResBlock(nn.Module):
    """Residual block: norm, SiLU, convolution, twice; a 1 x 1 convolution as shortcut where the width changes."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, width, H, W] to [B, out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        output: Tensor = (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h
        return output


class CellAttention(nn.Module):
    """Single-head self-attention over the cells of a feature map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, width, G, G] plus what each cell attends to."""
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        output: Tensor = x + self.proj_out(mixed)
        return output


class Downsample(nn.Module):
    """Halves the side: a strided convolution, padded on the right and at the bottom only (as in LlamaGen)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, width, H, W] to [B, width, H / 2, W / 2]."""
        output: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return output


class Upsample(nn.Module):
    """Doubles the side: nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, width, H, W] to [B, width, 2 H, 2 W]."""
        output: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return output


def middle(width: int) -> nn.ModuleList:
    """The blocks between encoder levels and output (and, mirrored, in the decoder): residual, attention, residual."""
    return nn.ModuleList([ResBlock(width, width), CellAttention(width), ResBlock(width, width)])


def pixels_to_unit(pixels_BHW3: Tensor) -> Tensor:
    """uint8 pixels [B, H, W, 3] to images [B, 3, H, W] in [-1, 1]."""
    return pixels_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1


def unit_to_pixels(images_B3HW: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 pixels [B, H, W, 3]."""
    return (images_B3HW * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def psnr(images_B3HW: Tensor, reconstructed_B3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image [B], in dB, for images in [-1, 1] (peak 2)."""
    error = (images_B3HW.clamp(-1, 1) - reconstructed_B3HW.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


def codebook_use(codes: Sequence[Tensor], size: int) -> float:
    """Share of the codebook that these codes use at least once."""
    used = torch.zeros(size, dtype=torch.bool)
    for batch in codes:
        used[batch.flatten()] = True
    return float(used.float().mean())


def save_vq(uri: str, vq: ImageTokenizer, *, half: bool = False) -> None:
    """Write a tokenizer of either kind as safetensors, its spec in the metadata; ``half`` stores matrices in bfloat16."""
    save_weights(uri, vq.state_dict(), {"kind": vq.kind, "spec": vq.spec.model_dump_json()}, half=half)


def load_vq(uri: str) -> ImageTokenizer:
    """Read what :func:`save_vq` wrote (eval mode, float32, CPU).

    Raises:
        UserError: not a safetensors file, one that holds something else, or tensors that do not fit its spec.
    """
    stored = read_weights(uri, VQTokenizer.kind, MaskGITVQ.kind)
    try:
        vq = _without_values(stored.kind, stored.spec)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # of pydantic, or of modules that cannot have these sizes
        raise UserError(
            f"{uri}: the sizes of this image tokenizer are not understood; another version of oar_scale wrote them ({shown(stored.spec)})"
        ) from error
    return vq.load_tensors(stored.tensors, uri)


def _without_values(kind: str, spec: str) -> ImageTokenizer:
    """A tokenizer that holds names and shapes alone."""
    with without_values():
        if kind == MaskGITVQ.kind:
            return MaskGITVQ(MaskGITSpec.model_validate_json(spec))
        return VQTokenizer(VQSpec.model_validate_json(spec))


def vq_id(vq: ImageTokenizer) -> str:
    """Content hash of a tokenizer: token shards carry it, so that codes are never decoded with another codebook."""
    digest = hashlib.sha256(vq.spec.model_dump_json().encode())
    for name, tensor in sorted(vq.state_dict().items()):
        if name != CODEBOOK_USED:  # a record of use: it changes no code
            digest.update(name.encode())
            digest.update(tensor.to(torch.float16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
