"""One image shard into one token shard."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from oar_scale.data.manifest import Manifest, ShardInfo
from oar_scale.data.shards import read_shard, token_sample, write_shard
from oar_scale.data.views import make_view
from oar_scale.errors import UserError
from oar_scale.storage import join
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.vq import pixels_to_unit, vq_id

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")


def tokenize_shard(source: str, target: str, shard: ShardInfo, vq: ImageTokenizer, views: Sequence[str], cache_dir: str) -> ShardInfo:
    """Encode every view of every image of ``source/shard.name`` into ``target/shard.name``.

    Raises:
        UserError: a sample without image or caption, or an image that cannot be read; names shard and key.
    """
    uri = join(source, shard.name)
    samples = read_shard(uri, cache_dir, shard)
    pictures = [_picture(sample, uri) for sample in samples]
    pixels_VSHW3 = np.stack(
        [
            [np.asarray(make_view(picture, view, sample["__key__"])) for picture, sample in zip(pictures, samples, strict=True)]
            for view in views
        ]
    )
    codes_VSN = np.stack([_encode(vq, torch.from_numpy(pixels)) for pixels in pixels_VSHW3])
    return write_shard(
        target,
        shard.name,
        (token_sample(sample, codes_VSN[:, index]) for index, sample in enumerate(samples)),
    )


def token_manifest(shards: Sequence[ShardInfo], vq: ImageTokenizer, views: Sequence[str], attribution: str) -> Manifest:
    """The manifest of a folder of token shards."""
    return Manifest(
        shards=tuple(shards),
        grid=vq.spec.grid,
        vocab_size=vq.spec.codebook_size,
        views=tuple(views),
        tokenizer_id=vq_id(vq),
        attribution=attribution,
    )


def _encode(vq: ImageTokenizer, pixels_SHW3: torch.Tensor, batch: int = 128) -> np.ndarray[tuple[int, int], np.dtype[np.uint16]]:
    codes = [vq.encode(pixels_to_unit(part)) for part in pixels_SHW3.split(batch)]
    return torch.cat(codes).numpy().astype(np.uint16)


def _picture(sample: dict[str, bytes], uri: str) -> Image.Image:
    data = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
    if data is None or "txt" not in sample:
        what = "caption (.txt)" if data is not None else f"image ({', '.join('.' + e for e in IMAGE_EXTENSIONS)})"
        raise UserError(f"{uri}: sample {sample['__key__']!r} has no {what}")
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{uri}: image of sample {sample['__key__']!r} cannot be read ({error})") from error
