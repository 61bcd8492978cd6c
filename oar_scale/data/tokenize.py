"""One image shard into one token shard: codes of every view and, where they are wanted, a frozen text tower's features."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from oar_scale.data.manifest import Manifest, ShardInfo
from oar_scale.data.open_shard import ImageShard, UnusableSample
from oar_scale.data.shards import ShardSample, pack_shard, read_image_shard, token_sample
from oar_scale.data.tar_samples import TWICE
from oar_scale.data.views import make_view
from oar_scale.errors import UserError
from oar_scale.storage import join, open_storage
from oar_scale.tokenizers.clip_text import ClipText
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.prompts import features_of
from oar_scale.tokenizers.vq import pixels_to_unit, vq_id

BATCH = 128
"""Images decoded, and encoded, at once."""


def tokenize_shard(source: str, target: str, shard: ShardInfo, vq: ImageTokenizer, views: Sequence[str], cache_dir: str) -> ShardInfo:
    """Encode every view of every image of ``source/shard.name`` into ``target/shard.name``; see :func:`pack_tokens`."""
    tokens = pack_tokens(source, shard, vq, views, cache_dir)
    uri = join(target, shard.name)
    open_storage(uri).write(uri, tokens.data)
    return tokens.info


class BadRow(NamedTuple):
    """A sample that cannot be used. Its key may be that of others as well."""

    row: int
    key: str
    fault: str


@dataclass(frozen=True)
class TokenizedShard:
    """A token shard, not written yet."""

    info: ShardInfo
    """Its entry for the manifest."""
    data: bytes
    bad: list[BadRow]
    """Samples of the image shard that are not in it."""


def pack_tokens(
    source: str,
    shard: ShardInfo,
    vq: ImageTokenizer,
    views: Sequence[str],
    cache_dir: str,
    text: ClipText | None = None,
    cache_bytes: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> TokenizedShard:
    """Encode every view of every image of ``source/shard.name`` that can be used.

    Args:
        text: a text tower whose features of the captions are to be stored as well.
        on_batch: called after each :data:`BATCH` of images.

    Raises:
        UserError: the shard is missing, damaged or no tar.
    """
    uri, bad = join(source, shard.name), list[BadRow]()
    images = read_image_shard(uri, cache_dir, shard, cache_bytes=cache_bytes)

    def encoded() -> Iterator[ShardSample]:
        for start in range(0, len(images), BATCH):
            pictures = _pictures(images, range(start, min(start + BATCH, len(images))), bad)
            if pictures:
                yield from _tokenize(images, pictures, vq, views, text)
            on_batch()

    info, data = pack_shard(shard.name, encoded())
    return TokenizedShard(info, data, bad)


def token_manifest(
    shards: Sequence[ShardInfo],
    vq: ImageTokenizer,
    views: Sequence[str],
    attribution: str,
    text: ClipText | None = None,
    skipped: Mapping[str, str] | None = None,
) -> Manifest:
    """The manifest of a folder of token shards; ``skipped`` are the images that are not in them, and why."""
    return Manifest(
        shards=tuple(shards),
        grid=vq.spec.grid,
        vocab_size=vq.spec.codebook_size,
        views=tuple(views),
        tokenizer_id=vq_id(vq),
        features=None if text is None else features_of(text),
        attribution=attribution,
        skipped=dict(skipped or {}),
    )


def _pictures(images: ImageShard, rows: Iterable[int], bad: list[BadRow]) -> dict[int, Image.Image]:
    """The pictures of the samples that can be used, by row; the others go to ``bad``, each with all that it lacks."""
    pictures: dict[int, Image.Image] = {}
    for row in rows:
        try:
            if images.repeated(row):
                raise images.fault(row, TWICE)
            images.caption(row)
            images.metadata(row)
            pictures[row] = images.picture(row)
        except UnusableSample as fault:
            bad.append(BadRow(row, images.keys[row], str(fault)))
    return pictures


def _tokenize(
    images: ImageShard, pictures: Mapping[int, Image.Image], vq: ImageTokenizer, views: Sequence[str], text: ClipText | None
) -> Iterator[ShardSample]:
    """The token samples of a batch of pictures, by row."""
    keys = [images.keys[row] for row in pictures]
    features = None if text is None else _text_features(text, [images.caption(row) for row in pictures], images.where)
    codes_VSN = np.stack([_encode(vq, list(pictures.values()), keys, view) for view in views])
    for index, row in enumerate(pictures):
        found = {part: images.find(row, (part,)) for part in ("features.npy", "json", "txt", "cls")}
        sample: ShardSample = {"__key__": keys[index], **{part: bytes(content) for part, content in found.items() if content is not None}}
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
