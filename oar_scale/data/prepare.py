"""Captioned images into image shards, fixed shares of the names (or families) held out: to look at while training, and for a final test.

    names of all images --sort by a hash of the key--> threads read, decode, resize --> a shard goes out as soon as it is full

Only the names of all images are in memory at once, so a million images take no more memory than a thousand and the further names.
"""

from __future__ import annotations

import io
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from oar_scale.config.schema import DataConfig
from oar_scale.data.bad_samples import BadSamples
from oar_scale.data.hashing import name_hash, name_hashes
from oar_scale.data.labels import label_of
from oar_scale.data.manifest import Manifest, ShardInfo, write_manifest
from oar_scale.data.notes import Notes
from oar_scale.data.shards import ShardSample, shard_name, with_identity, write_shard
from oar_scale.data.sources import BadImage, Content, SourceImage, open_source
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject, without_nan
from oar_scale.storage import join
from oar_scale.storage.patience import as_patient
from oar_scale.text import clean_text, shown

AHEAD = 4
"""Images read ahead, for each thread."""

Item = TypeVar("Item")
Result = TypeVar("Result")
OnProgress = Callable[[int, int], None]
"""Called with (images done, images in all), at the start and after every shard."""


def prepare_images(
    config: DataConfig,
    folder: str,
    on_progress: OnProgress | None = None,
    notes: Notes | None = None,
    classes: int | None = None,
) -> dict[str, Manifest]:
    """Write ``folder/train``, ``folder/heldout`` and, where ``data.test_fraction`` is set, ``folder/test``; the manifests come last.

    Bad samples (no caption, an image that cannot be read) are skipped and named in the manifest, or stop the stage, as
    ``data.on_bad_sample`` says. The bytes depend on the images and on ``config`` without its ``prepare_threads``.

    Args:
        notes: gets what was left out or changed.
        classes: for a model of labels: every sample needs one, below this number, and none needs a caption.

    Raises:
        UserError: a bad sample under ``fail``, too many of them under ``skip``, two images of one key, or an empty split.
    """
    source, notes = open_source(config.source), notes or Notes()
    images = _in_order(list(source.images()))
    notes.merge(source.notes.record())
    splits = {split: _Split(join(folder, split), config.samples_per_shard) for split in splits_of(config)}
    bad = BadSamples("data", len(images), config, notes)

    def read(image: SourceImage) -> _Read | BadImage:
        return _read(image, config.image_size, classes)

    report = on_progress or (lambda done, total: None)
    report(0, len(images))
    for done, (image, result) in enumerate(_map_in_order(as_patient(read), images, config.prepare_threads), 1):
        if isinstance(result, BadImage):
            bad.add(image.key, str(result))
            continue
        for reason in result.changed:
            notes.add(reason, image.name)
        if splits[_split_of(image, config)].add(result.sample, image.family):
            report(done, len(images))
            bad.check(done)
    bad.check(len(images))
    for split in splits.values():
        split.flush()
    report(len(images), len(images))
    return _write_manifests(splits, source.attribution, bad.skipped, len(images))


def _in_order(images: list[SourceImage]) -> list[SourceImage]:
    """The images sorted by a hash of the key: the same order for the same images, and no variants of one picture side by side."""
    keys = [image.key for image in images]
    if len(set(keys)) < len(keys):
        repeated = {key: count for key, count in Counter(keys).items() if count > 1}
        key, count = next(iter(repeated.items()))
        name = next(image.name for image in images if image.key == key)
        raise UserError(
            f"data: {len(repeated)} keys stand for more than one image, e.g. {key!r} for {count}: {shown(name)}.\nGive every image a "
            "name of its own. In a table with several rows for one picture, a caption in each, leave one row for each picture: with the "
            "caption you want or, in a Parquet file, with the list of its captions."
        )
    return [images[index] for index in np.argsort(name_hashes(keys, "shard"), kind="stable")]


def splits_of(config: DataConfig) -> tuple[str, ...]:
    """The names of the splits, which are those of their folders."""
    return ("train", "heldout", "test") if config.test_fraction else ("train", "heldout")


