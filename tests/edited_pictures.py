"""Pictures, masks and models that tests of editing share."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from small_models import small_model

from oar_scale.config.schema import SampleConfig
from oar_scale.generation.editing import Edit
from oar_scale.generation.model_bundle import ModelBundle
from oar_scale.generation.pretrained import Pretrained
from oar_scale.model.spec import ClassSpec
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.maskgit_vq import MaskGITSpec, MaskGITVQ
from oar_scale.tokenizers.prompts import LabelEncoder
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, load_vq

SHIPPED = Path(__file__).resolve().parents[1] / "recipes" / "weights" / "emoji" / "vq.safetensors"
KINDS = {"vq": VQTokenizer, "maskgit": MaskGITVQ, "shipped": VQTokenizer}
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "HSV", "I;16")


@lru_cache
def drawer(kind: str = "vq") -> Pretrained:
    """A small model with an image tokenizer of this kind: random, with attention over the whole image; or the one that is shipped."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": 16, "channels": 32, "multipliers": (1, 1, 1), "res_blocks": 1, "latent_channels": 32}
    vq: ImageTokenizer
    if kind == "maskgit":
        vq = MaskGITVQ(MaskGITSpec(**sizes, codebook_size=32))
    else:
        vq = load_vq(str(SHIPPED)) if kind == "shipped" else VQTokenizer(VQSpec(**sizes, codebook_size=32, codebook_dim=4))
    model = small_model(grid=vq.spec.grid, vocab=vq.spec.codebook_size, condition=ClassSpec(classes=5))
    bundle = ModelBundle("here", "model", None, None, "", SampleConfig(guidance=1.0), None)
    return Pretrained(model, vq.eval(), LabelEncoder(5), bundle)


def noise(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Random pixels of a mode."""
    pixels = noise(width, height, seed)
    if mode == "I;16":
        return Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    page = Image.fromarray(pixels)
    return (page.convert("RGB") if mode == "P" else page).convert(mode)


def with_hidden(image: Image.Image, mask: NDArray[np.bool_], seed: int) -> Image.Image:
    """The picture with random pixels where the mask is True."""
    pixels, other = np.asarray(image), np.asarray(picture(*image.size, image.mode, seed))
    changed = np.where(mask if pixels.ndim == 2 else mask[:, :, None], other, pixels)
    if image.mode == "1":
        return Image.fromarray(changed)
    out = Image.frombytes(image.mode, image.size, changed.tobytes())
    if image.mode == "P":
        out.putpalette(image.getpalette() or [])
    return out


def same(first: Edit, second: Edit) -> bool:
    squares = list(zip(first.squares, second.squares, strict=True))
    pictures = [(first.picture, second.picture), *((one.drawing, other.drawing) for one, other in squares)]
    tensors = [
        (getattr(one, name), getattr(other, name)) for one, other in squares for name in ("codes_N", "order_N", "score_N", "drawn_N")
    ]
    return all(one.tobytes() == other.tobytes() for one, other in pictures) and all(torch.equal(*pair) for pair in tensors)


def holes(width: int, height: int) -> dict[str, NDArray[np.bool_]]:
    """Masks of a picture: a box inside, all but a box, a half, some pixels."""
    box = np.zeros((height, width), dtype=np.bool_)
    box[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    half = np.arange(width)[None].repeat(height, 0) >= width // 2
    scattered = np.random.default_rng(1).random((height, width)) < 0.02
    scattered[0, 0] = True
    return {"box": box, "around": ~box, "half": half, "scattered": scattered}
