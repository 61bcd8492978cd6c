"""One image shard into one token shard: codes of every view and, where they are wanted, a frozen text tower's features."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from oar_scale.data.images import EXTENSIONS, decode_image
from oar_scale.data.manifest import Manifest, ShardInfo
from oar_scale.data.shards import ShardSample, pack_shard, read_shard, token_sample
from oar_scale.data.views import make_view
from oar_scale.errors import UserError
from oar_scale.storage import join, open_storage
from oar_scale.text import decode_text
from oar_scale.tokenizers.clip_text import ClipText
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.prompts import features_of
from oar_scale.tokenizers.vq import pixels_to_unit, vq_id

BATCH = 128
"""Images decoded, and encoded, at once."""


def tokenize_shard(source: str, target: str, shard: ShardInfo, vq: ImageTokenizer, views: Sequence[str], cache_dir: str) -> ShardInfo:
    """Encode every view of every image of ``source/shard.name`` into ``target/shard.name``; see :func:`pack_tokens`."""
    info, data = pack_tokens(source, shard, vq, views, cache_dir)
    uri = join(target, shard.name)
    open_storage(uri).write(uri, data)
    return info


def pack_tokens(
    source: str,
    shard: ShardInfo,
    vq: ImageTokenizer,
    views: Sequence[str],
    cache_dir: str,
    text: ClipText | None = None,
    cache_bytes: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[ShardInfo, bytes]:
    """Encode every view of every image of ``source/shard.name``: the token shard's entry for the manifest, and its bytes.

    Args:
        text: a text tower whose features of the captions are to be stored as well.
        on_batch: called after each :data:`BATCH` of images.

    Raises:
        UserError: a sample without image or caption, or an image that cannot be read; names shard and key.
    """
    uri = join(source, shard.name)
    samples = read_shard(uri, cache_dir, shard, cache_bytes=cache_bytes)

    def encoded() -> Iterator[ShardSample]:
        for start in range(0, len(samples), BATCH):
            yield from _tokenize(samples[start : start + BATCH], vq, views, text, uri)
            on_batch()

    return pack_shard(shard.name, encoded())


def token_manifest(
    shards: Sequence[ShardInfo], vq: ImageTokenizer, views: Sequence[str], attribution: str, text: ClipText | None = None
) -> Manifest:
    """The manifest of a folder of token shards."""
    return Manifest(
        shards=tuple(shards),
        grid=vq.spec.grid,
        vocab_size=vq.spec.codebook_size,
        views=tuple(views),
        tokenizer_id=vq_id(vq),
        features=None if text is None else features_of(text),
        attribution=attribution,
    )


def _tokenize(
    samples: Sequence[dict[str, bytes]], vq: ImageTokenizer, views: Sequence[str], text: ClipText | None, uri: str
) -> Iterator[ShardSample]:
    """The token samples of a batch of image samples."""
    keys, pictures = [str(sample["__key__"]) for sample in samples], [_picture(sample, uri) for sample in samples]
    features = None if text is None else _text_features(text, [decode_text(sample["txt"]) for sample in samples], uri)
    codes_VSN = np.stack([_encode(vq, pictures, keys, view) for view in views])
    for index, sample in enumerate(samples):
        yield token_sample(sample if features is None else {**sample, "features.npy": features[index]}, codes_VSN[:, index])


def _encode(vq: ImageTokenizer, pictures: Sequence[Image.Image], keys: Sequence[str], view: str) -> NDArray[np.uint16]:
    size = vq.spec.image_size
    pixels_SHW3 = np.stack([np.asarray(make_view(picture, view, key, size)) for picture, key in zip(pictures, keys, strict=True)])
    device = next(vq.parameters()).device
    return vq.encode(pixels_to_unit(torch.from_numpy(pixels_SHW3).to(device))).cpu().numpy().astype(np.uint16)


def _text_features(text: ClipText, captions: Sequence[str], uri: str) -> list[bytes]:
    """Features of each caption as a ``.npy`` file, float16, without the rows of zeros behind its last token."""
    ids_BT = text.encode(captions)
    features_BTF = text.features(ids_BT).to(torch.float16)
    if not torch.isfinite(features_BTF).all():
        raise UserError(f"{uri}: features of the text tower are too large for float16. Set tokenizer.text.precompute: false.")
    files = []
    for features_TF, rows in zip(features_BTF.numpy(), (ids_BT != 0).sum(1).tolist(), strict=True):
        buffer = io.BytesIO()
        np.save(buffer, features_TF[: min(rows, text.rows)])
        files.append(buffer.getvalue())
    return files


def _picture(sample: dict[str, bytes], uri: str) -> Image.Image:
    data = next((sample[extension] for extension in EXTENSIONS if extension in sample), None)
    if data is None or "txt" not in sample:
        what = "caption (.txt)" if data is not None else f"image (.{', .'.join(EXTENSIONS)})"
        raise UserError(f"{uri}: sample {sample['__key__']!r} has no {what}")
    return decode_image(data, f"{uri}: image of sample {str(sample['__key__'])!r}")