def images_of_split(config: DataConfig, split: str) -> list[SourceImage]:
    """The images of the recipe's source that fall into a split, in the order of the source; none has been read yet."""
    return [image for image in open_source(config.source).images() if _split_of(image, config) == split]


def _split_of(image: SourceImage, config: DataConfig) -> str:
    """The split of an image: a hash of its family (``data.split_by: family``) or its name decides, whatever other images there are."""
    unit = image.family if config.split_by == "family" and image.family else image.name
    place = name_hash(unit, "heldout")
    if place < config.heldout_fraction:
        return "heldout"
    return "test" if place < config.heldout_fraction + config.test_fraction else "train"


class _Read(NamedTuple):
    """An image that was read: its sample of a shard, and in what it differs from what is there."""

    sample: ShardSample
    changed: tuple[str, ...]


def _read(image: SourceImage, size: int, classes: int | None) -> _Read | BadImage:
    """The shard sample of an image, or why there is none."""
    try:
        content = image.read(size)
        caption, metadata = _described(content, classes)
    except BadImage as fault:
        return fault
    buffer = io.BytesIO()
    content.image.save(buffer, "PNG")
    sample = {
        "__key__": image.key,
        "png": buffer.getvalue(),
        "txt": caption,
        "json": json.dumps(with_identity(metadata, image.name, image.family)).encode(),
    }
    return _Read(sample if content.features is None else {**sample, "features.npy": content.features}, content.changed)


def _described(content: Content, classes: int | None) -> tuple[str, JsonObject]:
    """Caption and metadata of an image, its label a number. Raises BadImage where one that is needed is missing or none."""
    caption = clean_text(content.caption)
    try:
        metadata: JsonObject = {key: without_nan(value) for key, value in content.metadata.items()}
    except RecursionError as error:
        raise BadImage("its .json is nested too deeply") from error
    try:
        metadata["label"] = label_of(metadata.get("label"), classes)
    except ValueError as error:  # where labels are not used, it is left as it is
        if classes is not None:
            raise BadImage(str(error)) from error
    if not caption and classes is not None:
        caption = f"class {metadata['label']}"
    if not caption:
        raise BadImage("no caption")
    return caption, metadata


def _map_in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, in the order of the items; a bounded number of them is in progress.

    Threads, because decoding, resizing and packing an image all happen outside Python's lock.
    """
    in_progress: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                in_progress.append((item, pool.submit(function, item)))
                if len(in_progress) > AHEAD * threads:
                    first, result = in_progress.popleft()
                    yield first, result.result()
            while in_progress:
                first, result = in_progress.popleft()
                yield first, result.result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass
class _Split:
    """The shards of one split: at most one of them is in memory."""

    folder: str
    samples_per_shard: int
    shards: list[ShardInfo] = field(default_factory=list)
    families: Counter[str] = field(default_factory=Counter)
    """Images of each family; those without one are not counted."""
    waiting: list[ShardSample] = field(default_factory=list)

    def add(self, sample: ShardSample, family: str) -> bool:
        """Add a sample, and write the shard that it completes; returns whether it did."""
        self.waiting.append(sample)
        if family:
            self.families[family] += 1
        if len(self.waiting) < self.samples_per_shard:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Write the samples that wait as one shard, if there are any."""
        if self.waiting:
            self.shards.append(write_shard(self.folder, shard_name(len(self.shards)), self.waiting))
            self.waiting = []


def _write_manifests(splits: dict[str, _Split], attribution: str, skipped: dict[str, str], total: int) -> dict[str, Manifest]:
    for name, split in splits.items():
        if not split.shards:
            raise UserError(
                f"data: no image left for the {name} split of {total} images; "
                f"change data.{'test' if name == 'test' else 'heldout'}_fraction or add images."
            )
    families = splits["train"].families
    manifests = {"train": Manifest(shards=tuple(splits["train"].shards), attribution=attribution, skipped=skipped)}
    for name in [name for name in splits if name != "train"]:
        variants = sum(count for family, count in splits[name].families.items() if family in families)
        manifests[name] = Manifest(shards=tuple(splits[name].shards), attribution=attribution, with_variant_in_train=variants)
    for name, manifest in manifests.items():
        write_manifest(splits[name].folder, manifest)
    return manifests
